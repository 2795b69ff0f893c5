"""Engines ahead of time, small and hand-written, and the bundles and runtimes made of them."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.bundle_samples import MATRIX_CONTRACT, TOKENS_CONTRACT, WEIGHTS, write_engine
from toolchain.data import write_npz
from toolchain.runtime.edge.build import EDGE

SOURCES = Path(__file__).with_name("edge_model.c")
DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
]  # fmt: skip
OK, USAGE, INCOMPATIBLE_HOST, DAMAGED_BUNDLE, BAD_INPUT, NO_ENGINE, STORAGE, NO_MEMORY, BUSY, FAILED = range(10)
TOO_SMALL, SELF_TEST = 10, 11
VERIFY_ALL, OPEN_ALL, WAIT, DESCRIBE = 1, 2, 4, 8


def compile_model(output: Path, batch: int = 0, compiler: tuple[str, ...] = ("cc",), **defines: object) -> Path:
    """The library of ``edge_model.c``: the matrix model, or with ``SEQUENCE`` (0: any) the tokens model."""
    values = {"BATCH": batch, **defines}
    command = [*compiler, "-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-s", "-I", str(EDGE / "include")]
    command += [f"-D{name}={value}" for name, value in values.items()]
    subprocess.run([*command, "-o", str(output), str(SOURCES)], check=True, capture_output=True)
    return output


def aot_engine(folder: Path, contract: Mapping[str, Any], variants: Mapping[str, Mapping[str, int]]) -> Path:
    """engine.json of the form ahead of time, and contract.json; the libraries are the caller's."""
    write_engine(folder, contract, variants, "tvm")
    path = folder / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"form": "aot"}))
    return folder


def matrix_engine(folder: Path, *batches: int, **defines: object) -> Path:
    """scores = relu(image @ WEIGHTS), of any batch size or of these."""
    folder.mkdir(parents=True, exist_ok=True)
    for batch in batches or (0,):
        compile_model(folder / f"b{batch}.so", batch, **defines)
    variants: dict[str, dict[str, int]] = {f"b{b}.so": {"batch": b} for b in batches} or {"b0.so": {}}
    return aot_engine(folder, MATRIX_CONTRACT, variants)


def tokens_engine(folder: Path, sizes: tuple[tuple[int, int], ...]) -> Path:
    """The tokens model of ``bundle_samples``, for each (batch, sequence); 0: any."""
    folder.mkdir(parents=True, exist_ok=True)
    for batch, sequence in sizes:
        compile_model(folder / f"b{batch}s{sequence}.so", batch, SEQUENCE=sequence)
    variants = {f"b{b}s{s}.so": {"batch": b, "sequence": s} if b else {} for b, s in sizes}
    return aot_engine(folder, TOKENS_CONTRACT, variants)


def selftest_file(path: Path, error: float = 0.0) -> Path:
    image = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    scores = np.maximum(image @ WEIGHTS, 0) + np.float32(error)
    write_npz(path, {"input:image": image, "output:scores": scores.astype(np.float32)})
    return path


class Options(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32), ("abi", ctypes.c_uint32), ("target", ctypes.c_char_p), ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32), ("error", ctypes.c_void_p), ("error_bytes", ctypes.c_size_t),
        ("selftest", ctypes.c_void_p), ("selftest_bytes", ctypes.c_size_t),
    )  # fmt: skip


class Value(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32), ("shape", ctypes.c_int64 * 8),
    )  # fmt: skip


class EdgeError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


def value_of(array: np.ndarray | None, name: str | None) -> Value:
    value = Value(None if name is None else name.encode())
    if array is not None:
        value.data, value.bytes = array.ctypes.data, array.nbytes
        value.dtype, value.rank = DTYPES.index(array.dtype.name) + 1, array.ndim
        value.shape[: array.ndim] = array.shape
    return value


class Runtime:
    """The shared library through ctypes."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.tc_last_error.restype = ctypes.c_size_t
        self.lib.tc_property.restype = ctypes.c_char_p
        for function in ("tc_last_error", "tc_property", "tc_close", "tc_run", "tc_output_shapes", "tc_self_test"):
            getattr(self.lib, function).argtypes = None

    def open(self, path: Path | str, target: str | None = None, flags: int = 0, **changes: int) -> Bundle:
        text = ctypes.create_string_buffer(2048)
        options = Options(ctypes.sizeof(Options), 1, target and target.encode(), 1, flags, ctypes.addressof(text), 2048)
        for name, value in changes.items():
            setattr(options, name, value)
        handle = ctypes.c_void_p()
        status = self.lib.tc_open(str(path).encode(), ctypes.byref(options), ctypes.byref(handle))
        if status != OK:
            assert not handle.value
            raise EdgeError(status, text.value.decode())
        return Bundle(self, handle)


class Bundle:
    def __init__(self, runtime: Runtime, handle: ctypes.c_void_p) -> None:
        self.lib, self.handle = runtime.lib, handle

    def check(self, status: int) -> None:
        if status != OK:
            text = ctypes.create_string_buffer(2048)
            self.lib.tc_last_error(self.handle, text, ctypes.c_size_t(len(text)))
            raise EdgeError(status, text.value.decode())

    def property(self, key: str) -> str:
        return self.lib.tc_property(self.handle, key.encode()).decode()

    def run(self, inputs: Mapping[str | None, np.ndarray], names: tuple[str | None, ...] = (None,)) -> list[np.ndarray]:
        """Outputs of these names, or of these many positions."""
        arrays = [np.ascontiguousarray(a) if a.ndim else a for a in inputs.values()]
        given = (Value * len(arrays))(*map(value_of, arrays, inputs))
        taken = (Value * len(names))(*(value_of(None, name) for name in names))
        self.check(self.lib.tc_output_shapes(self.handle, given, len(given), taken, len(taken)))
        results = [np.empty(list(v.shape[: v.rank]), DTYPES[v.dtype - 1]) for v in taken]
        for value, result in zip(taken, results, strict=True):
            value.data = result.ctypes.data
        self.check(self.lib.tc_run(self.handle, given, len(given), taken, len(taken)))
        return results

    def close(self) -> None:
        self.lib.tc_close(self.handle)
