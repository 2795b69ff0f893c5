"""Names of classes: from the recipe into the contract, and what is wrong with them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.bundle_samples import MATRIX_CONTRACT, bundle_spec, matrix_engine

from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.config_errors import Problem
from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.source import open_source
from toolchain.exports.triton import triton_tree
from toolchain.publish import with_labels
from toolchain.recipe_checks import sense_problems
from toolchain.runtime.contract import parse_contract
from toolchain.runtime.server.describe import config, metadata
from toolchain.runtime.server.settings import ModelSettings
from toolchain.runtime.server.traffic import Traffic
from toolchain.runtime.server.version import ModelVersion, place_bundle

NAMES = ["cat", "dog", "the third"]


def recipe(folder: Path, labels: dict[str, str]) -> Any:
    """As much of a recipe as is looked at."""
    model = SimpleNamespace(labels=labels)
    return SimpleNamespace(path=folder / "recipe.toml", model=model, resolve=lambda file: folder / file)


def test_lines_of_a_file_become_labels_of_an_output(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nthe third\n")
    made = with_labels(MATRIX_CONTRACT, recipe(tmp_path, {"scores": "names.txt"}))
    assert made["outputs"][0] == MATRIX_CONTRACT["outputs"][0] | {"labels": NAMES}
    assert "labels" not in MATRIX_CONTRACT["outputs"][0]
    assert parse_contract(made, "contract.json").outputs[0].labels == tuple(NAMES)


@pytest.mark.parametrize(
    ("labels", "text", "told"),
    [
        ({"scorez": "names.txt"}, "a\nb\nc\n", "no output 'scorez' (did you mean 'scores'?)"),
        ({"scores": "names.txt"}, "a\nb\n", "has 2 lines, output 'scores' has 3 classes"),
        ({"scores": "names.txt"}, "", "has 0 lines"),
        ({"scores": "none.txt"}, "a\nb\nc\n", "none.txt cannot be read"),
    ],
)
def test_labels_that_do_not_fit_are_told(tmp_path: Path, labels: dict[str, str], text: str, told: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ToolchainError) as caught:
        with_labels(MATRIX_CONTRACT, recipe(tmp_path, labels))
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert told in caught.value.what
    assert "model.labels." in caught.value.where


@pytest.mark.parametrize("labels", ["cat", [1, 2, 3], ["cat"], {"cat": 1}])
def test_a_contract_with_labels_of_another_form_is_damaged(labels: object) -> None:
    bad = copy.deepcopy(MATRIX_CONTRACT)
    bad["outputs"][0]["labels"] = labels
    with pytest.raises(ToolchainError) as caught:
        parse_contract(bad, "contract.json")
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE


def test_the_recipe_is_checked_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n")
    raw = {"model": {"outputs": ["scores"], "labels": {"scorez": "names.txt", "scores": "name.txt"}}}
    found: dict[Any, Problem] = {p.key: p for p in sense_problems(raw, tmp_path, {})}
    assert "names.txt" in found["model", "labels", "scores"].line("recipe.toml")
    assert "scores" in found["model", "labels", "scorez"].line("recipe.toml")


def labelled_release(folder: Path) -> Path:
    engine = matrix_engine(folder / "engine")
    contract = copy.deepcopy(MATRIX_CONTRACT)
    contract["outputs"][0]["labels"] = NAMES
    (engine / "contract.json").write_text(json.dumps(contract))
    spec = bundle_spec(engine)
    pack_release("sample", "1.0.0", [pack_bundle(replace(spec, manifest=replace(spec.manifest)))], folder / "release")
    return folder / "release"


def test_the_server_and_triton_have_the_labels(tmp_path: Path) -> None:
    release = labelled_release(tmp_path)
    settings = ModelSettings.model_validate({})
    version = ModelVersion(place_bundle(str(release)), settings)
    traffic = Traffic("sample", settings, lambda version, reason: None)
    assert metadata(traffic, version).outputs[0].labels == tuple(NAMES)
    assert config(traffic, version)["output"][0]["label_filename"] == "scores.txt"
    tree = triton_tree(open_source(str(release)))
    assert tree["sample/labels-0.txt"].source == b"cat\ndog\nthe third\n"
    assert b'label_filename: "labels-0.txt"' in tree["sample/config.pbtxt"].source  # type: ignore[operator]
