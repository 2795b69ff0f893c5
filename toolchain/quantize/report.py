"""What became int8 and what did not, and why: the facts of a quantization."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.quantize.calibration import Calibration
from toolchain.quantize.model import open_session
from toolchain.quantize.scheme import INT8_OPS, Scheme
from toolchain.quantize.static import blockers, value_types

if TYPE_CHECKING:
    import onnx

NAMES_LISTED = 20
"""Nodes named per group in the report; the count covers them all."""

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_FLOATS = (1, 10, 11, 16)  # float32, float16, float64, bfloat16


def static_nodes(before: onnx.ModelProto, after: onnx.ModelProto) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the nodes of ``before`` that are int8 in the QDQ model ``after``, and of those folded away.

    int8: every float input comes from a DequantizeLinear and the output goes to QuantizeLinear only (MatMul and
    Gemm may write float).  Folded: a Relu or Clip whose effect the range of its producer's quantizer has.
    """
    nodes = after.graph.node
    dequantized = {o for n in nodes if n.op_type == "DequantizeLinear" for o in n.output}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    outputs = {o.name for o in after.graph.output}
    types = value_types(after)
    integer = set()
    for node in nodes:
        floats = [i for i in node.input if i and (types.get(i, 1) in _FLOATS)]
        # The third input is a bias (quantized to 32 bits) or a parameter such as Clip's limits.
        read = all(i in dequantized for i in (floats if node.op_type == "Concat" else floats[:2])) and bool(floats)
        written = all(
            o not in outputs and readers.get(o) and set(readers[o]) == {"QuantizeLinear"} for o in node.output if o
        )
        if node.op_type in INT8_OPS and read and (written or node.op_type in ("MatMul", "Gemm")):
            integer.add(node.name)
    present = {n.name for n in nodes}
    folded = {n.name for n in before.graph.node if n.name not in present}
    known = {n.name for n in before.graph.node}
    return frozenset(integer & known), frozenset(folded)


def node_facts(
    before: onnx.ModelProto,
    quantized: Collection[str],
    folded: Collection[str],
    reasons: Mapping[str, str],
    candidates: Collection[str],
) -> dict[str, Any]:
    """Counts by operator and the groups of nodes that stayed unquantized, each with its reason.

    Args:
        before: the float model, prepared.
        quantized: names of the nodes that became int8.
        folded: names of the nodes that became part of a quantizer.
        reasons: known reasons by node name; they win over the general ones.
        candidates: operators that have an int8 form at all.
    """
    types = value_types(before)
    counts: dict[str, Counter[str]] = {"quantized": Counter(), "unquantized": Counter(), "folded": Counter()}
    groups: dict[tuple[str, str], list[str]] = {}
    for node in before.graph.node:
        kind = "quantized" if node.name in quantized else "folded" if node.name in folded else "unquantized"
        counts[kind][node.op_type] += 1
        if kind == "unquantized":
            reason = reasons.get(node.name) or _general_reason(node, types, candidates)
            groups.setdefault((node.op_type, reason), []).append(node.name)
    unquantized = [
        {"op": op, "reason": reason, "count": len(names), "nodes": names[:NAMES_LISTED]}
        for (op, reason), names in sorted(groups.items())
    ]
    ignored = sorted(name for name in reasons if name in quantized)
    facts: dict[str, Any] = {kind: dict(sorted(counter.items())) for kind, counter in counts.items()}
    # Neighbours quantize all that such a node reads and writes, so ONNX Runtime runs it in int8 all the same.
    return facts | {"stayed_float": unquantized, "int8_through_neighbours": ignored}


def running_operators(path: Path, activation: str) -> dict[str, int]:
    """Counts of the int8 operators in the graph that ONNX Runtime makes of a model: what really runs in int8."""
    import onnx

    with tempfile.TemporaryDirectory() as temporary:
        optimized = Path(temporary) / "optimized.onnx"
        open_session(path, int8_activations=activation == "s8", optimized=optimized)
        graph = onnx.load(str(optimized), load_external_data=False).graph
    marks = ("QLinear", "QGemm", "QAttention", "Integer", "DynamicQuantize")
    counts = Counter(n.op_type for n in graph.node if any(mark in n.op_type for mark in marks))
    counts.pop("DynamicQuantizeLinear", None)
    return dict(sorted(counts.items()))


def _general_reason(node: onnx.NodeProto, types: Mapping[str, int], candidates: Collection[str]) -> str:
    values = [types.get(name) for name in (*node.input[:1], *node.output[:1])]
    if not any(kind in _FLOATS for kind in values):
        return "it does not compute on floats"
    if node.op_type not in candidates:
        return "the operator has no int8 form here"
    return "its input or output is not quantized"


def static_facts(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    calibration: Calibration,
    scheme: Scheme,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Facts of a static quantization; ``kept`` names the nodes that a sensitivity search kept float."""
    quantized, folded = static_nodes(before, after)
    reasons = blockers(before, calibration)
    reasons |= dict.fromkeys(kept, "kept in float by the sensitivity search")
    reasons |= dict.fromkeys(scheme.exclude, "excluded by the recipe")
    facts: dict[str, Any] = {"scheme": scheme.name, "calibration": calibration.facts()}
    if scheme.method == "percentile":
        facts["calibration"]["percentile"] = scheme.percentile
    return facts | node_facts(before, quantized, folded, reasons, INT8_OPS)


def dynamic_reasons(before: onnx.ModelProto, scheme: Scheme) -> dict[str, str]:
    """Why nodes of operators with a dynamic form stay float, by name; only the reasons that apply if they do."""
    constants = {i.name for i in before.graph.initializer}
    reasons = {
        n.name: "its weights are not constant"
        for n in before.graph.node
        if n.op_type in ("Conv", "MatMul", "Gemm") and n.input[1] not in constants
    }
    return reasons | dict.fromkeys(scheme.exclude, "excluded by the recipe")
