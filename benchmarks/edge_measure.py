"""The edge benchmark's figures: bytes, times and memory of processes here, instructions on emulated ARM processors."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_children import Failed
from edge_parts import Engine, Parts, folder_bytes, library_in, native_onnxruntime
from helpers.emulated import EmulatedMachine

MORE = 10
"""Inferences more, to tell what one takes."""

RUNTIME_FILES = ("libtoolchain_runtime.so", "bundle-run")


def sizes_of(parts: Parts, engine: Engine) -> dict[str, Any]:
    """Bytes of a bundle and what is in it, and of ONNX Runtime's library and its model."""
    from toolchain.target import load_target

    runner = parts.runner(engine.profile)
    arch = load_target(engine.profile).arch
    library = native_onnxruntime() if arch == platform.machine() else emulated_onnxruntime("cortex-a53")
    return {
        "model": engine.model.name,
        "precision": engine.precision,
        "profile": engine.profile,
        "runtime_bytes": {name: runner[name].stat().st_size for name in RUNTIME_FILES},
        "engine_bytes": (engine.folder / "model.so").stat().st_size,
        "bundle_bytes": folder_bytes(parts.bundle(engine)),
        "onnxruntime_library_bytes": library.stat().st_size,
        "onnxruntime_bytes": library.stat().st_size + (engine.onnx / "model.onnx").stat().st_size,
    }


def native(parts: Parts, engine: Engine, threads: int, runs: int, rounds: int) -> dict[str, Any]:
    """Both runtimes on this machine, by turns: medians over ``rounds`` processes."""
    bundle, runner = parts.bundle(engine), parts.runner(engine.profile)["bundle-run"]
    ours = [str(runner), "bench", str(bundle), "--threads", str(threads)]
    program = parts.onnxruntime_program(platform.machine())
    library = native_onnxruntime()
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "onnxruntime": []}
    for _ in range(rounds):
        rows["ours"].append(_start_of_ours([*ours, "--warmup", "0", "--runs"]))
        wall, cpu, _ = _timed([str(program), *engine.onnxruntime_arguments(library, threads, 1)])
        rows["onnxruntime"].append({"start_ms": wall, "start_cpu_ms": cpu})
        for name, command in (
            ("ours", [*ours, "--runs", str(runs)]),
            ("onnxruntime", [str(program), *engine.onnxruntime_arguments(library, threads, runs)]),
        ):
            done = _json_of(command)
            rows[name][-1] |= {key: done[key] for key in ("median_ms", "peak_kb")}
    figures = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    bare = _json_of([str(program)])["peak_kb"]
    planned = engine.facts["weight_bytes"] + engine.facts["arena_bytes"]
    above = figures["ours"]["peak_kb"] * 1024 - bare * 1024
    return {
        "model": engine.model.name,
        "precision": engine.precision,
        "threads": threads,
        "bare_kb": bare,
        **engine.facts,
        "peak_ratio": above / planned,
        **figures,
    }


def _start_of_ours(command: list[str]) -> dict[str, float]:
    """From the start of a process to its first result, in milliseconds on the clock and of CPU time.

    ``bundle-run bench`` runs once more after the first time, at least: what that takes is taken off again.
    """
    wall, cpu, done = _timed([*command, "1"])
    _, more_cpu, _ = _timed([*command, str(1 + MORE)])
    return {"start_ms": wall - done["median_ms"], "start_cpu_ms": cpu - (more_cpu - cpu) / MORE}


def _timed(command: list[str]) -> tuple[float, float, Any]:
    """Milliseconds on the clock and of CPU time that a process takes, and what it prints."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _json_of(command)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1e3, cpu * 1e3, done


def _json_of(command: list[str]) -> Any:
    """What a program prints.

    Raises:
        Failed: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def instructions(parts: Parts, engine: Engine, cpu: str, runs: int) -> dict[str, Any]:
    """Instructions of one inference on one thread: of 2N runs less those of N, so that starts cancel out.

    The numbers repeat exactly, so they are kept with what they are of.
    """
    machine = EmulatedMachine(cpu)
    row: dict[str, Any] = {"model": engine.model.name, "precision": engine.precision, "profile": engine.profile}
    program, library = parts.onnxruntime_program("aarch64"), emulated_onnxruntime(cpu)

    def theirs(count: int) -> int:
        # The first run allocates, and in the second one its memory is rearranged.
        return machine.root_instructions([program, *engine.onnxruntime_arguments(library, 1, 2 + count)])

    try:
        mine = engine.folder / f"instructions-{cpu}-{runs}.json"
        row["ours"] = _counted(mine, runs, lambda n: machine.instructions([engine.folder / "probe", str(n)]))
        other = engine.onnx.parent / f"instructions-{cpu}-{runs}-{library.name}.json"
        row["onnxruntime"] = _counted(other, runs, theirs)
    except subprocess.CalledProcessError as error:
        row["failed"] = f"a counted program ended with {error.returncode}: {(error.stderr or '')[-200:]}"
    return row


def _counted(kept: Path, runs: int, count: Callable[[int], int]) -> float:
    if not kept.is_file():
        kept.write_text(json.dumps((count(2 * runs) - count(runs)) / runs))
    return float(json.loads(kept.read_text()))


def emulated_onnxruntime(cpu: str) -> Path:
    """The aarch64 C library in the arm64 root.

    Raises:
        Failed: the wheel has none.
    """
    return library_in(EmulatedMachine(cpu).sysroot() / "site" / "onnxruntime" / "capi")
