"""Text forms of plans and results, shared by several commands."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.report import HEADER, evidence_lines, measured_lines, race_cells

if TYPE_CHECKING:
    from toolchain.build import BuildResult
    from toolchain.bundle.manifest import BundleManifest
    from toolchain.bundle.read import BundleRef
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


def records_lines(forecasts: Iterable[Forecast]) -> list[str]:
    """Which file of tuning records the stages of a plan use, a line for each target."""
    options = [(f.node.target, f.node.options) for f in forecasts]
    used = {(target, o.records_file, len(o.records)) for target, o in options if getattr(o, "records", None)}
    return [f"{target} uses {count} tuning record{'s' * (count > 1)} of {file}" for target, file, count in sorted(used)]


def result_lines(result: BuildResult) -> list[str]:
    """The race of every target, and where the release is."""
    lines: list[str] = []
    for target in result.targets:
        report = target.report
        if target.target in result.kept:
            lines += [f"{report['target']}: {report['chosen'] or 'NO ENGINE'} (kept: its bundle is up to date)", ""]
            continue
        lines.append(f"{report['target']}: {report['chosen'] or 'NO ENGINE'} ({report['reason']})")
        offered = [row for row in report["engines"] if row["state"] != "not offered"]
        lines += ["  " + line for line in columns(HEADER, [race_cells(row) for row in offered])]
        lines += [f"  {line}" for line in evidence_lines(report)]
        lines += [
            f"  {row['engine']} {row['state']}: {row['reason']}"
            for row in report["engines"]
            if row["state"] in ("not offered", "rejected")
        ]
        lines += [f"  {line}" for line in measured_lines(report)]
        if why := report["measured"]["why_not"]:
            lines.append(f"  not measured: {why}")
        lines.append("")
    if result.release:
        state = "unchanged" if result.unchanged else "written"
        lines.append(f"release {shown_path(result.release)} {state}, {result.digest}")
    if result.dropped:
        lines.append(f"no longer in the release: {', '.join(result.dropped)}")
    return lines


def shown_path(path: Path) -> str:
    """A path as a user of this directory would write it: relative to it if inside, else absolute."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def explain_lines(result: BuildResult) -> list[str]:
    """For each engine that TVM made: every loop nest with its rule, tile and expected share of the core's peak."""
    lines: list[str] = []
    for target in result.targets:
        for stage, facts in target.report["stages"].items():
            if not facts.get("kernels"):
                continue
            rows = [
                [k["name"], k["rule"] or "none", k["tile"], "" if k["of_peak"] is None else f"{k['of_peak']:.0%}"]
                for k in facts["kernels"]
            ]
            lines += ["", f"{target.target} {stage}", *columns(("loop nest", "rule", "tile", "of peak"), rows)]
    return lines


def _upper(limit: int | None) -> str:
    return "or more" if limit is None else f"to {limit}"


def _wrapped(name: str, text: str) -> list[str]:
    """``text`` beside ``name`` as :func:`bundle_lines` has it, over several lines if it is long."""
    return textwrap.wrap(text, 110, initial_indent=f"  {name:8} ", subsequent_indent=" " * 11, break_long_words=False)


def _runtime_line(info: BundleManifest) -> str:
    if not info.runtime.distribution:
        return "no run-time: the engine is compiled ahead of time"
    return f"{info.runtime.distribution} {info.runtime.versions} {info.runtime.provider}".rstrip()


def bundle_lines(bundle: BundleRef) -> list[str]:
    """A bundle for a person: what it is, needs, takes, gives, and what is known about it."""
    from toolchain.compare import value_text

    info = bundle.manifest
    evidence = info.evidence
    needs = info.requirements
    machine = f"{needs['os']}, {needs['arch']}"
    lines = [
        f"{info.target.name}  {bundle.digest}",
        f"  engine   {info.engine.precision}/{info.engine.backend} on {info.engine.device}: {'; '.join(info.reasons)}",
        *_wrapped("needs", f"{machine}, {' '.join(needs['cpu_features'])}" if needs["cpu_features"] else machine),
        f"           {_runtime_line(info)}",
    ]
    for kind in ("inputs", "outputs"):
        lines += [f"  {kind:8} {value_text(value)}" for value in info.contract[kind]]
    for name, dim in info.contract["dims"].items():
        lines.append(f"  dim      {name} {dim['min']} {_upper(dim['max'])}")
    for variant in info.engine.variants:
        sizes = ", ".join(f"{name} {size}" for name, size in variant.sizes.items())
        lines.append(f"  variant  {variant.file}, {f'for {sizes}' if sizes else 'for all sizes'}")
    if accuracy := evidence.get("accuracy"):
        lines.append(
            f"  accuracy {accuracy['metric']} {accuracy['value']:.4f}, the original's {accuracy['original']:.4f}"
            f" ({evidence['verified']})"
        )
    about = evidence_lines(json.loads(bundle.read("report.json"))) if "report.json" in bundle.files else []
    lines += [f"  {'evidence' if not number else '':8} {line}" for number, line in enumerate(about)]
    if measured := evidence.get("measured"):
        lines.append(
            f"  latency  median {measured['median_ms']:.3f} ms, p95 {measured['p95_ms']:.3f} ms; "
            f"load {measured['load_ms']:.1f} ms; peak {measured['peak_mb']:.1f} MB"
        )
    else:
        lines.append("  latency  not measured on this target")
    return [*lines, f"  size     {bundle.size / 1e6:.3f} MB in {len(bundle.files)} files"]
