"""Which layers lose the most when quantized, and how many must stay float for the limits to hold.

The method is the partial quantization of Wu, Judd, Zhang, Isaev, Micikevicius, "Integer Quantization for
Deep Learning Inference: Principles and Empirical Evaluation" (2020, arXiv:2004.09602), section 5.2:
quantize one layer at a time, sort the layers by the harm done, and leave the worst ones unquantized until the
accuracy target is met.  Differences: the harm is the relative error of the outputs on calibration data, which
needs no labels; the number of layers is found by doubling and bisection instead of one by one; and at the
end each kept layer is offered back, least sensitive first, because one layer's harm includes what it shares
with its neighbours.  The ranking is a heuristic: harms of single layers needn't add up (Gluska and Grobman,
"Exploring Neural Networks Quantization via Layer-Wise Quantization Analysis", 2020, arXiv:2012.08420), so
every step of the search is judged by the evaluation itself.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data import read_batches
from toolchain.fidelity import WORST
from toolchain.quantize.calibration import Calibration
from toolchain.quantize.evaluation import Evaluation
from toolchain.quantize.model import run_session, session_of
from toolchain.quantize.scheme import INT8_OPS, PASS_THROUGH_OPS, WEIGHTED_OPS, Scheme
from toolchain.quantize.static import blockers, quantize_static

if TYPE_CHECKING:
    import onnx

MAX_LAYERS = 40
"""Layers ranked one by one; larger models are ranked in this many blocks of consecutive layers."""

MAX_SAMPLES = 32
"""Calibration samples on which layers are ranked."""

MAX_RETURNS = 12
"""Kept layers that are offered back at the end."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A block of nodes that is quantized or kept float as one.

    Attributes:
        name: its first node with weights, else its first node.
        nodes: names of its nodes.
        size: how many layers it counts for: its nodes other than pass-through ones.
        weighted: whether it has a Conv, MatMul or Gemm.
    """

    name: str
    nodes: tuple[str, ...]
    size: int
    weighted: bool


@dataclass(frozen=True, slots=True)
class RankedLayer:
    """A layer and the relative error of the outputs when only it is quantized."""

    layer: Layer
    error: float


@dataclass(frozen=True, slots=True)
class Try:
    """One evaluated choice of layers to keep float."""

    kept: tuple[str, ...]
    layers: int
    evaluation: Evaluation

    def facts(self) -> dict[str, Any]:
        return {"kept": list(self.kept), "layers": self.layers, **self.evaluation.facts()}


@dataclass(frozen=True, slots=True)
class SearchResult:
    """How the search went; ``kept`` is None when no choice within its bounds holds the limits."""

    kept: tuple[RankedLayer, ...] | None
    tries: tuple[Try, ...]


def find_layers(model: onnx.ModelProto, calibration: Calibration, scheme: Scheme) -> tuple[Layer, ...]:
    """The layers of a prepared model that static int8 would quantize, in topological order.

    A pass-through node (Relu, Reshape, MaxPool ...) belongs to the layer that feeds it.
    """
    blocked = {*blockers(model, calibration), *scheme.exclude}
    groups: list[list[Any]] = []
    owner: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type not in INT8_OPS or node.name in blocked:
            continue
        if node.op_type in PASS_THROUGH_OPS:
            group = owner.get(node.input[0])
            if group is None:
                continue  # nothing that is quantized feeds it, so it stays float by itself
        else:
            group = []
            groups.append(group)
        group.append(node)
        owner.update(dict.fromkeys(node.output, group))
    count = min(len(groups), MAX_LAYERS)
    bounds = [len(groups) * i // count for i in range(count + 1)] if count else []
    blocks = [[n for g in groups[a:b] for n in g] for a, b in itertools.pairwise(bounds)]
    return tuple(_layer(block) for block in blocks)


def rank_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    calibration: Calibration,
    scheme: Scheme,
    data: Path,
    seed: int,
) -> tuple[RankedLayer, ...]:
    """The layers, most sensitive first; ties keep their topological order.

    Args:
        model: prepared and calibrated.
        layers: from :func:`find_layers`.
        calibration: the ranges.
        scheme: the scheme.
        data: the calibration ``dataset``; a random choice of its batches, up to :data:`MAX_SAMPLES` samples
            (at least one batch), is kept in memory with the float model's outputs.
        seed: of that choice.
    """
    feeds = list(_subset(data, seed))
    with session_of(model) as session:
        expected = [run_session(session, feed) for feed in feeds]
    ranked = []
    for layer in layers:
        quantized = quantize_static(model, calibration, scheme, only=layer.nodes)
        with session_of(quantized) as session:
            got = [run_session(session, feed) for feed in feeds]
        ranked.append(RankedLayer(layer, _relative_error(got, expected)))
    return tuple(sorted(ranked, key=lambda r: -r.error))


def search(
    ranked: Sequence[RankedLayer],
    evaluate: Callable[[Collection[str]], Evaluation],
    max_float_layers: int | None = None,
) -> SearchResult:
    """The fewest of the most sensitive layers to keep float so that ``evaluate`` misses no limit.

    Doubles the number until the limits hold, bisects between the last two, then offers layers back.  At most
    2 log2(layers) + :data:`MAX_RETURNS` evaluations.

    Args:
        ranked: most sensitive first.
        evaluate: the evaluation of the model with the given nodes kept float.
        max_float_layers: most layers to keep; at least one layer with weights stays quantized in any case.
    """
    tries: list[Try] = []

    def holds(kept: Sequence[RankedLayer]) -> bool:
        evaluation = evaluate([node for r in kept for node in r.layer.nodes])
        tries.append(Try(tuple(r.layer.name for r in kept), sum(r.layer.size for r in kept), evaluation))
        return not evaluation.misses

    most = _most(ranked, max_float_layers)
    low, high = 0, 0
    while high < most:
        low, high = high, min(most, max(1, 2 * high))
        if holds(ranked[:high]):
            break
    else:
        return SearchResult(None, tuple(tries))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    kept = list(ranked[:high])
    # With high == 1 the only layer left to give back is the one that plain int8 failed without.
    for candidate in list(reversed(kept))[:MAX_RETURNS] if high > 1 else ():
        fewer = [r for r in kept if r is not candidate]
        if fewer and fewer != list(ranked[: high - 1]) and holds(fewer):
            kept = fewer
    return SearchResult(tuple(kept), tuple(tries))


def _most(ranked: Sequence[RankedLayer], max_float_layers: int | None) -> int:
    count = layers = 0
    for number, entry in enumerate(ranked, 1):
        layers += entry.layer.size
        left_quantized = any(r.layer.weighted for r in ranked[number:])
        if not left_quantized or (max_float_layers is not None and layers > max_float_layers):
            break
        count = number
    return count


def _layer(nodes: Sequence[Any]) -> Layer:
    weighted = [n.name for n in nodes if n.op_type in WEIGHTED_OPS]
    size = sum(n.op_type not in PASS_THROUGH_OPS for n in nodes)
    return Layer((weighted or [nodes[0].name])[0], tuple(n.name for n in nodes), size, bool(weighted))


def _subset(data: Path, seed: int) -> Iterator[dict[str, Any]]:
    import json

    sizes = json.loads((data / "dataset.json").read_text())["sizes"]
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    samples = 0
    for number in order:
        if chosen and samples + sizes[number] > MAX_SAMPLES:
            continue
        chosen.add(number)
        samples += sizes[number]
    for number, batch in enumerate(read_batches(data)):
        if number in chosen:
            yield batch.inputs


def _relative_error(got: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """The largest over the outputs: root of the squared error over the squared output; share of unequal integers."""
    import numpy as np

    errors = []
    for name in expected[0]:
        error = size = 0.0
        for ours, theirs in zip(got, expected, strict=True):
            a, b = ours[name], theirs[name]
            if b.dtype.kind == "f":
                usable = np.isfinite(b)
                a, b = a[usable].astype(np.float64), b[usable].astype(np.float64)
                error, size = error + float(np.square(a - b).sum()), size + float(np.square(b).sum())
            else:
                error, size = error + float((a != b).sum()), size + b.size
        if not math.isfinite(error):
            errors.append(WORST)
            continue
        value = error / size if size else (WORST if error else 0.0)
        errors.append(math.sqrt(value) if expected[0][name].dtype.kind == "f" and value < WORST else value)
    return max(errors)
