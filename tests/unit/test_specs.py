"""Declared inputs survive the way through contract.json."""

from __future__ import annotations

import json

import numpy as np
import pytest

from toolchain.runtime import parse_contract
from toolchain.specs import DimSpec, InputSpec, Signature
from toolchain.tvm.compare import random_inputs

IDS = InputSpec("ids", "int64", ("batch", "sequence"), 0, 0, 99)
SHIFT = InputSpec("shift", "float32", ("batch",), None, -3.5, -2.5)
PLAIN = InputSpec("plain", "int32", (4,))
DIMS = (DimSpec("batch", 1, 8, True, (1, 8)), DimSpec("sequence", 1, 64, False, (16, 64)))
SIGNATURE = Signature.of([IDS, SHIFT, PLAIN], DIMS)


def contract() -> dict[str, object]:
    text = json.dumps(
        {
            "schema": 1,
            "inputs": [spec.to_json() for spec in SIGNATURE.inputs],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
            "dims": {dim.name: dim.to_json() for dim in DIMS},
            "preprocessing": "",
        }
    )
    loaded: dict[str, object] = json.loads(text)
    return loaded


def test_a_signature_comes_back_from_its_contract_with_ranges() -> None:
    assert Signature.from_contract(contract()) == SIGNATURE


def test_a_range_is_in_the_contract_only_where_it_is_declared() -> None:
    keys = [set(entry) for entry in contract()["inputs"]]  # type: ignore[attr-defined]
    assert keys == [{"name", "dtype", "shape", "pad", "low", "high"}] * 2 + [{"name", "dtype", "shape", "pad"}]


def test_a_contract_of_before_ranges_were_kept_is_read_without() -> None:
    old = contract()
    for entry in old["inputs"]:  # type: ignore[attr-defined]
        entry.pop("low", None)
        entry.pop("high", None)
    assert {(spec.low, spec.high) for spec in Signature.from_contract(old).inputs} == {(None, None)}


def test_the_runtime_reads_a_contract_with_ranges() -> None:
    assert parse_contract(contract(), "contract.json").input_names == ("ids", "shift", "plain")


def test_engines_are_compared_on_the_whole_declared_range() -> None:
    got = random_inputs(Signature.from_contract(contract()), {"batch": 8, "sequence": 64})
    assert (got["ids"].min(), got["ids"].max()) == (0, 99)
    assert got["shift"].min() >= -3.5
    assert got["shift"].max() <= -2.5
    assert set(np.unique(got["plain"])) <= {0, 1}


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8"])
def test_both_ends_of_a_range_are_drawn(dtype: str) -> None:
    spec = InputSpec("x", dtype, (1000,), None, 5, 7)
    (got,) = random_inputs(Signature.of([spec], ()), {}).values()
    assert (got.dtype, set(np.unique(got))) == (np.dtype(dtype), {5, 6, 7})
