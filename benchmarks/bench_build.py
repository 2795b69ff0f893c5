"""Prints the build-time figures: cold, no-op and one-file-changed build of resnet18 for one target, and --help.

CPU seconds are those of the whole process tree, wall seconds the median of the runs where a step repeats.
A second table says which stages of the cold build they went to, with two precisions and with int8-static alone.
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
        repository = base / "two"
        build = prepare(repository, ["fp32", "int8-static"])
        cpu, wall, printed = timed_output([*build, "--json"])
        stages: list[dict[str, Any]] = json.loads(printed)["stages"]
        one_cpu, one_wall, printed = timed_output([*prepare(base / "one", ["int8-static"]), "--json"])
        one_stages: list[dict[str, Any]] = json.loads(printed)["stages"]
        rows = [("cold, fp32 and int8-static", cpu, wall), ("cold, int8-static alone", one_cpu, one_wall)]
        rows.append(("no-op build", *median([timed(build) for _ in range(5)])))
        source = repository / "vision" / "resnet.py"
        source.write_text(source.read_text() + "\n# a comment\n")
        rows.append(("one file changed", *timed(build)))
        rows.append(("toolchain --help", *median([timed([*TOOL, "--help"]) for _ in range(5)])))
        print(f"resnet18, x86-64-v4, no measuring, {len(os.sched_getaffinity(0))} cores")
        print(f"{'step':26} {'CPU s':>7} {'wall s':>7}")
        for label, used, took in rows:
            print(f"{label:26} {used:7.2f} {took:7.2f}")
        print_stages(stages, cpu)
        print_total("two precisions (fp32, int8-static)", stages, cpu)
        print_total("one precision (int8-static)", one_stages, one_cpu)


def prepare(repository: Path, precisions: list[str]) -> list[str]:
    """A repository with the recipe for ``precisions``, and the command for its cold build, unmeasured."""
    (repository / ".git").mkdir(parents=True)
    shutil.copytree(ROOT / "recipes" / "vision", repository / "vision")
    text = (ROOT / "recipes" / "resnet18.toml").read_text()
    if "[quantize]" in text:
        sys.exit("recipes/resnet18.toml has a [quantize] table of its own: the builds timed here would be others")
    recipe = repository / "resnet18.toml"
    recipe.write_text(f"{text}\n[quantize]\nprecisions = {json.dumps(precisions)}\n")
    build = [*TOOL, "build", str(recipe), "--target", "x86-64-v4", "--no-measure", "--quiet"]
    return [*build, "--cache", str(repository / "cache"), "--output", str(repository / "out")]


def checks(stages: list[dict[str, Any]]) -> float:
    """CPU seconds of the stages that only check the engines."""
    return float(sum(s["cpu_seconds"] for s in stages if s["id"].startswith(CHECKS)))


def print_total(label: str, stages: list[dict[str, Any]], total: float) -> None:
    """CPU seconds of a cold build, with and without the checks of its engines."""
    print(f"\nexport + int8 + compile + pack: {label}")
    print(f"{'with the checks':48} {total:7.2f}")
    print(f"{'without evaluation, reference, selftest, verify':48} {total - checks(stages):7.2f}")


def print_stages(stages: list[dict[str, Any]], total: float) -> None:
    """CPU seconds of each stage of the cold build with two precisions."""
    rest = total - sum(s["cpu_seconds"] for s in stages)
    print(f"\n{'cold build of fp32 and int8-static by stage':48} {'CPU s':>7}")
    for stage in stages:
        if stage["status"] == "ran":
            print(f"{stage['id']:48} {stage['cpu_seconds']:7.2f}")
    print(f"{'imports, planning, keys, packing':48} {rest:7.2f}")
    print(f"{'all':48} {total:7.2f}")


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of CPU and wall seconds."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


if __name__ == "__main__":
    main()
