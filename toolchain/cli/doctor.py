"""``toolchain doctor``: what this machine can build, run and measure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from toolchain.cache import default_folder
from toolchain.doctor import Diagnosis, TargetState, examine
from toolchain.errors import ExitCode, ToolchainError


@click.command()
@click.option("--cache", "folder", type=click.Path(path_type=Path), help="Cache folder.  [default: the user's]")
@click.option("--run", "running", is_flag=True, help="Judge by running bundles, not by building them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: Path | None, running: bool, as_json: bool) -> None:
    """Say what this machine can build, run and measure for each shipped target, and what to install for the rest.

    Ends with exit code 40 when something is missing to build for this machine; with --run, when no bundle for it can
    run here: those with engines ahead of time need no runtime, others ONNX Runtime or TVM's.
    """
    found = examine(folder or default_folder())
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(_lines(found)))
    if running:
        if found.cannot_run:
            raise ToolchainError(
                f"bundles for this machine can't run here: {'; '.join(found.cannot_run)}", code=ExitCode.MISSING_TOOL
            )
    elif found.missing:
        raise ToolchainError(
            f"{'' if found.cannot_run else 'this machine can run bundles, not build them; '}"
            f"missing to build for this machine: {', '.join(tool.name for tool in found.missing)}",
            hint="; ".join(dict.fromkeys(tool.install for tool in found.missing))
            + ("" if found.cannot_run else "; or, if it shall only run bundles: toolchain doctor --run"),
            code=ExitCode.MISSING_TOOL,
        )


def _lines(found: Diagnosis) -> Iterator[str]:
    yield from _machine(found)
    for kind, title in (("library", "libraries"), ("program", "programs")):
        yield from ("", title)
        rows = [(t.name, t.found if t.ok else t.problem.upper(), t.purpose) for t in found.tools if t.kind == kind]
        yield from _table(rows)
    yield from ("", "targets")
    heads = ("", "build: onnxruntime", "build: tvm", "run here", "measure here")
    yield from _table([heads, *(_target(state) for state in found.targets)])
    reasons: dict[str, list[str]] = {}
    for state in found.targets:
        for reason in _reasons(state):
            reasons.setdefault(reason, []).append(state.name)
    if reasons:
        yield from ("", "why not")
        for reason, names in reasons.items():
            yield f"  {'every target' if len(names) == len(found.targets) else ', '.join(names)}: {reason}"
    if found.installs:
        yield from ("", "commands that install the rest", *(f"  {line}" for line in found.installs))
    yield ""
    yield f"to run bundles here: {found.runs}"
    yield f"to build for this machine: {'not everything is there' if found.missing else 'everything is there'}"


def _machine(found: Diagnosis) -> Iterator[str]:
    host, disk = found.host, found.disk
    glibc = f"glibc {host.glibc}" if host.glibc else "not glibc"
    yield f"machine   {host.os} {host.arch}, {host.describe()}, {host.cores} cores, {host.memory_mb} MiB, {glibc}"
    yield f"features  {_features(host.cpu_features)}"
    yield f"cuda      {', '.join(f'{d.name} ({d.arch})' for d in host.cuda) or 'no device'}"
    note = f" ({disk.problem})" if disk.problem else ""
    yield f"cache     {disk.folder}, {disk.free / (1 << 30):.1f} GiB free{note}"


def _features(features: frozenset[str]) -> str:
    """Those of the machine's features that change what a compiled model can use."""
    telling = ("avx2", "fma", "avx512", "avx_vnni", "amx", "asimddp", "i8mm", "asimdhp", "bf16", "sve")
    return " ".join(sorted(name for name in features if name.startswith(telling))) or "none of those that matter here"


def _target(state: TargetState) -> tuple[str, ...]:
    columns = (state.onnxruntime, state.tvm, state.run, state.measure)
    return (state.name, *("no" if reasons else "yes" for reasons in columns))


def _reasons(state: TargetState) -> Iterator[str]:
    # Neither backend without the common libraries; no measurement where it cannot run.
    build = state.tvm or state.onnxruntime
    for reason in build:
        yield f"build: {reason}"
    for reason in dict.fromkeys((*state.run, *state.measure)):
        yield f"{'run' if reason in state.run else 'measure'}: {reason}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
