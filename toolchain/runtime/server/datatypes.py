"""The datatypes of the Open Inference Protocol as numpy arrays, from and to raw bytes and lists of values.

Raw tensors are little-endian, row-major and without gaps; an element of BYTES is a 4-byte length and that many bytes
(Triton's binary tensor data extension).  numpy has no bfloat16: BF16 tensors are uint16 arrays of its bits.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from toolchain.runtime.server.api import ServeError, Status

#: dtype of each datatype's array; BYTES has object arrays of ``bytes``.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(np.uint16),
    "BYTES": np.dtype(np.object_),
}
#: The datatype of a dtype; BF16 can't be told from UINT16 by its array.
NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
MAX_DIMS = 32
_MAX_BYTES = 2**63 - 1
_FP32 = np.dtype(np.float32)
_JUST_FLOATS = {float}
_LENGTH = struct.Struct("<I")
_FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
#: The least magnitude that rounds to an infinity; 0 where whatever JSON can say has a finite value.
_FLOAT_LIMITS = {"FP16": 65520.0, "BF16": 2.0**128 - 2.0**119, "FP32": 2.0**128 - 2.0**103, "FP64": 0.0}
_ALLOWED: dict[str, frozenset[type]] = {
    **dict.fromkeys(DTYPES, frozenset({int})),
    **dict.fromkeys(_FLOATS, frozenset({int, float})),
    "BOOL": frozenset({bool}),
    "BYTES": frozenset({str}),
}


def invalid(message: str) -> NoReturn:
    """Refuse a request for what it says."""
    raise ServeError(Status.INVALID, message)


def dtype_of(name: str, datatype: object) -> np.dtype[Any]:
    """The dtype of a datatype.

    Raises:
        ServeError: INVALID, the tensor ``name`` has no such datatype.
    """
    dtype = DTYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        invalid(f"input {name!r}: unknown datatype {datatype!r}; known are {', '.join(DTYPES)}")
    return dtype


def check_shape(name: str, shape: Sequence[Any], itemsize: int) -> int:
    """The number of elements of a shape, computed without overflow.

    Raises:
        ServeError: INVALID, a size is no whole number of at least 0, there are more than 32 of them, or a tensor of
            that shape would have more than 2**63 - 1 bytes.
    """
    if len(shape) > MAX_DIMS:
        invalid(f"input {name!r}: the shape has {len(shape)} dimensions, at most {MAX_DIMS} are allowed")
    count = limit = 1
    for size in shape:
        if type(size) is not int or size < 0:
            invalid(f"input {name!r}: a shape is whole numbers of at least 0, not {size!r:.40}")
        count *= size
        limit *= size or 1  # a size of 0 must not hide the product of the others
    if limit * itemsize > _MAX_BYTES:
        invalid(f"input {name!r}: a tensor of shape {list(shape)} is too large to exist")
    return count


def from_raw(name: str, datatype: str, shape: Sequence[int], data: memoryview | bytes) -> np.ndarray:
    """The tensor in ``data``, a view of it unless it is BYTES or lies at an address that its dtype can't be read from.

    Args:
        name: the input's name, for messages.
        datatype: as the request says.
        shape: as the request says; checked.
        data: the tensor's bytes, exactly.

    Raises:
        ServeError: INVALID, datatype, shape or length don't fit together.
    """
    dtype = DTYPES.get(datatype)
    if dtype is None:
        dtype = dtype_of(name, datatype)
    size = len(data)
    if datatype == "BYTES":
        return _split_bytes(name, shape, data)
    count = check_shape(name, shape, dtype.itemsize)
    if count * dtype.itemsize != size:
        invalid(
            f"input {name!r}: {datatype} of shape {list(shape)} has {count * dtype.itemsize} bytes, {size} were given"
        )
    if datatype == "BOOL":
        flags = np.frombuffer(data, np.uint8)
        if size and flags.max() > 1:
            invalid(f"input {name!r}: a BOOL is a byte of 0 or 1")
        return flags.view(np.bool_).reshape(shape)
    array = np.frombuffer(data, dtype)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _split_bytes(name: str, shape: Sequence[int], data: memoryview | bytes) -> np.ndarray:
    count, size = check_shape(name, shape, _LENGTH.size), len(data)
    if count * _LENGTH.size > size:  # before anything of that many elements is made
        invalid(f"input {name!r}: {count} elements of BYTES take at least {count * 4} bytes, {size} were given")
    elements = np.empty(count, np.object_)
    at = 0
    for index in range(count):
        if at + 4 > size:
            invalid(f"input {name!r}: the data ends within the length of element {index}")
        (length,) = _LENGTH.unpack_from(data, at)
        at += 4
        if length > size - at:
            invalid(f"input {name!r}: element {index} claims {length} bytes, {size - at} are left")
        elements[index] = bytes(data[at : at + length])
        at += length
    if at != size:
        invalid(f"input {name!r}: {size - at} bytes follow the last of {count} elements")
    return elements.reshape(shape)


def to_raw(array: np.ndarray) -> bytes | memoryview:
    """The raw bytes of a tensor; a view of the array where it has them as they are sent."""
    if array.dtype.hasobject:
        parts: list[bytes] = []
        for element in array.ravel().tolist():
            value = element.encode() if isinstance(element, str) else bytes(element)
            parts.append(_LENGTH.pack(len(value)))
            parts.append(value)
        return b"".join(parts)
    if array.nbytes < 4096 or not array.flags.c_contiguous:
        return array.tobytes()
    return array.data.cast("B")


def from_values(name: str, datatype: str, shape: Sequence[int], values: object) -> np.ndarray:
    """The tensor of a JSON array, flat or nested.

    Whole numbers must lie in the datatype's range, and numbers must be finite in it.

    Raises:
        ServeError: INVALID, the values don't fit the datatype or the shape.
    """
    if datatype == "FP32" and type(values) is list and set(map(type, values)) == _JUST_FLOATS:
        # The commonest by far.  None is larger than the length of all of them as a vector.
        small = len(values) == check_shape(name, shape, 4) and math.hypot(*values) < _FLOAT_LIMITS["FP32"]
        if small:
            return np.ndarray(shape, _FP32, array("f", values))
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype.itemsize)
    flat = _flatten(name, values)
    if len(flat) != count:
        invalid(f"input {name!r}: shape {list(shape)} has {count} elements, 'data' has {len(flat)}")
    kinds = set(map(type, flat))
    if not kinds <= _ALLOWED[datatype]:
        wrong = next(value for value in flat if type(value) not in _ALLOWED[datatype])
        invalid(f"input {name!r}: {json_text(wrong)} is no value of {datatype}")
    if datatype in _FLOATS:
        return _floats(name, datatype, flat).reshape(shape)
    if datatype == "BYTES":
        elements = np.empty(count, np.object_)
        elements[:] = [text.encode("utf-8", "surrogatepass") for text in flat]
        return elements.reshape(shape)
    try:
        return np.array(flat, dtype).reshape(shape)
    except OverflowError:
        invalid(f"input {name!r}: a value lies outside the range of {datatype}")


def _floats(name: str, datatype: str, flat: list[Any]) -> np.ndarray:
    """Finite numbers (JSON has no others) as floats; those that would round to an infinity are refused."""
    limit = _FLOAT_LIMITS[datatype]
    if limit and flat and not (max(flat) < limit and min(flat) > -limit):
        invalid(f"input {name!r}: a value lies outside the range of {datatype}")
    if datatype == "BF16":
        return bf16_bits(np.array(flat, np.float32))
    return np.array(flat, DTYPES[datatype])


def bf16_bits(array: np.ndarray) -> np.ndarray:
    """The bfloat16 bits (uint16) of float32 values, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def bf16_floats(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _flatten(name: str, values: object) -> list[Any]:
    """The elements of a flat list, or of lists nested regularly."""
    if not isinstance(values, list):
        invalid(f"input {name!r}: 'data' is an array of values")
    depth = 0
    while values and type(values[0]) is list:
        depth += 1
        if depth > MAX_DIMS or set(map(type, values)) != {list} or len(set(map(len, values))) > 1:
            invalid(f"input {name!r}: 'data' is nested irregularly")
        values = [value for inner in values for value in inner]
    return values


def json_text(value: object) -> str:
    """A JSON value for a message, cut short."""
    import json

    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
