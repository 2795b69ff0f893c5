"""Inputs out of files."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bundle_samples import MATRIX_CONTRACT, TOKENS_CONTRACT
from PIL import Image

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract, parse_contract
from toolchain.runtime.inputs import read_inputs

MATRIX = parse_contract(MATRIX_CONTRACT, "c")
TOKENS = parse_contract(TOKENS_CONTRACT, "c")
IMAGE = np.arange(8, dtype=np.float32).reshape(2, 4)


def image_contract(shape: list[Any], dtype: str = "float32", note: dict[str, Any] | None = None) -> Contract:
    data = deepcopy(MATRIX_CONTRACT)
    data["inputs"] = [{"name": "image", "dtype": dtype, "shape": shape, "image": note}]
    data["dims"] |= {"h": {"min": 1, "max": 99}, "w": {"min": 1, "max": 99}}
    return parse_contract(data, "c")


def refusal(arguments: list[str], contract: Contract = MATRIX) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        read_inputs(arguments, contract)
    assert caught.value.code is ExitCode.BAD_INPUT
    return caught.value


class TestArrays:
    """.npy, .npz and JSON."""

    def test_one_array_is_the_single_input(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", IMAGE)
        np.testing.assert_array_equal(read_inputs([str(tmp_path / "x.npy")], MATRIX)["image"], IMAGE)

    def test_several_inputs_come_by_name_from_one_or_several_files(self, tmp_path: Path) -> None:
        tokens, mask = np.ones((1, 2, 4), np.float32), np.ones((1, 2), np.float32)
        np.savez(tmp_path / "both.npz", tokens=tokens, mask=mask)
        np.savez(tmp_path / "batch.npz", **{"input:tokens": tokens, "input:mask": mask, "label:label": np.ones(1)})
        np.save(tmp_path / "t.npy", tokens)
        (tmp_path / "m.json").write_text("[[1, 1]]")
        for arguments in (["both.npz"], ["batch.npz"], ["tokens=t.npy", "mask=m.json"]):
            located = [f"{a.partition('=')[0]}={tmp_path / a.partition('=')[2]}" if "=" in a else str(tmp_path / a)
                       for a in arguments]  # fmt: skip
            assert set(read_inputs(located, TOKENS)) == {"tokens", "mask"}
        assert "holds one array, but the model has 2 inputs" in refusal([str(tmp_path / "t.npy")], TOKENS).what
        both = str(tmp_path / "both.npz")
        assert "'mask' is given twice" in refusal([both, f"mask={tmp_path / 'm.json'}"], TOKENS).what

    def test_json_takes_the_dtype_of_the_input_without_loss(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"image": [[1, 2, 3, 4.5]]}))
        assert read_inputs([str(path)], MATRIX)["image"].dtype == np.float32
        whole = image_contract(["batch", 2], "uint8")
        for value, message in (
            ([[1.5, 2]], "must hold uint8, got fractions"),
            ([[1, 256]], "must hold uint8 (0 to 255)"),
            ([["a", "b"]], "must hold uint8, got text"),
            ([[1, 2], [3]], "nested lists of equal lengths"),
        ):
            path.write_text(json.dumps({"image": value}))
            assert message in refusal([str(path)], whole).what

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.npy", b"nothing", "is not a numpy array"),
            ("x.npz", b"PK nothing", "is not an archive of numpy arrays"),
            ("x.json", b"{", "is not JSON"),
            ("x.json", b'{"imgae": [1]}', "holds 'imgae', which is no input of the model (did you mean 'image'?)"),
            ("x.csv", b"1,2", "cannot tell what a .csv file holds; allowed are .npy, .npz, .json and images"),
            ("x.png", b"nothing", "is not a readable image"),
        ],
    )
    def test_what_cannot_be_read_names_the_file(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        contract = image_contract(["batch", 1, 8, 8]) if name.endswith("png") else MATRIX
        error = refusal([str(tmp_path / name)], contract)
        assert message in error.what
        assert error.where == str(tmp_path / name)

    def test_missing_files_and_names_are_said(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal([str(tmp_path / "no.npy")]).what
        assert "did you mean 'image'" in refusal(["imgae=x.npy"]).what

    def test_pickled_arrays_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object))
        assert "is not a numpy array of numbers" in refusal([str(tmp_path / "x.npy")]).what


class TestImages:
    """Image files."""

    @pytest.fixture
    def png(self, tmp_path: Path) -> str:
        pixels = np.zeros((4, 6, 3), np.uint8)
        pixels[:, :, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "red.png")
        return str(tmp_path / "red.png")

    def test_layout_size_and_scale_follow_the_input(self, png: str) -> None:
        nchw = read_inputs([png], image_contract(["batch", 3, 8, 8]))["image"]
        assert nchw.shape == (1, 3, 8, 8)
        np.testing.assert_array_equal(nchw[0, :, 0, 0], np.float32([1, 0, 0]))
        nhwc = read_inputs([png], image_contract(["batch", "h", "w", 3], "uint8"))["image"]
        assert (nhwc.shape, nhwc.dtype) == ((1, 4, 6, 3), np.uint8)
        np.testing.assert_array_equal(nhwc[0, 0, 0], [255, 0, 0])
        assert read_inputs([png], image_contract(["h", "w"]))["image"].shape == (4, 6)

    def test_grey_inputs_get_grey_images_on_the_contracts_scale(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "white.png")
        contract = image_contract(["batch", 1, 8, 8], note={"scale": 16 / 255})
        np.testing.assert_allclose(read_inputs([str(tmp_path / "white.png")], contract)["image"], 16)
        inverted = image_contract(["batch", 1, 8, 8], note={"scale": 16 / 255, "invert": True})
        np.testing.assert_allclose(read_inputs([str(tmp_path / "white.png")], inverted)["image"], 0)

    def test_mean_and_std_are_applied_by_channel(self, png: str) -> None:
        note = {"mean": [0.5, 0.0, -1.0], "std": [0.5, 1.0, 2.0]}
        values = read_inputs([png], image_contract(["batch", 3, 4, 6], note=note))["image"]
        np.testing.assert_allclose(values[0, :, 0, 0], [1, 0, 0.5])
        short = image_contract(["batch", 3, 4, 6], note={"mean": [1, 2]})
        assert "2 values of mean for 3 channels" in refusal([png], short).what

    def test_transparency_lies_on_white_and_16_bits_are_kept_in_range(self, tmp_path: Path) -> None:
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
        contract = image_contract(["batch", 1, 4, 4])
        np.testing.assert_allclose(read_inputs([str(tmp_path / "clear.png")], contract)["image"], 1)
        Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
        np.testing.assert_allclose(read_inputs([str(tmp_path / "deep.png")], contract)["image"], 128 / 255, atol=1e-6)

    @pytest.mark.parametrize("shape", [["batch", 7], [2, 1, 8, 8], ["batch", 5, 8, 8]])
    def test_an_input_that_no_image_fits_is_said(self, png: str, shape: list[Any]) -> None:
        assert "an image needs an input" in refusal([png], image_contract(shape)).what
