"""The worker processes of one model version, which are replaced when they die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract
from toolchain.runtime.server.batcher import Batcher, Job
from toolchain.runtime.server.checks import Fit
from toolchain.runtime.server.process_worker import Launch, ProcessWorker
from toolchain.runtime.server.slots import TensorLayout

if TYPE_CHECKING:
    import numpy as np

#: After as many failed starts in a row without a worker left, the model is unavailable (and starting goes on).
GIVE_UP = 5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_WATCH = 1.0
#: Told why no worker is left, and with an empty string when there is one again.
Health = Callable[[str], None]


class ProcessPool:
    """Worker processes.

    Args:
        contract: of the model.
        launch: how a worker starts.
        instances: how many.
        run_timeout: seconds after which a run that has not ended is ended with its process.
        batcher: whose jobs they run.
        health: see :data:`Health`.
    """

    def __init__(
        self,
        contract: Contract,
        launch: Launch,
        instances: int,
        run_timeout: float,
        batcher: Batcher,
        health: Health,
    ) -> None:
        self.inputs = TensorLayout([(spec.dtype, len(spec.shape)) for spec in contract.inputs])
        self.outputs = TensorLayout([(spec.dtype, len(spec.shape)) for spec in contract.outputs])
        self._launch = launch
        self._instances = instances
        self._run_timeout_ns = int(run_timeout * 1e9)
        self._batcher = batcher
        self._health = health
        self.workers: list[ProcessWorker] = []
        self._starting: asyncio.Future[None] | None = None
        self._failures = 0
        self._stopped = False
        self._timers: set[asyncio.TimerHandle] = set()
        self.facts: dict[str, float] = {}

    async def start(self) -> None:
        """Start all workers; the first runs the self-test.

        Raises:
            ToolchainError: what a worker refused to start for, or how its process ended.
        """
        loop = asyncio.get_running_loop()
        self._starting = loop.create_future()
        for index in range(self._instances):
            self._spawn(self._launch if index == 0 else replace(self._launch, selftest=None))
        try:
            await self._starting
        except BaseException:
            await self.stop()
            raise
        self._starting = None
        self._later(_WATCH, self._watch)

    def claim(self) -> ProcessWorker | None:
        """The ready worker with the fewest jobs, if one may be given a job."""
        best = None
        for worker in self.workers:
            if worker.is_ready and worker.room and (best is None or len(worker.jobs) < len(best.jobs)):
                best = worker
        return best

    def run_now(self, inputs: dict[str, np.ndarray], fit: Fit) -> None:
        """Nothing runs here."""
        return

    async def stop(self) -> None:
        """End all workers."""
        self._stopped = True
        for timer in self._timers:
            timer.cancel()
        workers, self.workers = self.workers, []
        await asyncio.gather(*(worker.stop() for worker in workers))

    def ready(self, worker: ProcessWorker, facts: dict[str, float]) -> None:
        if self._starting is None:
            self._health("")
            self._batcher.pump()
            return
        self.facts = facts if facts["selftest_s"] >= self.facts.get("selftest_s", 0) else self.facts
        if not self._starting.done() and all(w.is_ready for w in self.workers):
            self._starting.set_result(None)

    def done(self, job: Job, outputs: list[Any], infer_ns: int) -> None:
        self._failures = 0
        self._batcher.done(job, outputs, infer_ns, owned=False)

    def idle(self) -> None:
        self._batcher.pump()

    def failed(self, job: Job, message: str) -> None:
        self._batcher.failed(job, message)

    def died(self, worker: ProcessWorker, reason: str, refusal: ToolchainError | None) -> None:
        if self._stopped or worker not in self.workers:
            return
        if self._starting is not None:
            if not self._starting.done():
                error = refusal or ToolchainError(f"the engine cannot be started: {reason}", code=ExitCode.INTERNAL)
                self._starting.set_exception(error)
            return
        self.workers.remove(worker)
        self._batcher.statistics.restarts += 1
        pause = 0.0 if self._failures == 0 else min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._failures - 1))
        self._failures += 1
        self._later(pause, self._respawn)
        if not any(w.is_ready for w in self.workers) and self._failures >= GIVE_UP:
            self._health(refusal.what if refusal else reason)
        for position, (_, job) in reversed(list(enumerate(worker.jobs))):
            if worker.reason and position == 0 and len(job.members) == 1:
                job.members[0].crashes += 1  # it ran out of time once; once more would take as long
            self._batcher.crashed(job, f"the engine failed: {reason}", started=position == 0)
        self._batcher.pump()

    def _spawn(self, launch: Launch) -> None:
        self.workers.append(ProcessWorker(self, launch, tuple(self._batcher.axes)))

    def _respawn(self) -> None:
        try:
            self._spawn(replace(self._launch, selftest=None))
        except OSError as error:
            self._failures += 1
            self._health(f"a process cannot be started: {error.strerror}")
            self._later(_LONGEST_PAUSE, self._respawn)

    def _watch(self) -> None:
        now = time.monotonic_ns()
        for worker in self.workers:
            worker.trim()
            if worker.jobs and now - worker.jobs[0][1].started > self._run_timeout_ns:
                seconds = self._run_timeout_ns / 1e9
                worker.kill(f"a run did not end within {seconds:g} s (run_timeout_s), its process was replaced")
        self._later(_WATCH, self._watch)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            if not self._stopped:
                call()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)
