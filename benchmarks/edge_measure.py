"""The edge benchmark's figures: bytes, times and memory of processes here, instructions on emulated ARM processors."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from cpu_children import Failed
from edge_parts import Engine, Parts, folder_bytes, library_in, native_onnxruntime
from helpers.emulated import EmulatedMachine

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
    bundle = parts.bundle(engine)
    ours = [str(parts.runner(engine.profile)["bundle-run"]), "bench", str(bundle), "--threads", str(threads)]
    program = parts.onnxruntime_program(platform.machine())
    program_of_runner = parts.runner(engine.profile)["bundle-run"]
    program_of_runner.chmod(0o755)
    library = native_onnxruntime()
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "onnxruntime": []}
    for _ in range(rounds):
        # One run after the first one: what the process takes but for that one is its start to its first result.
        rows["ours"].append(_started([*ours, "--warmup", "0", "--runs", "1"], later=1))
        theirs = [str(program), *engine.onnxruntime_arguments(library, threads, 1)]
        rows["onnxruntime"].append(_started(theirs, later=0))
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
    return {
        "model": engine.model.name,
        "precision": engine.precision,
        "threads": threads,
        "bare_kb": bare,
        **engine.facts,
        "peak_ratio": (figures["ours"]["peak_kb"] - bare) * 1024 / planned,
        **figures,
    }


def _started(command: list[str], later: int) -> dict[str, float]:
    start = time.perf_counter()
    done = _json_of(command)
    wall = (time.perf_counter() - start) * 1e3
    return {"start_ms": wall - later * done["median_ms"], "load_ms": done["load_ms"], "first_ms": done["first_ms"]}


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
    """Instructions of one inference on one thread: of 2N runs less those of N, so that starts cancel out."""
    machine = EmulatedMachine(cpu)
    row: dict[str, Any] = {"model": engine.model.name, "precision": engine.precision, "profile": engine.profile}
    try:
        counts = [machine.instructions([engine.folder / "probe", str(n)]) for n in (runs, 2 * runs)]
        row["ours"] = (counts[1] - counts[0]) / runs
        row["onnxruntime"] = _onnxruntime_instructions(parts, engine, machine, runs)
    except subprocess.CalledProcessError as error:
        row["failed"] = f"{Path(error.cmd[-2]).name} ended with {error.returncode}: {(error.stderr or '')[-200:]}"
    return row


def _onnxruntime_instructions(parts: Parts, engine: Engine, machine: EmulatedMachine, runs: int) -> float:
    program = parts.onnxruntime_program("aarch64")
    library = emulated_onnxruntime(machine.cpu)
    counts = [
        # The first run allocates, and in the second one its memory is rearranged.
        machine.root_instructions([program, *engine.onnxruntime_arguments(library, 1, 2 + n)])
        for n in (runs, 2 * runs)
    ]
    return (counts[1] - counts[0]) / runs


def emulated_onnxruntime(cpu: str) -> Path:
    """The aarch64 C library in the arm64 root.

    Raises:
        Failed: the wheel has none.
    """
    return library_in(EmulatedMachine(cpu).sysroot() / "site" / "onnxruntime" / "capi")
