"""The worker child's side of :mod:`toolchain.runner`: runs one stage on a JSON request."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.stage import StageContext, StageResult


def child_main(request: dict[str, Any]) -> dict[str, Any]:
    """Run one stage, traced if it runs user code.

    Args:
        request: ``{"stage", "options_class"}`` (``"module:name"``), ``"options"`` (JSON), ``"inputs"``
            (name -> folder), ``"out"``, ``"root"``, ``"dump_ir"`` (folder or null), ``"trace"`` (bool),
            ``"outside"`` (name -> text; may be absent).

    Returns:
        ``{"facts", "refused", "dependencies"}``, the last as :meth:`toolchain.trace.Recorder.dependencies`.
    """
    # What this process imports is of this package or installed, unless the user's code runs in it.
    sys.dont_write_bytecode = bool(request["trace"])
    module, name = request["options_class"].split(":")
    options_class = getattr(importlib.import_module(module), name)
    context = StageContext(
        inputs={key: Path(value) for key, value in request["inputs"].items()},
        options=rebuild(options_class, request["options"]),
        out=Path(request["out"]),
        root=Path(request["root"]),
        dump_ir=Path(request["dump_ir"]) if request["dump_ir"] else None,
        outside=request.get("outside", {}),
    )
    module, name = request["stage"].split(":")
    function = getattr(importlib.import_module(module), name)
    recorder = None
    if request["trace"]:
        from toolchain import source_loader
        from toolchain.trace import Recorder

        source_loader.install()
        compiled = _keep_compiled_code(context.out.with_name("inductor"))
        recorder = Recorder(context.root, [context.out, compiled, *context.inputs.values()])
    else:
        # The user's own code keeps its TMPDIR: what it puts there may need short paths (sockets) or last longer.
        _keep_temporary_files(context.out.with_name("tmp"))
    result: StageResult = function(context)
    dependencies = recorder.dependencies() if recorder else []
    return {"facts": result.facts, "refused": result.refused, "dependencies": dependencies}


def _keep_temporary_files(folder: Path) -> None:
    """Let temporary files of this process and its children lie beside the output, in what the runner removes.

    This process is killed when the build is interrupted, so nobody else would.
    """
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # it may have been looked up before the fork


def _keep_compiled_code(folder: Path) -> Path:
    """Let PyTorch's compiler cache lie beside the output too; it makes a folder even where nothing is compiled."""
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder)))


def rebuild(cls: Any, data: Any) -> Any:
    """A (nested) frozen dataclass from the JSON that ``dataclasses.asdict`` made of it."""
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        fitting = [a for a in args if _fits(a, data)]
        return rebuild(fitting[0], data) if fitting else data
    if dataclasses.is_dataclass(cls) and isinstance(cls, type) and isinstance(data, dict):
        hints = typing.get_type_hints(cls)
        return cls(**{f.name: rebuild(hints[f.name], data[f.name]) for f in dataclasses.fields(cls)})
    if origin is tuple and isinstance(data, list):
        item_types = args[:1] * len(data) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(rebuild(t, item) for t, item in zip(item_types, data, strict=True))
    if origin is list and isinstance(data, list):
        return [rebuild(args[0], item) for item in data]
    if origin in (dict, Mapping) and args and isinstance(data, dict):
        return {key: rebuild(args[1], value) for key, value in data.items()}
    return data


def _fits(cls: Any, data: Any) -> bool:
    """Whether JSON ``data`` has the form of ``cls``, a member of a union."""
    origin = typing.get_origin(cls) or cls
    if origin in (tuple, list):
        return isinstance(data, list)
    if origin in (dict, Mapping) or dataclasses.is_dataclass(origin):
        return isinstance(data, dict)
    return isinstance(origin, type) and isinstance(data, origin)
