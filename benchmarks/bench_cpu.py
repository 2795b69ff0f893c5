"""Our engines against ONNX Runtime, PyTorch and OpenVINO on this machine's CPU: time, build time, size, memory.

``make bench-cpu`` prints everything; ``python benchmarks/bench_cpu.py --help`` lists the ways to ask for less.
How times are taken: :mod:`cpu_time`; what is compared: :mod:`cpu_contenders`; on which models: :mod:`cpu_models`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu_report as report
from cpu_children import Failed, Workshop
from cpu_contenders import CONTENDERS, INT8
from cpu_models import Model, all_models

PRECISIONS = ("fp32", "int8", "int8-static", "int8-dynamic")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times our engines beside others on this CPU.")
    add = parser.add_argument
    add("--model", action="append", choices=sorted(all_models()), metavar="NAME", help="repeatable; default: the list")
    add("--precision", action="append", choices=PRECISIONS, help="repeatable; default: fp32 and int8")
    add("--threads", action="append", help="1, all or a number; repeatable; default: 1 and all")
    add("--contenders", default=",".join(CONTENDERS), help="comma-separated, of: " + ", ".join(CONTENDERS))
    add("--rounds", type=int, default=15, help="blocks per contender")
    add("--seconds", type=float, default=40, help="stop adding rounds after this long per model (at least 3 rounds)")
    add("--profile", default="host", help="target profile that we compile for")
    add("--dynamic", action="store_true", help="export with dynamic batch and sequence")
    add("--work", type=Path, default=None, metavar="DIR", help="folder of the models and libraries made once")
    add("--no-speed", action="store_true", help="skip the timing tables")
    add("--no-costs", action="store_true", help="skip build time, code size and peak memory")
    add("--ops", action="append", choices=sorted(all_models()), metavar="NAME", help="only: our kernels by time")
    add("--peak", action="store_true", help="measure the peak of a core, and print fractions of it")
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    return parser.parse_args()


def main() -> int:
    """Measure and print what was asked for."""
    options = arguments()
    workshop = Workshop(options.work, options.profile, options.dynamic)
    models = all_models(options.dynamic)
    results: dict[str, Any] = {"machine": report.machine(), "profile": options.profile, "dynamic": options.dynamic}
    print(report.heading(results))
    precisions = options.precision or ["fp32", "int8"]
    chosen = [models[name] for name in options.model or (name for name in models if not models[name].further)]
    threads = [_threads(text) for text in options.threads or ["1", "all"]]
    if options.peak:
        results["peak"] = workshop.peak()
        print(report.peak(results["peak"]))
    if options.ops:
        _ops(workshop, [models[name] for name in options.ops], precisions[0], threads[0], results)
    else:
        timed = [model for model in chosen if not model.build_only or options.model]
        if not options.no_speed:
            _speed(workshop, timed, precisions, threads, options, results)
        if not options.no_costs:
            _costs(workshop, chosen, precisions, results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _threads(text: str) -> int:
    cores = len(os.sched_getaffinity(0))
    if text == "all":
        return cores
    if not text.isdigit() or not 1 <= int(text) <= cores:
        sys.exit(f"--threads: got {text!r}; allowed: all, or 1 to {cores}")
    return int(text)


def _speed(
    workshop: Workshop,
    models: list[Model],
    precisions: list[str],
    threads: list[int],
    options: argparse.Namespace,
    results: dict[str, Any],
) -> None:
    """One table for each precision and number of threads; the lines appear as they are measured."""
    wanted = options.contenders.split(",")
    if unknown := set(wanted) - set(CONTENDERS):
        sys.exit(f"--contenders: got {', '.join(sorted(unknown))}; allowed: {', '.join(CONTENDERS)}")
    results["speed"] = []
    for precision in precisions:
        for count in dict.fromkeys(threads):
            names = [name for name in wanted if precision == "fp32" or name in INT8]
            table = report.SpeedTable(precision, count, names, results.get("peak", {}))
            print(table.head(), flush=True)
            for model in models:
                line = workshop.time(model, precision, count, names, options.rounds, options.seconds)
                results["speed"].append(line)
                print(table.line(line), flush=True)
            print(table.foot(), flush=True)


def _costs(workshop: Workshop, models: list[Model], precisions: list[str], results: dict[str, Any]) -> None:
    results["costs"] = []
    for precision in precisions:
        print(report.costs_head(precision), flush=True)
        for model in models:
            line = workshop.costs(model, precision)
            results["costs"].append(line)
            print(report.costs_line(line), flush=True)
        print()


def _ops(workshop: Workshop, models: list[Model], precision: str, threads: int, results: dict[str, Any]) -> None:
    results["ops"] = {}
    for model in models:
        try:
            rows = workshop.ops(model, precision, threads)
        except Failed as failure:
            print(f"{model.name} {precision}: {failure}\n")
            continue
        results["ops"][model.name] = rows
        print(report.ops_table(f"{model.name}, {precision}, {threads} thread(s)", rows))


if __name__ == "__main__":
    sys.exit(main())
