"""The file of tuning records beside a recipe: for each target the choices that were measured to be better.

A TOML file of one table a target, a line for each loop nest, sorted; written by ``toolchain tune``, committed like
a lock file.  A record serves only the very loop nest that it names, on a machine with those registers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.config_errors import check_schema_version, read_toml, shown
from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.nests import Choice, Nest

SCHEMA = 1

Records = Mapping[Nest, Choice]
"""Choices of one target."""

_WHAT = "file of tuning records"
_HINT = "write it anew with `toolchain tune`, or delete the line"
_HEAD = """\
# Written by `toolchain tune`; commit it.  For each target and loop nest a better tile than the rule's:
# image rows x columns x vectors.  Later builds use it; without it they take the rules' tiles.
"""


def load_records(path: Path) -> dict[str, dict[Nest, Choice]]:
    """Target -> records.

    Raises:
        ToolchainError: BAD_RECIPE: no such file, not TOML, another schema, or a line that names no loop nest or no
            choice that fits one: all of them at once in ``details``.
    """
    raw = read_toml(path, _WHAT, ExitCode.BAD_RECIPE, hint="write it with `toolchain tune`")
    check_schema_version(raw, path, _WHAT, SCHEMA, ExitCode.BAD_RECIPE)
    if raw.get("schema") != SCHEMA or isinstance(raw["schema"], bool):
        got = shown(raw["schema"]) if "schema" in raw else "nothing"
        what = f"schema: got {got}; allowed: {SCHEMA}"
        raise ToolchainError(what, where=str(path), hint="write it with `toolchain tune`", code=ExitCode.BAD_RECIPE)
    tables = {name: value for name, value in raw.items() if name != "schema"}
    problems: list[str] = []
    made: dict[str, dict[Nest, Choice]] = {}
    for target, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"{target}: got {shown(table)}; allowed: a table of records, named by a target")
            continue
        made[target] = {}
        for key, value in table.items():
            nest, choice, problem = parse_record(key, value)
            if nest is None or choice is None:
                problems.append(f"[{target}] {problem}")
            else:
                made[target][nest] = choice
    if problems:
        what = f"{len(problems)} record{'s' * (len(problems) > 1)} can't be used"
        raise ToolchainError(what, where=str(path), details=problems, hint=_HINT, code=ExitCode.BAD_RECIPE)
    return made


def parse_record(key: str, value: Any) -> tuple[Nest | None, Choice | None, str]:
    """The loop nest and its choice, or what is wrong with them, in one line."""
    nest = Nest.parse(key)
    if nest is None:
        return None, None, f"got {key!r}; allowed: a loop nest as `toolchain tune` writes it"
    choice = Choice.parse(value) if isinstance(value, str) else None
    if choice is None:
        return nest, None, f"{key!r}: got {shown(value)}; allowed: '1x6 x 4' or 'winograd 1x6 x 4'"
    if problem := nest.problem(choice):
        return nest, None, f"{key!r}: the choice {str(choice)!r} {problem}"
    return nest, choice, ""


def save_records(path: Path, targets: Mapping[str, Records]) -> None:
    """Writes the file at once or not at all; targets without records are left out."""
    lines = [_HEAD + f"schema = {SCHEMA}"]
    for target, records in sorted(targets.items()):
        if records:
            lines += ["", f"[{json.dumps(target)}]"]
            lines += sorted(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in to_json(records).items())
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ToolchainError(
            f"cannot write the {_WHAT}: {error.strerror}", where=str(path), code=ExitCode.STORAGE
        ) from error


def to_json(records: Records) -> dict[str, str]:
    """Records as text, for a stage's options."""
    return {str(nest): str(choice) for nest, choice in sorted(records.items(), key=lambda item: str(item[0]))}


def from_json(data: Mapping[str, str]) -> dict[Nest, Choice]:
    """What :func:`to_json` made.

    Raises:
        ToolchainError: BAD_RECIPE: a record can't be used.
    """
    made = {}
    for key, value in data.items():
        nest, choice, problem = parse_record(key, value)
        if nest is None or choice is None:
            raise ToolchainError(problem, where=_WHAT, hint=_HINT, code=ExitCode.BAD_RECIPE)
        made[nest] = choice
    return made
