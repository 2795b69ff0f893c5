"""Runs one stage of a plan: from the cache where nothing that matters changed, else in a worker."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import Artifact, digest_bytes, digest_json
from toolchain.cache import Cache, Record, storage_errors
from toolchain.errors import ExitCode, ToolchainError
from toolchain.keys import describe_difference, installed_version, key_components, own_version
from toolchain.stage import Node, options_to_json
from toolchain.storage import ANOTHER_CACHE
from toolchain.worker import ChildEnd, WorkerPool

__all__ = [
    "Lookup",
    "Node",
    "Outcome",
    "Runner",
    "describe_difference",
    "installed_version",
    "key_components",
    "own_version",
]

_LOG_LINES = 200
_LOG_BYTES = 64 << 10
_FULL_BYTES = 64 << 10  # a disk with less than this free is why a write failed
_KILLED_HINT = (
    "is there enough memory? --jobs 1 runs one stage at a time, a smaller calibration or batch needs less; "
    "run again with --debug for the child's output"
)
_NO_SPACE = re.compile("no space left|not enough (free )?space", re.IGNORECASE)
_CHANGED = "changed while the stage ran"


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

    def run(
        self, node: Node, inputs: Mapping[str, Artifact], running: Callable[[Node], None] = lambda _: None
    ) -> Outcome:
        """Run ``node``, or take its result from the cache.

        Args:
            node: the stage.
            inputs: its inputs' artifacts by name.
            running: called when the cache does not hold the result, before the stage is run.

        Raises:
            ToolchainError: the stage failed.
        """
        found = self.look_up(node, inputs)
        if found.record is None or self._wants_dump(node):
            with self.cache.lock(found.key, lambda: self.pool.closed):
                # Another build may have made it while this one waited for the lock.
                found = self.look_up(node, inputs)
                if found.record is None or self._wants_dump(node):
                    running(node)
                    return self._execute(node, inputs, found)
        assert found.record is not None
        self.cache.used(found.record)
        self.cache.note_last(f"{self.scope}/{node.id}", found.record)
        record = found.record
        return Outcome(node, "cached", record.outputs, record.facts, record.refused, record=record)

    def _wants_dump(self, node: Node) -> bool:
        return self.dump_ir is not None and node.stage.name == "compile_tvm"

    def _execute(self, node: Node, inputs: Mapping[str, Artifact], found: Lookup) -> Outcome:
        started, started_ns = time.monotonic(), time.time_ns()
        with self.cache.scratch() as scratch:
            out, log = scratch / "out", scratch / "log.txt"
            with storage_errors(scratch, ANOTHER_CACHE):
                out.mkdir()
            request = self._request(node, inputs, out)
            end = self.pool.call(node.stage.worker, "toolchain.stage_child:child_main", request, scratch / "reply", log)
            result = self._unwrap(node, end, log)
            folders = [] if result["refused"] else [path for path in sorted(out.iterdir()) if path.is_dir()]
            outputs = {folder.name: self.cache.add(folder.name, folder) for folder in folders}
            dependencies = tuple(
                (kind, name, self._current_since(kind, name, started_ns)) for kind, name in result["dependencies"]
            )
            record = Record(found.key, found.components, dependencies, outputs, result["facts"], result["refused"])
            self.cache.put(record)
            self.cache.note_last(f"{self.scope}/{node.id}", record)
        seconds = time.monotonic() - started
        return Outcome(node, "ran", outputs, record.facts, record.refused, seconds, end.cpu_seconds, record)

    def _request(self, node: Node, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
        return {
            "stage": node.stage.run,
            "options_class": f"{node.stage.options.__module__}:{node.stage.options.__qualname__}",
            "options": options_to_json(node.options),
            "inputs": {name: str(self.cache.path(artifact)) for name, artifact in inputs.items()},
            "out": str(out),
            "root": str(self.root),
            "dump_ir": self._dump_folder(node),
            "trace": node.stage.user_code,
            "outside": dict(node.outside),
        }

    def _dump_folder(self, node: Node) -> str | None:
        if not self._wants_dump(node):
            return None
        assert self.dump_ir is not None
        folder = self.dump_ir / node.target / node.id.split("@")[0].replace("/", "-")
        with storage_errors(folder, "another --dump-ir folder"):
            folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def _unwrap(self, node: Node, end: ChildEnd, log: Path) -> dict[str, Any]:
        tail = _tail(log)
        if end.out_of_space:
            raise _disk_full(node, tail)
        if end.reply is None:
            raise ToolchainError(
                f"the child process was {end.describe()}",
                where=node.id,
                hint=_KILLED_HINT if end.killed else "run again with --debug for its output",
                code=node.failure,
                debug=tail,
            )
        if "error" in end.reply:
            error = ToolchainError.from_json(end.reply["error"])
            error.debug = "\n".join(filter(None, [error.debug, tail]))
            if _is_full(log.parent):
                raise _disk_full(node, error.debug, error.what)
            error.where = error.where or node.id
            raise error
        if "exception" in end.reply:
            # Libraries that write with compiled code tell of a full disk in words of their own.
            debug = "\n".join([end.reply["traceback"], tail])
            full = end.reply.get("errno") in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(end.reply["exception"])
            if full or _is_full(log.parent):
                raise _disk_full(node, debug, end.reply["exception"])
            raise ToolchainError(
                end.reply["exception"],
                where=node.id,
                hint="run again with --debug for the traceback",
                code=node.failure,
                debug=debug,
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
        path = self._path(name)
        try:
            if kind == "file":
                return self.cache.digest(path)
            if kind == "folder":
                entries = sorted(os.fsencode(e) for e in os.listdir(path) if e != "__pycache__")
                return digest_bytes(b"\0".join(entries))
            if kind == "absent":
                return "present" if path.exists() else "absent"
            return installed_version(name)
        except OSError:
            return "gone"

    def _current_since(self, kind: str, name: str, started_ns: int) -> str:
        """As :meth:`_current`; a file edited since ``started_ns`` matches nothing later: which content was read?"""
        if kind == "file":
            with contextlib.suppress(OSError):
                if self._path(name).stat().st_ctime_ns > started_ns:
                    return _CHANGED
        return self._current(kind, name)

    def _path(self, name: str) -> Path:
        return self.root / name.removeprefix("$ROOT/") if name.startswith("$ROOT/") else Path(name)

    def _why_new(self, node: Node, components: dict[str, Any]) -> list[str]:
        last = self.cache.last(f"{self.scope}/{node.id}")
        if last is None:
            return ["it has not run yet"]
        return describe_difference(last.components, components) or ["its cached result is gone"]


def _describe_change(kind: str, name: str, before: str, now: str) -> str:
    shown = name.removeprefix("$ROOT/")
    if kind == "distribution":
        return f"distribution {shown}: {before} -> {now}"
    if kind == "absent":
        return f"file {shown} has appeared"
    if before == _CHANGED:
        return f"{kind} {shown} changed while it was being used"
    if now == "gone":
        return f"{kind} {shown} is gone"
    return f"{kind} {shown} has changed"


def _tail(log: Path) -> str:
    """The last lines of a log of any length."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-_LOG_LINES:])
    except FileNotFoundError:
        return ""


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL_BYTES


def _disk_full(node: Node, debug: str, seen: str = "") -> ToolchainError:
    return ToolchainError(
        "no space left on the disk",
        where=node.id,
        hint=f"free some space or choose {ANOTHER_CACHE}, then run again",
        code=ExitCode.STORAGE,
        details=[seen] if seen else [],
        debug=debug,
    )
