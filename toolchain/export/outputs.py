"""Outputs of any nesting as a flat list of named tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean


def named_leaves(result: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of everything in ``result`` but None, in torch's pytree order.

    A single tensor is ``output``; elements of an outer tuple or list are ``output_0``, ``output_1`` ...;
    dict keys and field names are names of their own; deeper levels are joined with ``_``.
    """
    import torch.utils._pytree as pytree

    leaves, _ = pytree.tree_flatten_with_path(result)
    names: list[tuple[str, Any]] = []
    for path, leaf in leaves:
        if leaf is None:
            continue
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        if not parts or parts[0].isdigit():
            parts.insert(0, "output")
        names.append(("_".join(parts), leaf))
    return names


def select(names: Sequence[str], requested: Sequence[str]) -> list[tuple[int, str]]:
    """Which of the model's outputs to keep, and under which names: (index, final name) in order.

    Requested names that are all the model's own select among them; otherwise they rename all outputs in order.

    Raises:
        ToolchainError: BAD_RECIPE when neither is possible, or names repeat.
    """
    wanted = list(requested) or list(names)
    if len(set(wanted)) != len(wanted):
        raise _bad(f"output names repeat: {', '.join(wanted)}", "give model.outputs, each name once")
    own = list(names)
    if set(wanted) <= set(own) and len(set(own)) == len(own):
        return [(own.index(name), name) for name in wanted]
    if known := [name for name in wanted if name in own]:
        wrong = next(name for name in wanted if name not in own)
        raise _bad(
            f"the model has {known[0]!r} but no output {wrong!r}{did_you_mean(wrong, own)}",
            f"its outputs are: {', '.join(own)}",
        )
    if len(wanted) != len(own):
        raise _bad(
            f"{len(wanted)} names for {len(own)} outputs",
            f"the model's outputs are: {', '.join(own)}; name all, or select some of these",
        )
    return list(enumerate(wanted))


def _bad(what: str, hint: str) -> ToolchainError:
    return ToolchainError(what, where="model.outputs", hint=hint, code=ExitCode.BAD_RECIPE)
