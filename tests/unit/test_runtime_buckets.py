"""Inputs of any size run on engines compiled for fixed sizes, with the results of a dynamic one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    TOKENS_CONTRACT,
    expected_scores,
    expected_tokens,
    matrix_engine,
    tokens_model,
    write_engine,
)
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime import Engine, open_engine
from toolchain.runtime.buckets import Choice, choose
from toolchain.runtime.contract import parse_contract

MATRIX = parse_contract(MATRIX_CONTRACT, "c")
TOKENS = parse_contract(TOKENS_CONTRACT, "c")
GRID = [{"batch": b, "sequence": s} for b in (1, 4) for s in (8, 16)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_engine(matrix_engine(tmp_path_factory.mktemp("m"), [1, 8]), threads=1)


def tokens_engine(folder: Path, contract: dict[str, Any] = TOKENS_CONTRACT) -> Engine:
    variants = {f"b{v['batch']}-s{v['sequence']}.onnx": v for v in GRID}
    write_engine(folder, contract, variants)
    for file, sizes in variants.items():
        onnx.save(tokens_model(sizes["batch"], sizes["sequence"]), folder / file)
    return open_engine(folder, threads=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tokens_engine(tmp_path_factory.mktemp("t") / "e")


@given(batch=st.integers(1, 64))
def test_every_batch_size_gives_the_rows_it_was_given(matrix: Engine, batch: int) -> None:
    image = np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)
    got = matrix.run({"image": image})["scores"]
    assert got.shape == (batch, 3)
    np.testing.assert_allclose(got, expected_scores(image), atol=1e-5)


@given(batch=st.integers(1, 11), sequence=st.integers(1, 16))
def test_batch_and_sequence_are_filled_up_and_cut_off(tokens: Engine, batch: int, sequence: int) -> None:
    rng = np.random.default_rng(batch * 100 + sequence)
    values = rng.normal(size=(batch, sequence, 4)).astype(np.float32)
    mask = (rng.random((batch, sequence)) > 0.3).astype(np.float32)
    got = tokens.run({"tokens": values, "mask": mask})
    for name, want in expected_tokens(values, mask).items():
        assert got[name].shape == want.shape
        np.testing.assert_allclose(got[name], want, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ({"batch": 1, "sequence": 8}, Choice(0)),
        ({"batch": 1, "sequence": 9}, Choice(1)),
        ({"batch": 2, "sequence": 1}, Choice(2)),
        ({"batch": 4, "sequence": 16}, Choice(3)),
        ({"batch": 5, "sequence": 16}, Choice(3, "batch")),
        ({"batch": 9, "sequence": 3}, Choice(2, "batch")),
    ],
)
def test_the_smallest_engine_that_fits_is_chosen(sizes: dict[str, int], chosen: Choice) -> None:
    assert choose(TOKENS, GRID, sizes) == chosen


def test_an_engine_without_sizes_takes_any() -> None:
    assert choose(TOKENS, [{}], {"batch": 7, "sequence": 11}) == Choice(0)


def test_a_sequence_longer_than_every_bucket_is_refused() -> None:
    short = [{"batch": 1, "sequence": 8}]
    with pytest.raises(ToolchainError, match="compiled for batch=1, sequence=9") as caught:
        choose(TOKENS, short, {"batch": 1, "sequence": 9})
    assert caught.value.code is ExitCode.BAD_INPUT
    assert "batch=1, sequence=8" in caught.value.hint


def test_without_a_pad_value_only_exact_sizes_run(tmp_path: Path) -> None:
    contract = deepcopy(TOKENS_CONTRACT)
    contract["inputs"][1]["pad"] = None
    engine = tokens_engine(tmp_path / "e", contract)
    values, mask = np.ones((3, 8, 4), np.float32), np.ones((3, 8), np.float32)
    np.testing.assert_allclose(engine.run({"tokens": values, "mask": mask})["pooled"], 8 * np.ones((3, 4)))
    with pytest.raises(ToolchainError) as caught:
        engine.run({"tokens": values[:, :7], "mask": mask[:, :7]})
    assert caught.value.details == ("sequence: only these exact sizes, because input 'mask' has no pad value",)


def test_an_output_without_the_batch_axis_forbids_filling_up() -> None:
    contract = deepcopy(MATRIX_CONTRACT)
    contract["outputs"].append({"name": "mean", "dtype": "float32", "shape": []})
    with pytest.raises(ToolchainError) as caught:
        choose(parse_contract(contract, "c"), [{"batch": 8}], {"batch": 3})
    assert "output 'mean' has no batch axis to cut" in caught.value.details[0]


def test_variants_are_opened_when_needed_or_all_at_once(tmp_path: Path) -> None:
    folder = matrix_engine(tmp_path / "e", [1, 8])
    engine = open_engine(folder, threads=1)
    (folder / "model-8.onnx").write_bytes(b"not a model")
    engine.run({"image": np.ones((1, 4), np.float32)})
    with pytest.raises(ToolchainError, match=r"model-8\.onnx") as caught:
        engine.open_all()
    assert caught.value.code is ExitCode.DAMAGED_BUNDLE
