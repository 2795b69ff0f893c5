"""measure: latency, load time and peak memory of all engines of a target, side by side in one run.

Every engine runs in a process of its own; the processes take turns in short rounds, so that a machine
that slows down or speeds up does so for all of them.  An engine that is far behind after the first
rounds leaves the race early (its count of runs says so) and still gets its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.stage import StageContext, StageDef, StageResult

_HOPELESS = 5.0  # times the best engine's median: not worth the full number of runs
_LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the measure stage.

    Attributes:
        sizes: named dimension -> size to measure at; others take the size that the sample has.
        runs: latencies to take per engine.
        warmup: runs before them.
        max_seconds: time limit per engine.
        threads: threads per engine, 0 for all cores.
        provider: ONNX Runtime execution provider.
    """

    sizes: dict[str, int]
    runs: int
    warmup: int
    max_seconds: float
    threads: int
    provider: str


def run(ctx: StageContext) -> StageResult:
    """Inputs: ``evaluation`` and one engine per further name; output ``measurement`` (measurement.json).

    Facts: per engine ``median_ms``, ``p95_ms``, ``min_ms``, ``load_ms``, ``first_ms``, ``peak_mb`` (above the
    bare interpreter), ``runs``; and the shapes, threads and host they hold for.
    """
    from toolchain.host import detect_host

    options: Options = ctx.options
    names = sorted(name for name in ctx.inputs if name != "evaluation")
    if not names:
        return StageResult(refused="there is no engine to measure")
    sample = _write_sample(ctx, options)
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        probes = {}
        for name in names:
            probe = Probe(ctx.inputs[name], sample, options)
            stack.callback(probe.close)
            if probe.error:
                rows[name] = {"error": probe.error}
            else:
                probes[name] = probe
        race(probes, options)
        for name, probe in probes.items():
            rows[name] = probe.figures()
    host = detect_host()
    shapes = {key: list(shape) for key, shape in _shapes(sample).items()}
    facts = {
        "engines": rows,
        "shapes": shapes,
        "threads": options.threads or len(os.sched_getaffinity(0)),
        "host": {"cpu_model": host.cpu_model, "cores": host.cores, "arch": host.arch},
        "unit": {"median_ms": "milliseconds", "peak_mb": "1e6 bytes above the bare interpreter"},
    }
    sample.unlink()
    (ctx.output("measurement") / "measurement.json").write_text(json.dumps(facts, sort_keys=True, indent=1))
    return StageResult(facts)


class Probe:
    """One engine's process."""

    def __init__(self, engine: Path, sample: Path, options: Options) -> None:
        threads = str(options.threads)
        command = [sys.executable, "-m", "toolchain.runtime.probe", str(engine), str(sample), threads, options.provider]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.spent = 0.0
        opened = self._read()
        self.error = str(opened["error"]["what"]) if "error" in opened else ""
        self._opened = opened

    def run(self, count: int, keep: bool = True) -> None:
        started = time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(f"run {count}\n")
        self._process.stdin.flush()
        times = self._read()
        self.spent += time.monotonic() - started
        if keep:
            self.times += times

    def figures(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        memory = self._read()
        ordered = sorted(self.times)
        return {
            "median_ms": _quantile(ordered, 0.5),
            "p95_ms": _quantile(ordered, 0.95),
            "min_ms": ordered[0],
            "runs": len(ordered),
            "load_ms": self._opened["load_ms"],
            "first_ms": self._opened["first_ms"],
            "peak_mb": memory["peak_mb"],
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ToolchainError(
                f"the measuring process ended with status {status}",
                hint="run again with --debug for its output",
                code=ExitCode.MEASURE,
            )
        return json.loads(line)


def race(probes: dict[str, Probe], options: Options) -> None:
    """Take turns until each engine has its runs or its time is up."""
    for probe in probes.values():
        probe.run(1, keep=False)
        if probe.spent < options.max_seconds / 4:
            probe.run(max(0, options.warmup - 1), keep=False)
    block = max(1, options.runs // 10)
    active = dict(probes)
    while active:
        for name, probe in list(active.items()):
            probe.run(min(block, options.runs - len(probe.times)))
            best = min(_quantile(sorted(p.times), 0.5) for p in probes.values() if p.times)
            hopeless = len(probe.times) >= _LEAST_RUNS and _quantile(sorted(probe.times), 0.5) > _HOPELESS * best
            late = probe.spent > options.max_seconds and len(probe.times) >= _LEAST_RUNS
            if len(probe.times) >= options.runs or hopeless or late:
                del active[name]


def _quantile(ordered: list[float], share: float) -> float:
    """Nearest-rank quantile of sorted values."""
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def _write_sample(ctx: StageContext, options: Options) -> Path:
    """The first evaluation rows, resized along named dimensions to the sizes asked for, as an .npz."""
    import numpy as np

    from toolchain.data import read_batches

    batch = next(iter(read_batches(ctx.inputs["evaluation"])))
    engine = next(path for name, path in ctx.inputs.items() if name != "evaluation")
    contract = json.loads((engine / "contract.json").read_text())
    inputs = {}
    for spec in contract["inputs"]:
        array = batch.inputs[spec["name"]]
        for axis, size in _wanted(spec["shape"], contract["dims"], options.sizes):
            array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        inputs[spec["name"]] = np.ascontiguousarray(array)
    path = ctx.output("measurement") / "sample.npz"
    np.savez(path, **inputs)  # type: ignore[arg-type]
    return path


def _wanted(shape: list[Any], dims: dict[str, Any], sizes: dict[str, int]) -> Iterator[tuple[int, int]]:
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            size = sizes.get(dim, dims[dim]["min"] if dims[dim].get("batch") else None)
            if size is not None:
                yield axis, size


def _shapes(sample: Path) -> dict[str, tuple[int, ...]]:
    import numpy as np

    with np.load(sample) as file:
        return {name: file[name].shape for name in file.files}


STAGE = StageDef(
    name="measure",
    version=1,
    run="toolchain.stages.measure:run",
    options=Options,
    tools=("onnxruntime", "apache-tvm"),
    worker="onnx",
    exclusive=True,
)
