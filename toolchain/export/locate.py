"""Where in the user's model something failed: module name and file:line, from a traceback or a graph node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.user_code import own_file

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("/torch/", "/onnxscript/", "/onnx_ir/", "/onnx/", "/onnxruntime/", "/sympy/")


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def place_of_error(error: BaseException, model: torch.nn.Module | None, root: Path) -> tuple[str, str]:
    """(``"file.py:12"``, ``"encoder.layer.0"``): the innermost line of model code, and the module it belongs to.

    The repository's own files come first; failing that, an installed package's (not torch's own).
    The module's name is "" for the outermost one or when unknown.
    """
    names = {id(child): name for name, child in model.named_modules()} if model is not None else {}
    own, other, module = "", "", ""
    for link in chain(error):
        module, tb = "", link.__traceback__
        while tb is not None:
            frame, line = tb.tb_frame, tb.tb_lineno
            module = names.get(id(frame.f_locals.get("self")), module)
            file = frame.f_code.co_filename
            if shown := own_file(file, root):
                own = f"{shown}:{line}"
            elif "site-packages/" in file and not any(name in file for name in _LIBRARIES):
                other = f"{file.split('site-packages/')[-1]}:{line}"
            tb = tb.tb_next
        if own:
            break
    return own or other, module


def place_of_node(node: Any, root: Path) -> tuple[str, str]:
    """As :func:`place_of_error`, for a node of a traced graph (``torch.fx.Node``)."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(list(stack.values()))), "")
    found = ""
    for file, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""):
        if shown := own_file(file, root):
            found = f"{shown}:{line}"
        elif not found and "site-packages/" in file and not any(name in file for name in _LIBRARIES):
            found = f"{file.split('site-packages/')[-1]}:{line}"
    return found, module
