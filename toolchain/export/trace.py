"""A PyTorch module to an ONNX graph: torch.export, then conversion; failures explained with module and line."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.export.locate import chain, place_of_error, place_of_node
from toolchain.export.original import TorchOriginal
from toolchain.export.program_source import call_names
from toolchain.export.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

_CONTROL_FLOW = ("GuardOnDataDependentSymNode", "PendingUnbackedSymbolNotFound", "UserErrorType.DYNAMIC_CONTROL_FLOW")


def to_onnx(original: TorchOriginal, example: Mapping[str, NDArray[Any]], opset: int) -> tuple[ir.Model, list[str]]:
    """The converted graph, and the names under which the original knows its inputs, in the graph's order.

    Args:
        original: the module, bound to its inputs.
        opset: of the result.
        example: inputs to trace with; each dynamic dimension at least 2 where possible.

    Raises:
        ToolchainError: EXPORT; says which module and which line of the user's code, and what to do.
    """
    import torch

    from toolchain.export.lighten import defer_parsing

    program = original.program or _export(original, example)
    if original.program is None:
        keywords = program.call_spec.in_spec.child(1).context
        order = [*original.positional, *keywords]
    else:
        order = [name for names in call_names(program) for name in names]
    defer_parsing()
    try:
        with quiet(), torch.no_grad():
            converted = torch.onnx.export(program, (), dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        raise _conversion_failure(error, program, original) from error
    assert converted is not None
    return converted.model, order


def _export(original: TorchOriginal, example: Mapping[str, NDArray[Any]]) -> torch.export.ExportedProgram:
    import torch

    args, keywords = original.arguments(example)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                original.module, args, keywords, dynamic_shapes=_dynamic_shapes(original, args, keywords), strict=False
            )
    except Exception as error:
        raise _export_failure(error, original) from error


def _dynamic_shapes(original: TorchOriginal, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """torch.export's structure: parameter of forward -> {axis: Dim} for each tensor in it."""
    import torch
    import torch.utils._pytree as pytree

    dims = {
        dim.name: torch.export.Dim(dim.name, min=dim.min, max=dim.max)
        for dim in original.signature.used_dims
        if dim.min < dim.max
    }
    axes = {
        spec.name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims}
        for spec in original.signature.inputs
    }
    names = {id(tensor): name for name, tensor in zip(original.positional, args, strict=True)}
    names |= {id(tensor): name for name, tensor in keywords.items()}
    bound = inspect.signature(original.module.forward).bind(*args, **keywords).arguments
    shapes: dict[str, Any] = pytree.tree_map(lambda tensor: axes[names[id(tensor)]], dict(bound))
    return shapes


def _export_failure(error: Exception, original: TorchOriginal) -> ToolchainError:
    links = list(chain(error))
    text = "\n".join(str(link) for link in links)
    place, module = place_of_error(error, original.module, original.root)
    inside = f" in module {module!r}" if module else ""
    if any(type(link).__name__ in _CONTROL_FLOW for link in links) or "data-dependent" in text:
        what = f"the model{inside} branches on the values of a tensor (data-dependent control flow): not exportable"
        hint = "replace the branch with torch.where or torch.cond, or take the decision outside the model"
    elif violated := re.search(r"Constraints violated \(([^)]*)\)", text):
        what, hint = _constraint(violated.group(1), text, inside, original.module)
        place = place or "model.dims"
    else:
        what = f"the model can't be traced{inside}: {_summary(error)}"
        hint = "rewrite that line with operations on tensors; --debug shows torch's whole message"
    return _failure(what, place, hint)


def _constraint(names: str, text: str, inside: str, model: torch.nn.Module) -> tuple[str, str]:
    import torch

    fixed = re.search(r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", text)
    if fixed:
        name, size = fixed.groups()
        steps = [f"{type(m).__name__} {n!r}" for n, m in model.named_modules() if isinstance(m, torch.nn.RNNBase)]
        if steps and not inside:
            what = f"the dimension {name!r} is declared dynamic, but the model works for {size} only; the cause may be "
            hint = f"if {name!r} is the length it runs along, declare one length and pad to it (the batch may vary)"
            return (
                what + f"{' and '.join(steps)}: torch.export unrolls it step by step, for one length",
                hint + f"; else look for {size} written as a number; or declare {size}",
            )
        return (
            f"the dimension {name!r} is declared dynamic, but the model{inside} works for {size} only",
            f"look for {size} written as a number, e.g. reshape({size}, ...), or int(x.shape[0]); or declare {size}",
        )
    fixes = [line.strip() for line in text.partition("Suggested fixes:")[2].splitlines()[1:4] if "=" in line]
    return (
        f"the declared range of {names} does not hold in the model{inside}"
        + (f"; torch suggests: {'; '.join(dict.fromkeys(fixes))}" if fixes else ""),
        f"change min and max of {names} in [model.dims]",
    )


def _conversion_failure(
    error: Exception, program: torch.export.ExportedProgram, original: TorchOriginal
) -> ToolchainError:
    text = "\n".join(str(link) for link in chain(error))
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    place, module = "", ""
    if name := re.search(r"translating node %(\w+)", text):
        node = _find_node(program, name.group(1), operator.group(1) if operator else "")
        if node is not None:
            place, module = place_of_node(node, original.root)
    inside = f" in module {module!r}" if module else ""
    if operator:
        what = f"the operator {operator.group(1)}{inside} has no ONNX form"
        hint = "replace it with other operations, or move it out of the model into pre- or postprocessing"
    else:
        what = f"the model can't be converted to ONNX{inside}: {_summary(error)}"
        hint = "rewrite that line; --debug shows the exporter's whole message"
    return _failure(what, place, hint)


def _find_node(program: torch.export.ExportedProgram, name: str, operator: str) -> torch.fx.Node | None:
    nodes = list(program.graph.nodes)
    # Conversion decomposes the graph first: a new name is looked up by its operator instead.
    target = operator.replace("aten.", "aten::")
    return next(
        (n for n in nodes if n.name == name),
        next((n for n in nodes if target and target in str(getattr(n.target, "name", lambda: "")())), None),
    )


def _summary(error: Exception) -> str:
    """Type and first telling line of the innermost exception."""
    last = list(chain(error))[-1]
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(last)).splitlines() if line.strip()]
    return f"{type(last).__name__}: {lines[0][:300]}" if lines else type(last).__name__


def _failure(what: str, place: str, hint: str) -> ToolchainError:
    return ToolchainError(
        what, where=place or "model.source", hint=hint, code=ExitCode.EXPORT, debug=traceback.format_exc()
    )
