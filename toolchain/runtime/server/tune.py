"""Finds a model's serving settings by measuring: the highest throughput whose 99th percentile holds a limit.

The load is a fixed number of clients, each of which asks again as soon as it is answered.  They live in the server's
process and skip the network, so figures are of queues and workers, and leave out what the front ends cost.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract
from toolchain.runtime.server.api import InferRequest, ServeError
from toolchain.runtime.server.app import run_loop
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.settings import load_settings
from toolchain.storage import storage_errors

if TYPE_CHECKING:
    import numpy as np

_BATCHES = (2, 4, 8, 16, 32, 64)
_DELAYS_US = (200, 1000)
#: A batch size or delay must gain so much to be taken: less is noise, and smaller is simpler.
_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings to measure; the names are those of the settings file."""

    instances: int = 1
    threads: int = 1
    max_batch_size: int = 1
    queue_delay_us: int = 0
    execution: str = "process"

    def text(self) -> str:
        kind = "" if self.execution == "process" else f", {self.execution}"
        return (
            f"{self.instances} instance(s) of {self.threads} thread(s), "
            f"batches up to {self.max_batch_size}, delay {self.queue_delay_us} us{kind}"
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured: requests answered per second, and percentiles of the latency in milliseconds."""

    choice: Choice
    per_second: float
    p50_ms: float
    p99_ms: float

    def text(self) -> str:
        return f"{self.choice.text()}: {self.per_second:.0f}/s, p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms"


@dataclass(slots=True)
class Search:
    """The search for one model.

    Args:
        reference: the bundle.
        p99_ms: the limit.
        concurrency: number of clients.
        say: told each figure.
        seconds: length of each measurement, after a fifth of it as warm-up.
    """

    reference: str
    p99_ms: float
    concurrency: int
    say: Callable[[str], None]
    seconds: float = 1.5
    name: str = ""
    most_rows: int | None = 1
    figures: list[Figure] = field(default_factory=list)

    async def run(self) -> Figure:
        """The best settings.

        Raises:
            ToolchainError: GATE_LATENCY, no setting holds the limit.
        """
        for instances, threads in splits(len(os.sched_getaffinity(0))):
            await self._measure(Choice(instances, threads))
        for start in sorted(self.figures, key=lambda f: -f.per_second)[:2]:
            await self._try_batches(start)
        best = self._best()
        if best is not None and best.choice.max_batch_size > 1:
            for delay in _DELAYS_US:
                await self._measure(_with(best.choice, queue_delay_us=delay))
        best = self._best()
        if best is None:
            nearest = min(self.figures, key=lambda f: f.p99_ms)
            raise ToolchainError(
                f"no settings hold a p99 of {self.p99_ms:g} ms with {self.concurrency} clients; "
                f"the lowest measured: {nearest.text()}",
                where=self.name,
                hint="allow a higher --p99-ms, or fewer clients with --concurrency",
                code=ExitCode.GATE_LATENCY,
            )
        inline = await self._measure(_with(best.choice, instances=1, execution="inline"), listed=False)
        if inline.per_second > best.per_second:
            self.say(f"{self.name}: note: execution = 'inline' is faster, but a crash of the engine ends the server")
        return best

    async def _try_batches(self, start: Figure) -> None:
        """Larger and larger batches, until they no longer gain."""
        before = start
        for rows in _BATCHES:
            if rows > self.concurrency or (self.most_rows is not None and rows > self.most_rows):
                return
            figure = await self._measure(_with(start.choice, max_batch_size=rows))
            if figure.per_second < before.per_second * _GAIN:
                return
            before = figure

    def _best(self) -> Figure | None:
        """The highest throughput under the limit; among nearly equal ones that with the least batching and delay."""
        holding = [f for f in self.figures if f.p99_ms <= self.p99_ms]
        if not holding:
            return None
        most = max(f.per_second for f in holding)
        near = [f for f in holding if f.per_second * _GAIN >= most]
        return min(near, key=lambda f: (f.choice.max_batch_size, f.choice.queue_delay_us, -f.per_second))

    async def _measure(self, choice: Choice, *, listed: bool = True) -> Figure:
        keys = ("instances", "threads", "max_batch_size", "queue_delay_us", "execution")
        settings = load_settings(None, {f"defaults.{key}": getattr(choice, key) for key in keys})
        core = ServingCore(settings)
        try:
            await core.start([self.reference])
            (version,) = core.repository.versions()
            self.name = version.name
            self.most_rows = version.check.max_rows if version.check.batch_axes else 1
            inputs = _inputs(version.placed.contract, version.placed.folder)
            request = InferRequest(self.name, "", inputs)
            await _load(core, request, self.concurrency, self.seconds / 5)
            latencies = await _load(core, request, self.concurrency, self.seconds)
        finally:
            await core.close()
        latencies.sort()
        count = len(latencies)
        figure = Figure(
            choice,
            count / self.seconds,
            latencies[count // 2] * 1e3,
            latencies[min(count - 1, int(count * 0.99))] * 1e3,
        )
        if listed:
            self.figures.append(figure)
        self.say(f"{self.name}: {figure.text()}")
        return figure


def tune_and_write(
    references: Sequence[str], p99_ms: float, concurrency: int, output: Path, say: Callable[[str], None]
) -> None:
    """Measure every model and write the settings file.

    Raises:
        ToolchainError: USAGE, the file exists; GATE_LATENCY, no settings hold the limit; a bundle cannot be loaded.
    """
    if output.exists():
        raise ToolchainError(
            "exists already", where=str(output), hint="name another file with --output", code=ExitCode.USAGE
        )
    logging.getLogger("toolchain.serve").addHandler(logging.NullHandler())
    logging.getLogger("toolchain.serve").propagate = False
    found: dict[str, Figure] = {}

    async def main() -> None:
        for reference in references:
            search = Search(reference, p99_ms, concurrency, say)
            best = await search.run()
            found[search.name] = best

    run_loop(main())
    with storage_errors(output):
        output.write_text(settings_text(found, p99_ms, concurrency))
    for name, best in found.items():
        say(f"{name}: chosen: {best.text()}")
    say(f"written: {output}; serve with: toolchain serve --settings {output} {' '.join(references)}")


def settings_text(found: dict[str, Figure], p99_ms: float, concurrency: int) -> str:
    """The settings file."""
    lines = [
        f"# Measured by toolchain serve --tune with {concurrency} clients under a p99 of {p99_ms:g} ms,",
        f"# on {len(os.sched_getaffinity(0))} processors, without the network.",
        "schema = 1",
    ]
    for name, best in found.items():
        choice = best.choice
        lines += [
            "",
            f"# {best.per_second:.0f} requests/s, p50 {best.p50_ms:.2f} ms, p99 {best.p99_ms:.2f} ms",
            f'[models."{name}"]',
            f"instances = {choice.instances}",
            f"threads = {choice.threads}",
            f"max_batch_size = {choice.max_batch_size}",
            f"queue_delay_us = {choice.queue_delay_us}",
        ]
    return "\n".join(lines) + "\n"


def splits(cores: int) -> list[tuple[int, int]]:
    """Instances and threads that fill the processors, or half of them: the server itself needs some too."""
    powers = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    found = {(1, 1)}
    for instances in powers:
        for share in (cores, cores // 2):
            if share >= instances:
                found.add((instances, max(1, share // instances)))
    return sorted(found)


def _with(choice: Choice, **changes: int | str) -> Choice:
    from dataclasses import replace

    return replace(choice, **changes)  # type: ignore[arg-type]


async def _load(core: ServingCore, request: InferRequest, clients: int, seconds: float) -> list[float]:
    """Latencies in seconds of the requests that were answered.

    Raises:
        ToolchainError: MEASURE, one was not.
    """
    latencies: list[float] = []
    clock = time.perf_counter
    end = clock() + seconds

    async def client() -> None:
        while (started := clock()) < end:
            await core.infer(request)
            latencies.append(clock() - started)
            # With inline execution nothing above gives way to other clients.
            await asyncio.sleep(0)

    try:
        await asyncio.gather(*(client() for _ in range(clients)))
    except ServeError as error:
        raise ToolchainError(f"a request failed: {error.message}", code=ExitCode.MEASURE) from error
    return latencies


def _inputs(contract: Contract, folder: Path) -> dict[str, np.ndarray]:
    """One row of the recorded inputs, or zeros of the least sizes where none were recorded."""
    import numpy as np

    recorded = folder / "selftest.npz"
    arrays: dict[str, np.ndarray] = {}
    if recorded.exists():
        with np.load(io.BytesIO(recorded.read_bytes()), allow_pickle=False) as archive:
            arrays = {k.removeprefix("input:"): archive[k] for k in archive.files if k.startswith("input:")}
    return dict(_one_row(contract, arrays))


def _one_row(contract: Contract, arrays: dict[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    import numpy as np

    for spec in contract.inputs:
        array = arrays.get(spec.name)
        if array is None:
            sizes = [size if isinstance(size, int) else contract.dims[str(size)].min for size in spec.shape]
            array = np.zeros(sizes, spec.dtype)
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and contract.dims[size].batch:
                array = np.ascontiguousarray(np.take(array, range(contract.dims[size].min), axis=axis))
        yield spec.name, array
