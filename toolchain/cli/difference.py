"""Differences of two bundles as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.cli.show import columns

_DIGITS = {"accuracy": 4, "cosine": 6, "median (ms)": 3, "p95 (ms)": 3, "load (ms)": 1, "peak memory (MB)": 1}
_RELATIVE = ("median (ms)", "p95 (ms)", "load (ms)", "peak memory (MB)", "size (bytes)")
"""Figures whose change is told in percent."""
_DIGEST = len("sha256:") + 12


def difference_lines(differences: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> list[str]:
    """A table for each target: what differs, old and new value, and by how much."""
    lines: list[str] = []
    for target, changes in differences.items():
        lines.append(f"{target}:" if changes else f"{target}: the same")
        rows = [(name, _shown(name, a), _shown(name, b), _change(name, a, b)) for name, (a, b) in changes.items()]
        lines += [f"  {line}" for line in columns(("", "old", "new", "change"), rows)] if rows else []
    return lines


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "digest":
        return str(value)[:_DIGEST]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{_DIGITS.get(name, 6)}f}" if isinstance(value, float) else str(value)


def _change(name: str, old: Any, new: Any) -> str:
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
        return ""
    if name in _RELATIVE:
        return f"{(new - old) / old:+.1%}" if old else ""
    change = new - old
    if isinstance(change, int):
        return f"{change:+,}"
    text = f"{change:+.{_DIGITS.get(name, 6)}f}"
    return f"{change:+.1e}" if float(text) == 0 else text
