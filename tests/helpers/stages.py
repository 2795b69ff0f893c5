"""Light stages for the tests of the core; worker children import them from here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.runner import Node
from toolchain.stage import StageContext, StageDef, StageResult


@dataclass(frozen=True)
class Text:
    """``words``: what to write.  ``trails``: a file that gets a line per run, if any."""

    words: tuple[str, ...] = ()
    trail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Code:
    """Python to run with ``ctx``; it may set ``facts`` and ``refused``."""

    code: str = ""
    trail: str = ""


def write_text(ctx: StageContext) -> StageResult:
    """Output ``text``: the words, then what the inputs hold, in capitals."""
    note_run(ctx.options.trail)
    time.sleep(ctx.options.seconds)
    parts = [*ctx.options.words]
    for name, folder in sorted(ctx.inputs.items()):
        parts.append(f"{name}={(folder / 'text.txt').read_text().upper()}")
    text = " ".join(parts)
    (ctx.output("text") / "text.txt").write_text(text)
    return StageResult({"length": len(text)})


def build_model(ctx: StageContext) -> StageResult:
    """Output ``text``: what ``model.py:build`` of the user's repository returns."""
    from toolchain.user_code import load_function

    note_run(ctx.options.trail)
    value = load_function("model.py:build", ctx.root).call()
    (ctx.output("text") / "text.txt").write_text(str(value))
    return StageResult({"value": value})


def run_code(ctx: StageContext) -> StageResult:
    note_run(ctx.options.trail)
    names: dict[str, Any] = {"ctx": ctx, "facts": {}, "refused": ""}
    exec(ctx.options.code, names)
    return StageResult(names["facts"], names["refused"])


def note_run(trail: str) -> None:
    """Append a line at once: pid and time.  Opened by number, as nothing of the user's."""
    if trail:
        descriptor = os.open(trail, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{os.getpid()} {time.monotonic()}\n".encode())
        os.close(descriptor)


def runs(trail: Path) -> int:
    """How often stages with this trail ran."""
    return len(trail.read_text().splitlines()) if trail.exists() else 0


def stage(name: str, options: type, *, version: int = 1, user_code: bool = False, exclusive: bool = False) -> StageDef:
    function = {"text": "write_text", "model": "build_model", "code": "run_code"}[name]
    return StageDef(
        name=name,
        version=version,
        run=f"helpers.stages:{function}",
        options=options,
        tools=("numpy",),
        worker="onnx",
        user_code=user_code,
        exclusive=exclusive,
    )


TEXT = stage("text", Text)
MODEL = stage("model", Text, user_code=True)
CODE = stage("code", Code)
USER_CODE = stage("code", Code, user_code=True)
ALONE = stage("text", Text, exclusive=True)


def text_node(id: str, *words: str, trail: Path | None = None, seconds: float = 0.0, **inputs: str) -> Node:
    """A node that writes ``words``; ``inputs``: input name -> id of another node that writes text."""
    options = Text(words, str(trail) if trail else "", seconds)
    return Node(id, TEXT, options, {name: (source, "text") for name, source in inputs.items()})
