"""What a stage's result depends on, known before it runs; and what differs between two such lists, in words."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from toolchain.artifact import Artifact, canonical_json, digest_bytes
from toolchain.programs import program_version
from toolchain.stage import Node, options_to_json
from toolchain.version import __version__


def key_components(node: Node, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything known beforehand that can change a stage's result, by name.

    ``toolchain`` covers this package's own sources, so that a development version never meets the
    results of another.
    """
    stage = node.stage
    components = {
        "stage": stage.name,
        "stage version": stage.version,
        "options": options_to_json(node.options),
        "inputs": {name: artifact.digest for name, artifact in sorted(inputs.items())},
        "tools": {"numpy": installed_version("numpy"), **tool_versions(node)},
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
        "toolchain": own_version(),
        "extra": dict(node.extra),
    }
    # As a record gives them back: a tuple is a list there, and must not look like a difference.
    normal: dict[str, Any] = json.loads(canonical_json(components))
    return normal


def tool_versions(node: Node) -> dict[str, str]:
    """Version of every distribution and program that ``node`` uses, by name."""
    stage = node.stage
    distributions = {name: installed_version(name) for name in stage.tools}
    return distributions | {name: program_version(name) for name in stage.programs(node.options)}


_VERSION = re.compile(r"^Version:[ \t]*(\S+)[ \t]*$", re.MULTILINE | re.IGNORECASE)


@cache
def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or ``"not installed"``.

    As :func:`importlib.metadata.version`, which parses all of the metadata: a build asks for a hundred of them.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    headers = (found.read_text("METADATA") or "").partition("\n\n")[0]
    lines = _VERSION.findall(headers)
    return lines[0] if len(lines) == 1 else found.version


@cache
def own_version() -> str:
    """This package's version and a digest of its sources and data (the command line's aside)."""
    folder = Path(__file__).parent
    state = hashlib.sha256()
    for path in sorted(path for kind in ("py", "json", "c", "h") for path in folder.rglob(f"*.{kind}")):
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


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    if text.startswith("sha256:"):
        return text[7:19]
    return text if len(text) <= 60 else text[:57] + "..."
