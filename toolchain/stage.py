"""What a stage is: declared inputs, typed options, outputs and a version.

A stage is one module in ``toolchain/stages`` with a module-level ``STAGE = StageDef(...)``, a frozen
dataclass ``Options`` and a function ``run(ctx)``.  The module must import nothing heavy at its top
level: the build process imports it to plan, and only the worker process calls ``run``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode


def _no_programs(_options: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class StageDef:
    """The static description of a stage.

    Attributes:
        name: e.g. ``"export"``.
        version: raised whenever the same inputs and options would give another result.
        run: ``"package.module:function"`` called in a worker with a :class:`StageContext`.
        options: the frozen dataclass of its options.
        tools: distributions whose versions are part of the key, e.g. ``("torch", "onnx")``.
        worker: which preloaded worker runs it: ``"torch"``, ``"onnx"``, ``"tvm"``, or ``"graph"`` where either of the
            first two will do.
        user_code: whether it runs the repository's own Python; then imported files, opened files and
            listed folders are traced and become part of what is checked before a cached result is used.
        exclusive: whether it must run alone (a measurement).
        programs: the programs on PATH that it calls with given options, e.g. ``("cc", "ld")``; their versions
            are part of the key.
    """

    name: str
    version: int
    run: str
    options: type
    tools: tuple[str, ...]
    worker: str
    user_code: bool = False
    exclusive: bool = False
    programs: Callable[[Any], tuple[str, ...]] = _no_programs


@dataclass(frozen=True, slots=True)
class StageContext:
    """What ``run`` gets.

    Attributes:
        inputs: input name -> folder of that artifact (read-only).
        options: an instance of the stage's ``Options``.
        out: an existing empty folder; output ``NAME`` is the subfolder ``out / NAME``.
        root: root of the user's repository; relative user paths start here.
        dump_ir: folder for ``--dump-ir``, or None.
        outside: the node's ``outside``.
    """

    inputs: Mapping[str, Path]
    options: Any
    out: Path
    root: Path
    dump_ir: Path | None = None
    outside: Mapping[str, str] = field(default_factory=dict)

    def output(self, name: str) -> Path:
        """The folder of output ``name``, created."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True, slots=True)
class StageResult:
    """What ``run`` returns.

    Attributes:
        facts: JSON facts about the result, deterministic for the same key (no times, no paths);
            a measurement's figures are the one exception.
        refused: set when the stage ran properly and concluded that there is nothing to offer
            (e.g. TVM lacks an operator): one line for the report.  Then there are no outputs and
            stages that need them are skipped with this reason.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


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
        outside: what the stage needs to know and its result doesn't depend on, so that it is no part of its key: the
            address of a device (who it is, is in ``extra``).
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
    outside: Mapping[str, str] = field(default_factory=dict)


def options_to_json(options: Any) -> dict[str, Any]:
    """A stage's options as JSON for its key and for the worker."""
    return dataclasses.asdict(options)
