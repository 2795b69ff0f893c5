"""Text forms of plans and results, shared by several commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from toolchain.report import HEADER, race_cells

if TYPE_CHECKING:
    from toolchain.build import BuildResult
    from toolchain.execute import Forecast


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows aligned in columns of text."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def forecast_lines(forecasts: Sequence[Forecast]) -> list[str]:
    """One line per stage of a plan."""
    words = {"cached": "up to date", "run": "would run", "depends": "may run"}
    return columns(
        ("stage", "state", "because"),
        [(f.node.id, words[f.state], "; ".join(f.reasons)) for f in forecasts],
    )


def result_lines(result: BuildResult) -> list[str]:
    """The race of every target, and where the release is."""
    lines: list[str] = []
    for target in result.targets:
        report = target.report
        lines.append(f"{report['target']}: {report['chosen'] or 'NO ENGINE'} ({report['reason']})")
        offered = [row for row in report["engines"] if row["state"] != "not offered"]
        lines += ["  " + line for line in columns(HEADER, [race_cells(row) for row in offered])]
        lines += [
            f"  {row['engine']} {row['state']}: {row['reason']}"
            for row in report["engines"]
            if row["state"] in ("not offered", "rejected")
        ]
        if why := report["measured"]["why_not"]:
            lines.append(f"  not measured: {why}")
        lines.append("")
    if result.release:
        state = "unchanged" if result.unchanged else "written"
        lines.append(f"release {result.release} {state}, {result.digest}")
    return lines
