"""Write two held-out digits as PNG files: ``python recipes/digits/write_images.py``.

8x8 pixels, 8-bit grey, ink white on black; ``label-7.png`` shows a 7.  A PNG's value divided by 255 is the
model's input (to within rounding to 8 bits).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data import load
from PIL import Image

FOLDER = Path(__file__).with_name("images")
LABELS = (3, 7)


def main() -> None:
    """The first held-out image of each digit in ``LABELS``, whether the model reads it rightly or not."""
    split = load()
    FOLDER.mkdir(exist_ok=True)
    for label in LABELS:
        first = int(np.flatnonzero(split.held_out_labels == label)[0])
        pixels = np.rint(split.held_out_images[first, 0] * 255).astype(np.uint8)
        path = FOLDER / f"label-{label}.png"
        Image.fromarray(pixels).save(path)
        print(f"{path.name}: image {split.held_out_index[first]} of the data set")


if __name__ == "__main__":
    main()
