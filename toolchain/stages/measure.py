"""measure: latency, load time and peak memory of all engines of a target, side by side in one run.

Every engine runs in a process of its own (:mod:`toolchain.runtime.probe`); they take turns
(:mod:`toolchain.race`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.race import Racer, race, sample_shapes, write_sample
from toolchain.stage import StageContext, StageDef, StageResult


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
    sample = ctx.output("measurement") / "sample.npz"
    contract = json.loads((ctx.inputs[names[0]] / "contract.json").read_text())
    write_sample(ctx.inputs["evaluation"], contract, options.sizes, sample)
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
        race(probes, options.runs, options.warmup, options.max_seconds)
        for name, probe in probes.items():
            rows[name] = probe.figures()
    host = detect_host()
    facts = {
        "engines": rows,
        "shapes": sample_shapes(sample),
        "threads": options.threads or len(os.sched_getaffinity(0)),
        "host": {"cpu_model": host.cpu_model, "cores": host.cores, "arch": host.arch},
        "unit": {"median_ms": "milliseconds", "peak_mb": "1e6 bytes above the bare interpreter"},
    }
    sample.unlink()
    (ctx.output("measurement") / "measurement.json").write_text(json.dumps(facts, sort_keys=True, indent=1))
    return StageResult(facts)


class Probe(Racer):
    """One engine's process."""

    def __init__(self, engine: Path, sample: Path, options: Options) -> None:
        super().__init__()
        threads = str(options.threads)
        command = [sys.executable, "-m", "toolchain.runtime.probe", str(engine), str(sample), threads, options.provider]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        opened = self._read()
        self.error = str(opened["error"]["what"]) if "error" in opened else ""
        self.opened = opened

    def peak_mb(self, memory: Mapping[str, Any]) -> float:
        return float(memory["peak_mb"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def answer(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

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


STAGE = StageDef(
    name="measure",
    version=1,
    run="toolchain.stages.measure:run",
    options=Options,
    tools=("onnxruntime", "apache-tvm"),
    worker="onnx",
    exclusive=True,
)
