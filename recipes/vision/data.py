"""Seeded images for the two vision recipes: smooth random fields, not photographs.

They serve speed and fidelity; the weights are random too, so there is no accuracy to speak of.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .seeded import batches

CALIBRATION_SEED, EVALUATION_SEED = 1000, 2000


def calibration() -> Iterator[dict[str, NDArray[np.float32]]]:
    """32 images in batches of 4."""
    return batches(32, 4, CALIBRATION_SEED)


def evaluation() -> Iterator[dict[str, NDArray[np.float32]]]:
    """16 other images in batches of 4, without labels."""
    return batches(16, 4, EVALUATION_SEED)
