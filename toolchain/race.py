"""Engines measured side by side: they take turns in short rounds, and what they are measured on.

A machine that slows down or speeds up does so for all of them.  An engine that is far behind after the first rounds
leaves the race early (its count of runs says so) and still gets its figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_HOPELESS = 5.0  # times the best engine's median: not worth the full number of runs
_LEAST_RUNS = 3


class Racer:
    """One engine in its own process, which answers ``run N`` with latencies and ``end`` with its memory.

    A subclass says how the process is asked.

    Attributes:
        times: latencies so far in milliseconds.
        spent: seconds so far.
        opened: what the process said when it had opened the engine: ``load_ms`` and ``first_ms``.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.spent = 0.0
        self.opened: dict[str, Any] = {}

    def answer(self, line: str) -> Any:
        """What the process answers to a line."""
        raise NotImplementedError

    def peak_mb(self, memory: Mapping[str, Any]) -> float:
        """Peak memory in megabytes, from the answer to ``end``."""
        raise NotImplementedError

    def ask(self, count: int) -> list[float]:
        """Run ``count`` times: latencies in milliseconds."""
        times: list[float] = self.answer(f"run {count}")
        return times

    def figures(self) -> dict[str, Any]:
        """The engine's row of the measurement; the process ends."""
        memory = self.answer("end")
        return {
            **self.latencies(),
            "load_ms": self.opened["load_ms"],
            "first_ms": self.opened["first_ms"],
            "peak_mb": self.peak_mb(memory),
        }

    def run(self, count: int, keep: bool = True) -> None:
        """Run ``count`` times, and keep the latencies if asked to."""
        started = time.monotonic()
        times = self.ask(count)
        self.spent += time.monotonic() - started
        if keep:
            self.times += times

    def latencies(self) -> dict[str, Any]:
        """``median_ms``, ``p95_ms``, ``min_ms`` and ``runs`` of what was kept."""
        ordered = sorted(self.times)
        return {
            "median_ms": quantile(ordered, 0.5),
            "p95_ms": quantile(ordered, 0.95),
            "min_ms": ordered[0],
            "runs": len(ordered),
        }


def race(racers: Mapping[str, Racer], runs: int, warmup: int, max_seconds: float) -> None:
    """Take turns until each engine has ``runs`` latencies or its ``max_seconds`` are up."""
    for racer in racers.values():
        racer.run(1, keep=False)
        if warmup > 1 and racer.spent < max_seconds / 4:
            racer.run(warmup - 1, keep=False)
    block = max(1, runs // 10)
    active = dict(racers)
    while active:
        for name, racer in list(active.items()):
            racer.run(min(block, runs - len(racer.times)))
            best = min(quantile(sorted(r.times), 0.5) for r in racers.values() if r.times)
            hopeless = len(racer.times) >= _LEAST_RUNS and quantile(sorted(racer.times), 0.5) > _HOPELESS * best
            late = racer.spent > max_seconds and len(racer.times) >= _LEAST_RUNS
            if len(racer.times) >= runs or hopeless or late:
                del active[name]


def quantile(ordered: list[float], share: float) -> float:
    """Nearest-rank quantile of sorted values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def write_sample(evaluation: Path, contract: Mapping[str, Any], sizes: Mapping[str, int], path: Path) -> None:
    """The first evaluation rows, resized along named dimensions to the sizes asked for, as an .npz.

    Args:
        evaluation: a dataset's folder.
        contract: the content of contract.json.
        sizes: named dimension -> size; others take the size that the data has, rows of a batch the least allowed.
        path: the file to write.
    """
    import numpy as np

    from toolchain.data import read_batches

    batch = next(iter(read_batches(evaluation)))
    inputs = {}
    for spec in contract["inputs"]:
        array = batch.inputs[spec["name"]]
        for axis, size in _wanted(spec["shape"], contract["dims"], sizes):
            array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        inputs[spec["name"]] = np.ascontiguousarray(array)
    np.savez(path, **inputs)  # type: ignore[arg-type]


def _wanted(shape: list[Any], dims: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            size = sizes.get(dim, dims[dim]["min"] if dims[dim].get("batch") else None)
            if size is not None:
                yield axis, size


def sample_shapes(sample: Path) -> dict[str, list[int]]:
    """Input -> shape in a file of :func:`write_sample`."""
    import numpy as np

    with np.load(sample) as file:
        return {name: list(file[name].shape) for name in file.files}
