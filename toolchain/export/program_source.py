"""Inputs of an exported program (``.pt2``): names, shapes and ranges, compared with the recipe's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.specs import InputSpec, Signature

if TYPE_CHECKING:
    import torch


def call_names(program: torch.export.ExportedProgram) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(positional, keyword) input names, in the order of the program's call.

    Raises:
        ToolchainError: EXPORT when an input is nested or not a tensor.
    """
    import torch

    names = [str(name) for name in program.graph_signature.user_inputs]
    positional, keyword = program.call_spec.in_spec.children()
    nested = any(child.num_children for child in (*positional.children(), *keyword.children()))
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    if nested or not all(isinstance(values.get(name), torch.Tensor) for name in names):
        raise _bad("takes nested inputs or inputs that are not tensors", "", ExitCode.EXPORT)
    count = positional.num_children
    return tuple(names[:count]), tuple(names[count:])


def bind_program(program: torch.export.ExportedProgram, declared: Signature) -> tuple[Signature, tuple[str, ...]]:
    """The signature in use and the names passed by position.

    Without declared inputs the program's own are used, provided that all its shapes are fixed.

    Raises:
        ToolchainError: BAD_RECIPE when names, dtypes, shapes or ranges differ from the program's.
    """
    positional, keyword = call_names(program)
    nodes = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and "val" in n.meta}
    if not declared.inputs:
        specs = [_spec(name, nodes[name]) for name in (*positional, *keyword)]
        return Signature.of(specs, list(declared.dims.values())), positional
    for spec in declared.inputs:
        if spec.name not in nodes:
            known = (*positional, *keyword)
            raise _bad(
                f"the program has no input {spec.name!r}{did_you_mean(spec.name, known)}",
                f"its inputs: {', '.join(known)}",
            )
        _compare(spec, nodes[spec.name], program, declared)
    if missing := [name for name in (*positional, *keyword) if name not in declared.names]:
        raise _bad(f"the program's input {missing[0]!r} is not declared", "declare all inputs, or none")
    return declared, positional


def _spec(name: str, value: Any) -> InputSpec:
    if any(not isinstance(size, int) for size in value.shape):
        raise _bad(
            f"the program's input {name!r} has dynamic dimensions",
            "declare [[model.inputs]] and [model.dims.NAME] to name them and give their ranges",
        )
    return InputSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))


def _compare(spec: InputSpec, value: Any, program: torch.export.ExportedProgram, declared: Signature) -> None:
    dtype = str(value.dtype).removeprefix("torch.")
    shown = f"{dtype}[{','.join(map(str, value.shape))}]"
    if dtype != spec.dtype or len(value.shape) != len(spec.shape):
        raise _bad(f"declared {spec.describe()}; the program takes {shown}", "correct [[model.inputs]]")
    for size, wanted in zip(value.shape, spec.shape, strict=True):
        if isinstance(size, int):
            if size != wanted:
                raise _bad(f"declared {spec.describe()}; the program fixes {size} where {wanted!r} is declared", "")
            continue
        bounds = program.range_constraints.get(size.node.expr)
        if bounds is None:
            continue
        dim = declared.dims[wanted] if isinstance(wanted, str) else None
        low, high = (dim.min, dim.max) if dim else (wanted, wanted)
        # torch writes a lower bound of 2 for dimensions traced from 1 on: the comparison at min decides those.
        if high > bounds.upper or (low < bounds.lower and bounds.lower > 2):
            raise _bad(f"declared {wanted!r} {low} to {high}; the program allows {bounds.lower} to {bounds.upper}", "")


def _bad(what: str, hint: str, code: ExitCode = ExitCode.BAD_RECIPE) -> ToolchainError:
    return ToolchainError(what, where="model.inputs", hint=hint, code=code)
