"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, split once and for all.

Scale: the data set's pixels run from 0 to 16; the model gets them divided by 16, so 0 is paper and 1 is
full ink.  An 8-bit PNG (0..255, white ink on black) gets the same range by division by 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HELD_OUT = 540
SPLIT_SEED = 0
BATCH = 60

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The data set in its two parts.

    Attributes:
        train_images, held_out_images: float32 [n, 1, 8, 8], 0..1.
        train_labels, held_out_labels: int64 [n], 0..9.
        train_index, held_out_index: int64 [n], positions in the data set.
    """

    train_images: Images
    train_labels: Labels
    train_index: Labels
    held_out_images: Images
    held_out_labels: Labels
    held_out_index: Labels


def load() -> Split:
    """1,257 images for training and 540 held out, the same share of each digit in both; always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    return Split(images[train], labels[train], train, images[held_out], labels[held_out], held_out)


def calibration() -> Iterator[dict[str, Images]]:
    """The training images in batches of 60, without labels."""
    images = load().train_images
    for start in range(0, len(images), BATCH):
        yield {"image": images[start : start + BATCH]}


def evaluation() -> Iterator[tuple[dict[str, Images], Labels]]:
    """The held-out images in batches of 60, with their labels."""
    split = load()
    for start in range(0, HELD_OUT, BATCH):
        part = slice(start, start + BATCH)
        yield {"image": split.held_out_images[part]}, split.held_out_labels[part]
