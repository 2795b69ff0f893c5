"""Declared inputs survive the way through contract.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolchain.host import detect_host
from toolchain.plan import make_plan
from toolchain.recipe import load_recipe
from toolchain.runtime import parse_contract
from toolchain.runtime.image import image_array
from toolchain.specs import DimSpec, ImageSpec, InputSpec, Signature
from toolchain.target import load_target
from toolchain.tvm.compare import random_inputs

PHOTO = InputSpec("photo", "float32", (1, 3, 2, 2), image=ImageSpec(1 / 255, (0.5, 0.4, 0.3), (0.25,), True))
IDS = InputSpec("ids", "int64", ("batch", "sequence"), 0, 0, 99)
SHIFT = InputSpec("shift", "float32", ("batch",), None, -3.5, -2.5)
PLAIN = InputSpec("plain", "int32", (4,))
DIMS = (DimSpec("batch", 1, 8, True, (1, 8)), DimSpec("sequence", 1, 64, False, (16, 64)))
SIGNATURE = Signature.of([IDS, SHIFT, PLAIN, PHOTO], DIMS)


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


def test_a_range_and_an_image_are_in_the_contract_only_where_they_are_declared() -> None:
    keys = [set(entry) for entry in contract()["inputs"]]  # type: ignore[attr-defined]
    always = {"name", "dtype", "shape", "pad"}
    assert keys == [always | {"low", "high"}] * 2 + [always, always | {"image"}]


def test_a_contract_of_before_ranges_were_kept_is_read_without() -> None:
    old = contract()
    for entry in old["inputs"]:  # type: ignore[attr-defined]
        entry.pop("low", None)
        entry.pop("high", None)
    assert {(spec.low, spec.high) for spec in Signature.from_contract(old).inputs} == {(None, None)}


def test_the_runtime_reads_a_contract_with_ranges() -> None:
    assert parse_contract(contract(), "contract.json").input_names == ("ids", "shift", "plain", "photo")


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


RECIPE = """
schema = 1
name = "photo"
version = "1.0.0"
targets = ["x86-64-v3"]
[model]
source = "net.py:build"
[[model.inputs]]
name = "photo"
dtype = "float32"
shape = [1, 3, 2, 2]
image = { scale = 0.0078125, mean = [1, 0.5, 0.25], std = [0.5], invert = true }
"""


def test_the_image_values_of_a_recipe_reach_the_contract_and_change_no_other_stage(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    plans = []
    for text in (RECIPE, RECIPE.replace("invert = true", "invert = false")):
        (tmp_path / "recipe.toml").write_text(text)
        recipe = load_recipe(tmp_path / "recipe.toml")
        plans.append(make_plan(recipe, [load_target("x86-64-v3")], detect_host()).nodes)
    assert plans[0][0].options.inputs[0].image == ImageSpec(0.0078125, (1.0, 0.5, 0.25), (0.5,), True)
    changed = [one.id for one, other in zip(*plans, strict=True) if one.options != other.options]
    assert changed == ["export"]


def test_an_image_file_becomes_the_input_as_its_contract_says(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 153, 51)).save(tmp_path / "photo.png")
    spec = parse_contract(contract(), "contract.json").input("photo")
    got = image_array(tmp_path / "photo.png", spec)
    assert got.shape == (1, 3, 2, 2)
    expected = (np.array([0.0, 0.4, 0.8]) - [0.5, 0.4, 0.3]) / 0.25
    np.testing.assert_allclose(got[0, :, 0, 0], expected, atol=1e-6)
