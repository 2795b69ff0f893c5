"""Prints the edge runtime's sizes, times, memory and instruction counts beside those of ONNX Runtime's C library.

``make bench-edge`` or ``python benchmarks/bench_edge.py [--model NAME]... [--profile NAME]...``: everything in one
run.  Times are of this machine; for ARM profiles there are only instruction counts, from emulated processors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import edge_measure as measure  # noqa: E402
import edge_report as report  # noqa: E402
from cpu_children import Failed  # noqa: E402
from cpu_models import Model, all_models  # noqa: E402
from cpu_report import machine  # noqa: E402
from edge_parts import Engine, Parts  # noqa: E402

ARM = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")
X86 = "x86-64-v3"
NATIVE = "host"
MODELS = ("mobilenet_v2", "resnet18", "digits", "minilm_b1_s16")
PRECISIONS = ("fp32", "int8-static")
PARTS = ("sizes", "native", "instructions")

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring."""
    options = _parser().parse_args(arguments)
    parts, models = Parts(options.work), all_models()
    chosen = [models[name] for name in options.model or MODELS]
    results: Row = {"machine": machine()}
    print(report.heading(results["machine"]), flush=True)
    wanted = options.part or PARTS
    if "sizes" in wanted:
        results["sizes"] = _sizes(parts, chosen[:1], (*(options.profile or ARM), X86))
    if "native" in wanted:
        results["native"] = _native(parts, chosen, options)
    if "instructions" in wanted:
        results["instructions"] = _instructions(parts, chosen, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Figures of the edge runtime.")
    add = parser.add_argument
    add("--model", action="append", choices=list(all_models()), help="sizes are those of the first one")
    add("--profile", action="append", choices=ARM, help=f"ARM profile; default: {', '.join(ARM)}")
    add("--part", action="append", choices=PARTS, help="default: all of them")
    add("--threads", type=int, action="append", help="for the times; default: 1")
    add("--runs", type=int, default=50, help="of a process whose latency is measured")
    add("--rounds", type=int, default=5, help="processes of each runtime, by turns")
    add("--repeat", type=int, default=1, metavar="N", help="instructions are those of 2N runs less those of N")
    add("--work", type=Path, default=None, metavar="DIR", help="folder of what is made once")
    add("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    return parser


def _row(parts: Parts, model: Model, precision: str, profile: str, figures: Callable[[Engine], Row]) -> Row:
    """The figures of one engine, or why there are none."""
    try:
        return figures(parts.engine(model, precision, profile))
    except Failed as failure:
        return {"model": model.name, "precision": precision, "profile": profile, "refused": str(failure)}


def _sizes(parts: Parts, models: list[Model], profiles: tuple[str, ...]) -> list[Row]:
    print(report.sizes_head(), flush=True)
    rows = []
    for model in models:
        for precision in PRECISIONS:
            for profile in profiles:
                row = _row(parts, model, precision, profile, lambda engine: measure.sizes_of(parts, engine))
                rows.append(row)
                print(report.sizes_line(row), flush=True)
    return rows


def _native(parts: Parts, models: list[Model], options: argparse.Namespace) -> list[Row]:
    rows = []
    for threads in options.threads or [1]:
        print(report.native_head(NATIVE, threads), flush=True)
        for model in models:
            for precision in PRECISIONS:
                row = _row(
                    parts, model, precision, NATIVE,
                    lambda engine, n=threads: measure.native(parts, engine, n, options.runs, options.rounds),
                )  # fmt: skip
                rows.append(row)
                print(report.native_line(row), flush=True)
    return rows


def _instructions(parts: Parts, models: list[Model], options: argparse.Namespace) -> list[Row]:
    from toolchain.target import load_target

    print(report.instructions_head(), flush=True)
    rows: list[Row] = []
    for model in models:
        for profile in options.profile or ARM:
            cpu = load_target(profile).execute.qemu_cpu or profile
            fp32: Row | None = None
            for precision in PRECISIONS:
                row = _row(
                    parts, model, precision, profile,
                    lambda engine, name=cpu: measure.instructions(parts, engine, name, options.repeat),
                )  # fmt: skip
                rows.append(row)
                print(report.instructions_line(row, fp32), flush=True)
                fp32 = row
    return rows


if __name__ == "__main__":
    sys.exit(main())
