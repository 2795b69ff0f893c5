"""Prints the build-time figures: cold, no-op and one-file-changed build of resnet18 for one target, and --help.

CPU seconds are those of the whole process tree, wall seconds the median of the runs where a step repeats.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, "-m", "toolchain.cli.main"]


def timed(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a command and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall


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
        rows = [("cold build, no measuring", *timed(build))]
        rows.append(("no-op build", *median([timed(build) for _ in range(5)])))
        source = repository / "vision" / "resnet.py"
        source.write_text(source.read_text() + "\n# a comment\n")
        rows.append(("one file changed", *timed(build)))
        rows.append(("toolchain --help", *median([timed([*TOOL, "--help"]) for _ in range(5)])))
        print(f"resnet18, fp32 and int8-static, x86-64-v4, {len(os.sched_getaffinity(0))} cores")
        print(f"{'step':26} {'CPU s':>7} {'wall s':>7}")
        for label, cpu, wall in rows:
            print(f"{label:26} {cpu:7.2f} {wall:7.2f}")


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Medians of CPU and wall seconds."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


if __name__ == "__main__":
    main()
