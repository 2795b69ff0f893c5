"""Inputs are checked against the contract, each mistake with its remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.bundle_samples import MATRIX_CONTRACT, TOKENS_CONTRACT

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import parse_contract

MATRIX = parse_contract(MATRIX_CONTRACT, "contract.json")
TOKENS = parse_contract(TOKENS_CONTRACT, "contract.json")
IMAGE = np.zeros((2, 4), np.float32)


def refusal(inputs: dict[str, Any], contract: Any = MATRIX) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        contract.check(inputs)
    assert caught.value.code is ExitCode.BAD_INPUT
    return caught.value


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'image' is missing"),
        ({"image": IMAGE.astype(np.float64)}, "must have dtype float32, got float64; convert it with .astype(numpy.fl"),
        ({"image": IMAGE[0]}, "must have 2 dimensions [batch, 4], got 1: [4]; add the batch axis with array[None]"),
        ({"image": IMAGE[:, :3]}, "axis 1 must have size 4, got 3 (shape [2, 3])"),
        ({"image": np.zeros((65, 4), np.float32)}, "axis 0 (batch) must have a size from 1 to 64, got 65"),
        ({"image": np.zeros((0, 4), np.float32)}, "axis 0 (batch) must have a size from 1 to 64, got 0"),
        ({"image": [[1.0, 2.0, 3.0, 4.0]]}, "must be a numpy array, got list"),
        ({"image": np.array([["a"] * 4])}, "must have dtype float32, got str"),
    ],
)
def test_a_mistake_says_what_is_needed(inputs: dict[str, Any], message: str) -> None:
    error = refusal(inputs)
    assert message in error.what
    assert error.hint == "the model takes image: float32[batch, 4]"


def test_several_mistakes_are_all_listed() -> None:
    error = refusal({"imgae": IMAGE})
    assert error.details == ("unknown input 'imgae' (did you mean 'image'?)", "input 'image' is missing")


def test_one_dimension_has_one_size_in_all_inputs() -> None:
    error = refusal({"tokens": np.zeros((2, 5, 4), np.float32), "mask": np.zeros((2, 6), np.float32)}, TOKENS)
    assert error.what == "input 'mask' axis 1 (sequence) has size 6, but input 'tokens' axis 1 (sequence) has size 5"


def test_any_memory_order_byte_order_and_nan_are_accepted() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    rows[0, 0] = np.nan
    for array in (rows.T, rows.T.astype(">f4"), np.repeat(rows, 2, axis=1)[:, ::2].T):
        arrays, sizes = MATRIX.check({"image": array})
        assert arrays["image"].flags.c_contiguous
        assert arrays["image"].dtype == np.dtype("=f4")
        np.testing.assert_array_equal(arrays["image"], rows.T)
        assert sizes == {"batch": 2}


def test_an_array_of_another_library_is_accepted() -> None:
    class Foreign:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return IMAGE

    assert MATRIX.check({"image": Foreign()})[1] == {"batch": 2}


def test_a_scalar_input_stays_a_scalar() -> None:
    data = {**MATRIX_CONTRACT, "inputs": [{"name": "image", "dtype": "float32", "shape": []}], "dims": {}}
    arrays, _ = parse_contract(data, "c").check({"image": np.float32(2)})
    assert arrays["image"].shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [{"name": "x", "dtype": "float33", "shape": []}]}, "dtype must be one of"),
        ({"inputs": [{"dtype": "float32", "shape": []}]}, "lacks the key 'name'"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": ["time"]}]}, "'time', which is not among the dims"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [None]}]}, "None"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [-1]}]}, "-1"),
        ({"inputs": [{"name": "x", "dtype": "int64", "shape": [1], "pad": 0.5}]}, "pad 0.5 is not of dtype int64"),
        ({"inputs": []}, "there must be inputs"),
        ({"dims": {"batch": {"min": "1"}}}, "min and max must be whole numbers"),
        ({"schema": None}, "schema must be"),
    ],
)
def test_a_wrong_contract_is_damaged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        parse_contract({**MATRIX_CONTRACT, **change}, "contract.json")
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE
    assert message in caught.value.what


def test_a_contract_of_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(ToolchainError, match="made for schema 2") as caught:
        parse_contract({**MATRIX_CONTRACT, "schema": 2}, "contract.json")
    assert caught.value.code is ExitCode.INCOMPATIBLE_HOST


def ranged(dtype: str, **bounds: Any) -> Any:
    spec = {"name": "ids", "dtype": dtype, "shape": ["batch", 3], "pad": None, **bounds}
    return parse_contract({**MATRIX_CONTRACT, "inputs": [spec]}, "contract.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 5, 99]], ""),
        ([[0, 5, 100]], "input 'ids' must hold values from 0 to 99, got values from 0 to 100"),
        ([[-1, 5, 7]], "input 'ids' must hold values from 0 to 99, got values from -1 to 7"),
        ([[400, 400, 400]], "input 'ids' must hold values from 0 to 99, got 400"),
    ],
)
def test_whole_numbers_outside_of_the_declared_range_are_refused(values: list[list[int]], message: str) -> None:
    inputs = {"ids": np.array(values, np.int64)}
    if message:
        assert refusal(inputs, ranged("int64", low=0, high=99)).what == message
    else:
        ranged("int64", low=0, high=99).check(inputs)
        ranged("int64").check({"ids": np.array([[-(2**62), 0, 2**62]])})


def test_a_range_of_one_side_and_the_widest_numbers_are_understood() -> None:
    most = 2**64 - 1
    ranged("uint64", high=most).check({"ids": np.array([[0, 1, most]], np.uint64)})
    error = refusal({"ids": np.array([[0, 1, most]], np.uint64)}, ranged("uint64", high=most - 1))
    assert error.what == f"input 'ids' must hold values to {most - 1}, got values from 0 to {most}"


def test_the_range_of_floats_only_draws_random_inputs() -> None:
    arrays, _ = ranged("float32", low=0.0, high=1.0).check({"ids": np.array([[-4, np.nan, 9]], np.float32)})
    assert arrays["ids"][0, 2] == 9


@pytest.mark.parametrize("bounds", [{"low": 0.5, "high": 2}, {"low": 3, "high": 2}, {"low": "0", "high": 2}])
def test_a_range_that_is_none_is_a_damaged_bundle(bounds: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError) as caught:
        ranged("int32", **bounds)
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE
