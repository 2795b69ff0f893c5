"""Runs one stage of a plan: from the cache where nothing that matters changed, else in a worker."""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from toolchain import __version__
from toolchain.artifact import Artifact, digest_bytes, digest_json
from toolchain.cache import Cache, Record
from toolchain.errors import ExitCode, ToolchainError
from toolchain.stage import StageContext, StageDef, StageResult, options_to_json
from toolchain.worker import ChildEnd, WorkerPool

_LOG_LINES = 200


@dataclass(frozen=True, slots=True)
class Node:
    """One stage of a plan.

    Attributes:
        id: unique in the plan, e.g. ``"compile[int8-static/onnxruntime]@x86-64-v4"``.
        inputs: input name -> (node id, output name).
        optional: input names that may be missing because their node refused.
        extra: further facts that can change the result, e.g. the host's processor for a measurement.
        target: the target it belongs to, or "" when it serves all.
        failure: exit code when its child crashes.
        tolerant: a crash or a missing tool costs this node alone: it is reported and the build goes on.
    """

    id: str
    stage: StageDef
    options: Any
    inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    failure: ExitCode = ExitCode.INTERNAL
    tolerant: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a node.

    Attributes:
        status: ``"cached"``, ``"ran"``, ``"skipped"`` (an input is missing) or ``"crashed"``.
        refused: why there are no outputs, in one line; empty otherwise.
        seconds, cpu_seconds: of this run; 0 when cached.
    """

    node: Node
    status: str
    outputs: Mapping[str, Artifact]
    facts: Mapping[str, Any]
    refused: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """The answer to "would this node run?": the record to reuse, or the reasons why none serves."""

    record: Record | None
    components: dict[str, Any]
    key: str
    reasons: tuple[str, ...] = ()


class Runner:
    """Runs nodes against one cache, for one repository root."""

    def __init__(self, cache: Cache, root: Path, scope: str, dump_ir: Path | None = None) -> None:
        self.cache = cache
        self.root = root
        self.scope = scope
        self.dump_ir = dump_ir
        self.pool = WorkerPool()

    def look_up(self, node: Node, inputs: Mapping[str, Artifact]) -> Lookup:
        """Find a cached result of ``node`` that is still right, or say why there is none."""
        components = key_components(node, inputs)
        key = digest_json(components)
        reasons: list[str] = []
        for record in self.cache.records(key):
            stale = self._stale(record)
            if not stale and all(self.cache.has(a) for a in record.outputs.values()):
                return Lookup(record, components, key)
            if not reasons:
                reasons = stale or ["its cached result is damaged or gone"]
        if not reasons:
            reasons = self._why_new(node, components)
        return Lookup(None, components, key, tuple(reasons))

    def run(self, node: Node, inputs: Mapping[str, Artifact]) -> Outcome:
        """Run ``node``, or take its result from the cache.

        Raises:
            ToolchainError: the stage failed.
        """
        found = self.look_up(node, inputs)
        if found.record is None or self._wants_dump(node):
            with self.cache.lock(found.key):
                # Another build may have made it while this one waited for the lock.
                found = self.look_up(node, inputs)
                if found.record is None or self._wants_dump(node):
                    return self._execute(node, inputs, found)
        assert found.record is not None
        self.cache.used(found.record)
        self.cache.note_last(f"{self.scope}/{node.id}", found.record)
        record = found.record
        return Outcome(node, "cached", record.outputs, record.facts, record.refused, record=record)

    def _wants_dump(self, node: Node) -> bool:
        return self.dump_ir is not None and node.stage.name == "compile_tvm"

    def _execute(self, node: Node, inputs: Mapping[str, Artifact], found: Lookup) -> Outcome:
        started = time.monotonic()
        with self.cache.scratch() as scratch:
            out = scratch / "out"
            out.mkdir()
            request = {
                "stage": node.stage.run,
                "options_class": f"{node.stage.options.__module__}:{node.stage.options.__qualname__}",
                "options": options_to_json(node.options),
                "inputs": {name: str(self.cache.path(artifact)) for name, artifact in inputs.items()},
                "out": str(out),
                "root": str(self.root),
                "dump_ir": self._dump_folder(node),
                "trace": node.stage.user_code,
            }
            log = scratch / "log.txt"
            end = self.pool.call(node.stage.worker, "toolchain.runner:child_main", request, scratch / "reply", log)
            result = self._unwrap(node, end, log)
            outputs = {
                folder.name: self.cache.add(folder.name, folder) for folder in sorted(out.iterdir()) if folder.is_dir()
            }
            record = Record(
                found.key,
                found.components,
                tuple((kind, name, self._current(kind, name)) for kind, name in result["dependencies"]),
                outputs,
                result["facts"],
                result["refused"],
            )
            self.cache.put(record)
            self.cache.note_last(f"{self.scope}/{node.id}", record)
        seconds = time.monotonic() - started
        return Outcome(node, "ran", outputs, record.facts, record.refused, seconds, end.cpu_seconds, record)

    def _dump_folder(self, node: Node) -> str | None:
        if not self._wants_dump(node):
            return None
        assert self.dump_ir is not None
        folder = self.dump_ir / node.target / node.id.split("@")[0].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def _unwrap(self, node: Node, end: ChildEnd, log: Path) -> dict[str, Any]:
        text = log.read_text(errors="replace") if log.exists() else ""
        tail = "\n".join(text.splitlines()[-_LOG_LINES:])
        if end.reply is None:
            raise ToolchainError(
                f"the child process was {end.describe()}",
                where=node.id,
                hint="run again with --debug for its output",
                code=node.failure,
                debug=tail,
            )
        if "error" in end.reply:
            error = ToolchainError.from_json(end.reply["error"])
            error.debug = "\n".join(filter(None, [error.debug, tail]))
            error.where = error.where or node.id
            raise error
        if "exception" in end.reply:
            code, hint = node.failure, "run again with --debug for the traceback"
            if end.reply.get("errno") in (errno.ENOSPC, errno.EDQUOT):
                code, hint = ExitCode.STORAGE, "free some space or choose another --cache folder, then run again"
            raise ToolchainError(
                end.reply["exception"], where=node.id, hint=hint, code=code, debug=end.reply["traceback"] + tail
            )
        result: dict[str, Any] = end.reply["result"]
        return result

    # ---- dependencies found while running ----

    def _stale(self, record: Record) -> list[str]:
        changed = []
        for kind, name, digest in record.dependencies:
            now = self._current(kind, name)
            if now != digest:
                changed.append(_describe_change(kind, name, digest, now))
        return changed

    def _current(self, kind: str, name: str) -> str:
        path = self.root / name.removeprefix("$ROOT/") if name.startswith("$ROOT/") else Path(name)
        try:
            if kind == "file":
                return self.cache.digest(path)
            if kind == "folder":
                entries = sorted(e for e in os.listdir(path) if e != "__pycache__")
                return digest_json(entries)
            if kind == "absent":
                return "present" if path.exists() else "absent"
            return installed_version(name)
        except OSError:
            return "gone"

    def _why_new(self, node: Node, components: dict[str, Any]) -> list[str]:
        last = self.cache.last(f"{self.scope}/{node.id}")
        if last is None:
            return ["it has not run yet"]
        return describe_difference(last.components, components) or ["its cached result is gone"]


def child_main(request: dict[str, Any]) -> dict[str, Any]:
    """Runs in the worker's child: one stage, traced if it runs user code."""
    module, name = request["options_class"].split(":")
    options_class = getattr(importlib.import_module(module), name)
    context = StageContext(
        inputs={key: Path(value) for key, value in request["inputs"].items()},
        options=rebuild(options_class, request["options"]),
        out=Path(request["out"]),
        root=Path(request["root"]),
        dump_ir=Path(request["dump_ir"]) if request["dump_ir"] else None,
    )
    module, name = request["stage"].split(":")
    function = getattr(importlib.import_module(module), name)
    recorder = None
    if request["trace"]:
        from toolchain.trace import Recorder

        recorder = Recorder(context.root, [context.out, *context.inputs.values()])
    result: StageResult = function(context)
    dependencies = recorder.dependencies() if recorder else []
    return {"facts": result.facts, "refused": result.refused, "dependencies": dependencies}


def rebuild(cls: Any, data: Any) -> Any:
    """A (nested) frozen dataclass from the JSON that ``dataclasses.asdict`` made of it."""
    import dataclasses
    import types
    import typing

    if data is None:
        return None
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return rebuild(next(a for a in args if a is not type(None)), data)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        hints = typing.get_type_hints(cls)
        return cls(**{f.name: rebuild(hints[f.name], data[f.name]) for f in dataclasses.fields(cls)})
    if origin is tuple:
        item_types = args[:1] * len(data) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(rebuild(t, item) for t, item in zip(item_types, data, strict=True))
    if origin is list:
        return [rebuild(args[0], item) for item in data]
    if origin in (dict, Mapping) and args:
        return {key: rebuild(args[1], value) for key, value in data.items()}
    return data


def key_components(node: Node, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything known beforehand that can change a stage's result, by name.

    ``toolchain`` covers this package's own sources, so that a development version never meets the
    results of another.
    """
    tools = {name: installed_version(name) for name in sorted({*node.stage.tools, "numpy"})}
    return {
        "stage": node.stage.name,
        "stage version": node.stage.version,
        "options": options_to_json(node.options),
        "inputs": {name: artifact.digest for name, artifact in sorted(inputs.items())},
        "tools": tools,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "toolchain": own_version(),
        "extra": dict(node.extra),
    }


@cache
def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or ``"not installed"``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def own_version() -> str:
    """This package's version and a digest of its sources (the command line's aside)."""
    folder = Path(__file__).parent
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("cli/"):
            state.update(f"{name} {digest_bytes(path.read_bytes())}\n".encode())
    return f"{__version__}+{state.hexdigest()[:12]}"


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per component that differs, e.g. ``"option opset: 18 -> 17"``."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            label = {"options": "option", "tools": "tool", "inputs": "input", "extra": "host fact"}.get(name, name)
            for key in sorted({*before, *after}):
                if before.get(key) != after.get(key):
                    lines.append(f"{label} {key}: {_short(before.get(key))} -> {_short(after.get(key))}")
        else:
            lines.append(f"{name}: {_short(before)} -> {_short(after)}")
    return lines


def _describe_change(kind: str, name: str, before: str, now: str) -> str:
    shown = name.removeprefix("$ROOT/")
    if kind == "distribution":
        return f"distribution {shown}: {before} -> {now}"
    if kind == "absent":
        return f"file {shown} has appeared"
    if now == "gone":
        return f"{kind} {shown} is gone"
    return f"{kind} {shown} has changed"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    if text.startswith("sha256:"):
        return text[7:19]
    return text if len(text) <= 60 else text[:57] + "..."


