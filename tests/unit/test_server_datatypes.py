"""Tensors of the Open Inference Protocol from and to bytes and lists."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.datatypes import (
    DTYPES,
    NAMES,
    bf16_bits,
    bf16_floats,
    from_raw,
    from_values,
    to_raw,
)

PLAIN = sorted(set(DTYPES) - {"BYTES", "BF16"})


@given(st.sampled_from(PLAIN), st.data())
def test_a_tensor_survives_its_raw_form(datatype: str, data: st.DataObject) -> None:
    array = data.draw(npst.arrays(DTYPES[datatype], npst.array_shapes(min_dims=0, max_dims=4, min_side=0)))
    again = from_raw("x", datatype, list(array.shape), bytes(to_raw(array)))
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()
    assert NAMES[again.dtype] == datatype


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_elements_survive_their_raw_form(elements: list[bytes]) -> None:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    raw = to_raw(array)
    assert raw == b"".join(struct.pack("<I", len(e)) + e for e in elements)
    assert from_raw("x", "BYTES", [len(elements)], raw).tolist() == elements


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(-2, 2**65), max_size=5), st.binary(max_size=64))
def test_any_bytes_make_a_tensor_of_that_shape_or_a_clear_refusal(datatype: str, shape: list[int], raw: bytes) -> None:
    refused: ServeError | None = None
    try:
        array = from_raw("x", datatype, shape, raw)
    except ServeError as error:
        refused = error
    if refused is not None:
        assert refused.status is Status.INVALID
        assert "'x'" in refused.message
    else:
        assert list(array.shape) == shape
        assert bytes(to_raw(array)) == raw


def test_a_raw_tensor_is_a_view_where_its_address_allows_it() -> None:
    body = memoryview(bytearray(64))
    aligned = from_raw("x", "FP32", [4], body[16:32])
    assert np.shares_memory(aligned, np.frombuffer(body, np.uint8))
    odd = from_raw("x", "FP32", [4], body[17:33])
    assert odd.flags.aligned
    assert not np.shares_memory(odd, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "says"),
    [
        ("FP31", [1], b"1234", "unknown datatype"),
        ("FP32", [2], b"1234", "has 8 bytes, 4 were given"),
        ("FP32", [1], b"12345", "has 4 bytes, 5 were given"),
        ("FP32", [-1], b"", "at least 0"),
        ("FP32", [1.0], b"1234", "at least 0"),
        ("FP32", [True], b"1234", "at least 0"),
        ("FP32", [2**62, 2**62], b"", "too large"),
        ("FP32", [0, 2**62, 2**62], b"", "too large"),
        ("UINT8", [2**32, 2**32], b"", "too large"),
        ("UINT8", [1] * 33, b"1", "33 dimensions"),
        ("BOOL", [2], b"\x01\x02", "byte of 0 or 1"),
        ("BYTES", [1], b"\x04\x00\x00\x00abc", "claims 4 bytes, 3 are left"),
        ("BYTES", [1], b"\xff\xff\xff\xffabc", "claims 4294967295 bytes"),
        ("BYTES", [1], b"\x00\x00", "at least 4 bytes"),
        ("BYTES", [2], b"\x02\x00\x00\x00abcd", "within the length"),
        ("BYTES", [1], b"\x01\x00\x00\x00abc", "2 bytes follow"),
        ("BYTES", [2**40], b"", "at least"),
        ("BYTES", [0], b"\x00\x00\x00\x00", "4 bytes follow"),
    ],
)
def test_a_raw_tensor_that_lies_is_refused(datatype: str, shape: list[Any], raw: bytes, says: str) -> None:
    with pytest.raises(ServeError, match=says) as refused:
        from_raw("x", datatype, shape, raw)
    assert refused.value.status is Status.INVALID


@pytest.mark.parametrize(
    ("datatype", "values", "expected"),
    [
        ("FP32", [1, 2.5], np.array([1, 2.5], np.float32)),
        ("FP16", [65504, -1], np.array([65504, -1], np.float16)),
        ("FP64", [1e308, 2**64], np.array([1e308, 2.0**64])),
        ("INT8", [-128, 127], np.array([-128, 127], np.int8)),
        ("UINT64", [0, 2**64 - 1], np.array([0, 2**64 - 1], np.uint64)),
        ("BOOL", [True, False], np.array([True, False])),
        ("BYTES", ["ä", ""], np.array(["ä".encode(), b""], np.object_)),
        ("BF16", [1.0, 3.1415927], np.array([0x3F80, 0x4049], np.uint16)),
        ("FP32", [[1.0], [2.0]], np.array([1, 2], np.float32)),
    ],
)
def test_values_become_a_tensor(datatype: str, values: list[Any], expected: np.ndarray) -> None:
    array = from_values("x", datatype, [2], values)
    assert array.dtype == expected.dtype
    assert array.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "says"),
    [
        ("FP32", [2], [1.0], "has 2 elements, 'data' has 1"),
        ("FP32", [1], ["1"], "no value of FP32"),
        ("FP32", [1], [None], "null is no value"),
        ("FP32", [1], [True], "true is no value"),
        ("FP32", [1], [3.5e38], "range of FP32"),
        ("FP16", [1], [65520], "range of FP16"),
        ("BF16", [1], [3.4e38], "range of BF16"),
        ("INT8", [1], [128], "range of INT8"),
        ("UINT8", [1], [-1], "range of UINT8"),
        ("INT32", [1], [1.5], "1.5 is no value"),
        ("INT32", [2], [1, True], "true is no value"),
        ("BOOL", [1], [1], "1 is no value"),
        ("BYTES", [1], [1], "1 is no value"),
        ("FP32", [1], 1.0, "array of values"),
        ("FP32", [3], [[1.0, 2.0], [3.0]], "irregularly"),
        ("FP32", [2], [[1.0], 2.0], "irregularly"),
        ("FP32", [1], {"a": 1}, "array of values"),
    ],
)
def test_values_that_do_not_fit_are_refused(datatype: str, shape: list[int], values: object, says: str) -> None:
    with pytest.raises(ServeError, match=says) as refused:
        from_values("x", datatype, shape, values)
    assert refused.value.status is Status.INVALID


def test_the_largest_finite_values_are_let_through() -> None:
    for datatype in ("FP16", "FP32", "FP64"):
        most = float(np.finfo(DTYPES[datatype]).max)
        assert from_values("x", datatype, [2], [most, -most]).tolist() == [most, -most]


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan], np.float32)
    bits = bf16_bits(values)
    assert bits.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x8000, 0x7F80, 0x7FC0]
    assert bf16_floats(bits[:3]).tolist() == [1.0, 1.0, 1.015625]
