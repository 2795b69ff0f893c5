"""Image files as model inputs; needs Pillow (an optional dependency)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import ImageNote, InputSpec

if TYPE_CHECKING:
    import numpy as np

_MODES = {1: "L", 3: "RGB"}


class ImageMismatchError(Exception):
    """A file is no image, or an image cannot become the input."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where rows, columns and channels are in the input's shape; channels None: there is no such axis."""

    rows: int
    columns: int
    channels: int | None


def image_array(path: Path, spec: InputSpec, batch: Collection[str] = ()) -> np.ndarray:
    """The image at ``path`` as an array for ``spec``: ``[..., C, H, W]``, ``[..., H, W, C]`` or ``[..., H, W]``.

    The image is turned as its EXIF data says, laid on white where transparent, made grey (C = 1) or RGB (C = 3), and
    resized (bilinear) to the input's fixed sizes; an axis with a name keeps the image's size.  Pixels become
    ``((inverted pixel) * scale - mean) / std``; without a note in the contract, floats are from 0 to 1 and integers
    from 0 to 255.  Axes in front have size 1; names in ``batch`` are no rows, columns or channels.

    Raises:
        ImageMismatchError: not an image, or an input that no image fits.
        ToolchainError: MISSING_TOOL, Pillow is not installed.
    """
    import numpy as np

    axes = _find_axes(spec, batch)
    channels = 1 if axes.channels is None else spec.shape[axes.channels]
    rows, columns = spec.shape[axes.rows], spec.shape[axes.columns]
    with _opened(path) as image:
        flat = _flatten(image, _MODES[int(channels or 1)])
        size = (columns if isinstance(columns, int) else flat.width, rows if isinstance(rows, int) else flat.height)
        if flat.size != size:
            flat = flat.resize(size, _bilinear())
        pixels = np.asarray(flat, dtype=np.float64).reshape(size[1], size[0], int(channels or 1))
    values = _scale(pixels, spec)
    if axes.channels is None:
        values = values[:, :, 0]
    elif axes.channels < axes.rows:
        values = values.transpose(2, 0, 1)
    return values[(None,) * (len(spec.shape) - values.ndim)]


def _find_axes(spec: InputSpec, batch: Collection[str]) -> _Axes:
    shape, rank = spec.shape, len(spec.shape)
    if spec.dtype == "bool":
        raise ImageMismatchError("an image cannot become booleans")
    found = None
    if rank >= 3 and shape[-3] in _MODES:
        found = _Axes(rank - 2, rank - 1, rank - 3)
    elif rank >= 3 and shape[-1] in _MODES:
        found = _Axes(rank - 3, rank - 2, rank - 1)
    elif rank in (2, 3):
        found = _Axes(rank - 2, rank - 1, None)
    used = 0 if found is None else (2 if found.channels is None else 3)
    front, image = shape[: rank - used], shape[rank - used :]
    fits = all(size == 1 or isinstance(size, str) for size in front) and not any(size in batch for size in image)
    if found is None or not fits:
        raise ImageMismatchError("an image needs an input [..., C, H, W], [..., H, W, C] or [..., H, W], C 1 or 3")
    return found


def _opened(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ToolchainError(
            "reading images needs Pillow, which is not installed",
            where=str(path),
            hint="pip install pillow",
            code=ExitCode.MISSING_TOOL,
        ) from None
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageMismatchError(f"is not a readable image: {str(error).splitlines()[0]}") from error
    return image


def _bilinear() -> Any:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _flatten(image: Any, mode: str) -> Any:
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits a pixel; Pillow's own conversion would clip at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _scale(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Pixels ``[H, W, C]`` from 0 to 255 as values of the input's dtype."""
    import numpy as np

    note = spec.image or ImageNote()
    is_float = spec.dtype.startswith("float")
    scale = note.scale if note.scale is not None else (1 / 255 if is_float else 1.0)
    values = (255 - pixels if note.invert else pixels) * scale
    for name, figures in (("mean", note.mean), ("std", note.std)):
        if figures and len(figures) not in (1, pixels.shape[2]):
            raise ImageMismatchError(f"the contract has {len(figures)} values of {name} for {pixels.shape[2]} channels")
    values = values - np.array(note.mean) if note.mean else values
    values = values / np.array(note.std) if note.std else values
    if is_float:
        return values.astype(spec.dtype)
    limits = np.iinfo(spec.dtype)
    rounded = np.rint(values)
    if rounded.min() < limits.min or rounded.max() > limits.max:
        raise ImageMismatchError(f"pixels become {rounded.min():g} to {rounded.max():g}, not {spec.dtype}")
    return rounded.astype(spec.dtype)
