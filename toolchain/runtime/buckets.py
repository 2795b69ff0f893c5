"""Runs inputs of any allowed size on engines that were compiled for fixed sizes (buckets).

The smallest engine that the inputs fit into is chosen.  A batch dimension (independent rows) is filled up by
repeating the last row, another dimension with the input's ``pad`` value where the contract gives one; what came from
filling is cut off the outputs.  A batch larger than every bucket is run in parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.runtime.contract import Contract, Size, bad_input

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which variant runs, and along which batch dimension the inputs must be split first (empty: none)."""

    variant: int
    split: str = ""


def choose(contract: Contract, variants: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> Choice:
    """The variant for inputs of these sizes.

    Args:
        contract: says which dimensions may be filled up, and how.
        variants: for each engine file, dimension -> size that it was compiled for; a missing one is dynamic.
        sizes: dimension -> size of the inputs at hand.

    Raises:
        ToolchainError: BAD_INPUT, no variant fits.
    """
    fitting = [i for i, fixed in enumerate(variants) if _fits(contract, fixed, sizes, splitting=False)]
    if fitting:
        # The least work; at equal work the first listed.
        return Choice(min(fitting, key=lambda i: _work(variants[i], sizes)))
    splittable = [i for i, fixed in enumerate(variants) if _fits(contract, fixed, sizes, splitting=True)]
    if not splittable:
        raise bad_input(
            f"no engine of this bundle was compiled for {_sizes_text(sizes)}",
            f"it has engines for {'; '.join(_sizes_text(v) for v in variants)}",
            _why_not(contract, variants, sizes),
        )
    best = min(splittable, key=lambda i: _split_order(variants[i], sizes))
    split = next(s for s, fixed in variants[best].items() if sizes.get(s, fixed) > fixed)
    return Choice(best, split)


def can_fill(contract: Contract, symbol: str) -> str:
    """Why dimension ``symbol`` cannot be filled up to a bucket, or an empty string."""
    bearers = [spec for spec in contract.inputs if symbol in spec.shape]
    if contract.dims[symbol].batch:
        lacking = [spec.name for spec in contract.outputs if symbol not in spec.shape]
        return f"output {lacking[0]!r} has no {symbol} axis to cut" if lacking else ""
    unfilled = [spec.name for spec in bearers if spec.pad is None]
    return f"input {unfilled[0]!r} has no pad value" if unfilled else ""


def _fits(contract: Contract, fixed: Mapping[str, int], sizes: Mapping[str, int], *, splitting: bool) -> bool:
    for symbol, size in fixed.items():
        got = sizes.get(symbol, size)
        if got == size:
            continue
        if got == 0 or can_fill(contract, symbol):
            return False
        if got > size and not (splitting and contract.dims[symbol].batch):
            return False
    return True


def _work(fixed: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Elements computed, up to a common factor."""
    return math.prod(fixed.get(symbol, size) for symbol, size in sizes.items())


def _split_order(fixed: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[int, int]:
    """Least work in the dimensions that are not split, then the largest parts."""
    split = {symbol: size for symbol, size in fixed.items() if sizes.get(symbol, size) > size}
    return math.prod(size for symbol, size in fixed.items() if symbol not in split), -math.prod(split.values())


def _why_not(contract: Contract, variants: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> list[str]:
    symbols = sorted({symbol for fixed in variants for symbol in fixed if symbol in sizes})
    reasons = [(symbol, can_fill(contract, symbol)) for symbol in symbols]
    return [f"{symbol}: only these exact sizes, because {reason}" for symbol, reason in reasons if reason]


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in sizes.items()) or "any size"


def fill(contract: Contract, inputs: Arrays, sizes: Mapping[str, int], fixed: Mapping[str, int]) -> Arrays:
    """The inputs filled up from ``sizes`` to ``fixed``."""
    return {
        spec.name: _fill_array(contract, inputs[spec.name], spec.shape, spec.pad, sizes, fixed)
        for spec in contract.inputs
    }


def _fill_array(
    contract: Contract,
    array: np.ndarray,
    shape: tuple[Size, ...],
    pad: float | None,
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
) -> np.ndarray:
    import numpy as np

    for axis, symbol in enumerate(shape):
        if not isinstance(symbol, str) or fixed.get(symbol, sizes[symbol]) == sizes[symbol]:
            continue
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, fixed[symbol] - sizes[symbol])
        if contract.dims[symbol].batch:
            array = np.pad(array, widths, mode="edge")
        else:
            array = np.pad(array, widths, mode="constant", constant_values=array.dtype.type(pad))
    return array


def cut(contract: Contract, outputs: Arrays, sizes: Mapping[str, int], fixed: Mapping[str, int]) -> Arrays:
    """The outputs without what came from filling the inputs up from ``sizes`` to ``fixed``."""
    result = {}
    for spec in contract.outputs:
        kept = tuple(
            slice(sizes[s]) if isinstance(s, str) and fixed.get(s, sizes.get(s, 0)) != sizes.get(s, 0) else slice(None)
            for s in spec.shape
        )
        result[spec.name] = outputs[spec.name][kept]
    return result


def run_in_parts(
    contract: Contract, inputs: Arrays, symbol: str, size: int, step: int, run: Callable[[Arrays], Arrays]
) -> Arrays:
    """Run ``inputs`` in parts of at most ``step`` along batch dimension ``symbol``, and join the outputs."""
    import numpy as np

    parts = []
    for start in range(0, size, step):
        piece = slice(start, min(start + step, size))
        parts.append(run({s.name: _along(inputs[s.name], s.shape, symbol, piece) for s in contract.inputs}))
    return {
        spec.name: np.concatenate([part[spec.name] for part in parts], axis=spec.shape.index(symbol))
        for spec in contract.outputs
    }


def _along(array: np.ndarray, shape: tuple[Size, ...], symbol: str, piece: slice) -> np.ndarray:
    import numpy as np

    if symbol not in shape:
        return array
    return np.ascontiguousarray(array[tuple(piece if s == symbol else slice(None) for s in shape)])
