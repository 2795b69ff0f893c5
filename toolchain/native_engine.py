"""Opens engines made ahead of time: libraries that export ``toolchain_model()`` (toolchain_model.h).

Needs numpy and the C library alone.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ABI = 2
"""``TC_MODEL_ABI``; engines of earlier versions lack members at the end of their description, none of which is used."""

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
"""In the order of ``tc_dtype``, which counts from 1."""

_STATUS = {
    1: "there is not enough memory for its buffers or threads",
    2: "a dimension is outside its range",
    3: "it is running in another thread",
    4: "a kernel failed",
}
_COMPUTED = -(2**63)
_ALIGNMENT = 64
_I64 = ctypes.POINTER(ctypes.c_int64)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32), ("shape", _I64))


class _Dim(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("min", ctypes.c_int64), ("max", ctypes.c_int64))


class _Model(ctypes.Structure):
    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("num_inputs", ctypes.c_uint32),
        ("num_outputs", ctypes.c_uint32),
        ("num_dims", ctypes.c_uint32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("dims", ctypes.POINTER(_Dim)),
        ("weight_bytes", ctypes.c_uint64),
        ("output_shape", ctypes.CFUNCTYPE(None, ctypes.c_uint32, _I64, _I64)),
        ("arena_bytes", ctypes.CFUNCTYPE(ctypes.c_uint64, _I64)),
        ("open", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, _POINTERS)),
        # Pointers as plain addresses: ctypes takes longer to convert typed ones than small models to run.
        ("run", ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4)),
        ("close", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


class NativeError(Exception):
    """The engine can't be opened or its run failed; the text says why."""


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """An input or output: numpy dtype name; an axis is a size, a dimension's name, or None for a computed size."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class NativeEngine:
    """One opened engine, with its threads and its memory.  Runs from several threads wait for each other."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Loads the library.

        Args:
            path: a shared library for this machine, known to be whole: the dynamic loader does not check.
            threads: of one run; 0: one for each processor that this process may use.

        Raises:
            NativeError: it can't be loaded, is made for another version of the interface, or there is no memory.
        """
        import numpy as np

        self._instance = ctypes.c_void_p()
        self._model = _model_of(path)
        status = self._model.open(threads, ctypes.byref(self._instance))
        if status:
            raise NativeError(_STATUS.get(status, f"status {status}"))
        self._lock = threading.Lock()
        self.dims = tuple(self._model.dims[i].name.decode() for i in range(self._model.num_dims))
        self.inputs = self._tensors(self._model.inputs, self._model.num_inputs)
        self.outputs = self._tensors(self._model.outputs, self._model.num_outputs)
        self._static = [_static_shape(tensor) for tensor in self.outputs]
        self._dtypes = [np.dtype(tensor.dtype) for tensor in self.outputs]
        self._where = self._places()
        self._dims = (ctypes.c_int64 * max(1, len(self.dims)))()
        self._given = (ctypes.c_void_p * max(1, len(self.inputs)))()
        self._taken = (ctypes.c_void_p * max(1, len(self.outputs)))()
        self._call = self._model.run
        self._arguments: tuple[int | None, ...] = (
            self._instance.value,
            *(ctypes.addressof(array) for array in (self._dims, self._given, self._taken)),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the constants, mapped with the library."""
        return int(self._model.weight_bytes)

    def arena_bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes of the buffers of a run at these sizes of the dimensions."""
        dims = (ctypes.c_int64 * max(1, len(self.dims)))(*((sizes or {})[name] for name in self.dims))
        return int(self._model.arena_bytes(dims))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in order.

        Args:
            inputs: C-contiguous, of the engine's dtypes and ranks, with sizes that agree: the caller has checked.

        Raises:
            NativeError: a dimension outside its range, no memory, a kernel failed.
        """
        import numpy as np

        outputs = []
        given, dims, taken = self._given, self._dims, self._taken
        with self._lock:
            for index, array in enumerate(inputs):
                given[index] = _address(array)
            for index, (number, axis) in enumerate(self._where):
                dims[index] = inputs[number].shape[axis]
            for index, shape in enumerate(self._static):
                array = np.empty(self._shape(index) if shape is None else shape, self._dtypes[index])
                outputs.append(array)
                taken[index] = _address(array)
            if not self._arguments:
                raise NativeError("it is closed")
            status = self._call(*self._arguments)
        if status:
            raise NativeError(_STATUS.get(status, f"status {status}"))
        return outputs

    def close(self) -> None:
        """Ends its threads and frees its memory; the library itself stays loaded."""
        if self._instance:
            self._model.close(self._instance)
            self._instance = ctypes.c_void_p()
            self._arguments = ()

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self.close()

    def _shape(self, output: int) -> tuple[int, ...]:
        rank = len(self.outputs[output].shape)
        shape = (ctypes.c_int64 * max(1, rank))()
        self._model.output_shape(output, self._dims, shape)
        return tuple(shape[:rank])

    def _places(self) -> list[tuple[int, int]]:
        """For each dimension, an input and the axis of it that has that size."""
        found: dict[int | str | None, tuple[int, int]] = {}
        for number, tensor in enumerate(self.inputs):
            for axis, size in enumerate(tensor.shape):
                found.setdefault(size, (number, axis))
        return [found[name] for name in self.dims]

    def _tensors(self, table: ctypes.Array[_Tensor], count: int) -> tuple[NativeTensor, ...]:
        return tuple(
            NativeTensor(
                table[i].name.decode(),
                DTYPES[table[i].dtype - 1],
                tuple(self._axis(table[i].shape[axis]) for axis in range(table[i].rank)),
            )
            for i in range(count)
        )

    def _axis(self, size: int) -> int | str | None:
        if size >= 0:
            return size
        return None if size == _COMPUTED else self.dims[-size - 1]


def _address(array: np.ndarray) -> int:
    """Of the first element; through the buffer interface where that can be, as it takes a quarter of the time."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type, unused-ignore]
    except (TypeError, ValueError):  # read-only, or empty
        return int(array.ctypes.data)


def _model_of(path: Path) -> _Model:
    try:
        library = ctypes.CDLL(str(path.absolute()))  # a name without a slash would be searched for
        entry = library.toolchain_model
    except (OSError, AttributeError) as error:
        raise NativeError(str(error)) from error
    entry.restype = ctypes.POINTER(_Model)
    model: _Model = entry().contents
    if not 1 <= model.abi <= ABI:
        raise NativeError(
            f"it is made for version {model.abi} of the engine interface, this one understands up to {ABI}"
        )
    return model


def _static_shape(tensor: NativeTensor) -> tuple[int, ...] | None:
    sizes = tuple(size for size in tensor.shape if isinstance(size, int))
    return sizes if len(sizes) == len(tensor.shape) else None
