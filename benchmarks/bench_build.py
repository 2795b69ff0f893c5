"""Prints the build-time figures: cold, no-op and one-file-changed build of resnet18 for one target, and --help.

CPU seconds are those of the whole process tree, wall seconds the median of the runs where a step repeats.
A second table says which stages of the cold build they went to.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, "-m", "toolchain.cli.main"]
CHECKS = ("evaluation", "reference", "selftest", "verify[")
"""Stages that only serve to check the engines."""


def timed(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a command and its children."""
    return timed_output(command)[:2]


def timed_output(command: list[str]) -> tuple[float, float, str]:
    """As :func:`timed`, with the command's standard output."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, done.stdout


def main() -> None:
    """Run the steps and print a table."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        repository = base / "repository"
        (repository / ".git").mkdir(parents=True)
        shutil.copytree(ROOT / "recipes" / "vision", repository / "vision")
        text = (ROOT / "recipes" / "resnet18.toml").read_text()
        # Export, static int8, compile with both backends and pack: the work of one release, unmeasured.
        text += '\n[quantize]\nprecisions = ["fp32", "int8-static"]\n' if "[quantize]" not in text else ""
        (repository / "resnet18.toml").write_text(text)
        build = [*TOOL, "build", str(repository / "resnet18.toml"), "--target", "x86-64-v4", "--no-measure", "--quiet"]
        build += ["--cache", str(base / "cache"), "--output", str(base / "out")]
        cpu, wall, printed = timed_output([*build, "--json"])
        stages: list[dict[str, Any]] = json.loads(printed)["stages"]
        rows = [("cold build, no measuring", cpu, wall)]
        rows.append(("no-op build", *median([timed(build) for _ in range(5)])))
        source = repository / "vision" / "resnet.py"
        source.write_text(source.read_text() + "\n# a comment\n")
        rows.append(("one file changed", *timed(build)))
        rows.append(("toolchain --help", *median([timed([*TOOL, "--help"]) for _ in range(5)])))
        print(f"resnet18, fp32 and int8-static, x86-64-v4, {len(os.sched_getaffinity(0))} cores")
        print(f"{'step':26} {'CPU s':>7} {'wall s':>7}")
        for label, cpu, wall in rows:
            print(f"{label:26} {cpu:7.2f} {wall:7.2f}")
        print_stages(stages, rows[0][1])


def print_stages(stages: list[dict[str, Any]], total: float) -> None:
    """CPU seconds of each stage of the cold build, and of the build with and without the checks of its engines."""
    checks = sum(s["cpu_seconds"] for s in stages if s["id"].startswith(CHECKS))
    rest = total - sum(s["cpu_seconds"] for s in stages)
    print(f"\n{'cold build by stage':46} {'CPU s':>7}")
    for stage in stages:
        if stage["status"] == "ran":
            print(f"{stage['id']:46} {stage['cpu_seconds']:7.2f}")
    print(f"{'imports, planning, keys, packing':46} {rest:7.2f}")
    print(f"{'all':46} {total:7.2f}")
    print(f"{'all but evaluation, reference, selftest, verify':46} {total - checks:6.2f}")


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of CPU and wall seconds."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


if __name__ == "__main__":
    main()
