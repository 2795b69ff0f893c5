"""The queue of one model version: merges what can be merged, and hands it to a worker as soon as one is idle.

Everything here runs on the event loop's thread.  A request is in the queue, in a run, or answered; a run that fails
with several requests in it is repeated with each of them alone, so that only the one at fault fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from toolchain.runtime.server import stats
from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.checks import Fit
from toolchain.runtime.server.stats import Statistics
from toolchain.runtime.server.waiting import Pending, Queue, Queueing

if TYPE_CHECKING:
    import numpy as np

_CRASHES = 2
_clock = time.monotonic_ns


class Job:
    """Requests that run together."""

    __slots__ = ("input_ns", "members", "rows", "started")

    def __init__(self, members: list[Pending], started: int) -> None:
        self.members = members
        self.rows = members[0].fit.rows if len(members) == 1 else sum(m.fit.rows for m in members)
        self.started = started
        self.input_ns = 0


class Worker(Protocol):
    """Something that runs one job, now or soon, and then calls the batcher back."""

    def start_job(self, job: Job) -> None: ...


class Workers(Protocol):
    """The workers of a batcher."""

    def claim(self) -> Worker | None:
        """One that may be given a job now."""
        ...

    def run_now(self, inputs: dict[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray] | None:
        """The outputs, in the contract's order, of inputs that run here and now; None where they can't, or fail."""
        ...


class Batcher:
    """See the module.  Set :attr:`workers` before the first request.

    Args:
        queueing: how requests wait.
        axes: the batch axis of each input; empty where requests cannot be merged.
        output_axes: the batch axis of each output.
        statistics: what is counted into.
    """

    def __init__(
        self, queueing: Queueing, axes: Sequence[int], output_axes: Sequence[int], statistics: Statistics
    ) -> None:
        self.queueing = queueing
        self.axes = axes
        self.output_axes = output_axes
        self.statistics = statistics
        self.workers: Workers
        self.running = 0
        self.queue = Queue(queueing.levels, queueing.max_rows if axes else 1)
        self._pumping = False
        self._wake: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None
        self._run_ns = 0.0

    async def infer(self, pending: Pending, timeout_ns: int = 0) -> list[np.ndarray]:
        """The outputs of one request, in the contract's order.

        Raises:
            ServeError: FULL, the queue is; TIMEOUT, it waited too long; INTERNAL, the engine failed on it.
            asyncio.CancelledError: the caller went; the request has left the queue.
        """
        if self.queue.count or self.queueing.delay_ns or (worker := self.workers.claim()) is None:
            self._put(pending)
            self.pump()
        else:
            # Nobody waits and a worker is idle: the queue would only be in the way.
            pending.queued = _clock()
            self.running += 1
            worker.start_job(Job([pending], pending.queued))
        if pending.outputs is None and pending.error is None:
            loop = asyncio.get_running_loop()
            pending.future = loop.create_future()
            timeout_ns = timeout_ns or self.queueing.timeout_ns
            if timeout_ns and pending.group is not None:
                pending.timer = loop.call_later(timeout_ns / 1e9, self._expire, pending)
            try:
                await pending.future
            except asyncio.CancelledError:
                self._cancel(pending)
                raise
            finally:
                if pending.timer is not None:
                    pending.timer.cancel()
        if pending.error is not None:
            try:
                raise pending.error
            finally:
                # The error knows this frame: with the request in it, inputs would wait for the garbage collector.
                del pending
        assert pending.outputs is not None
        return pending.outputs

    def infer_now(self, inputs: dict[str, np.ndarray], fit: Fit, arrived: int) -> dict[str, np.ndarray] | None:
        """The outputs of one request, if nobody waits and it can run before this returns; None: nothing has happened.

        Nor is anything counted for a run that fails: :meth:`infer` runs it again, and says how.
        """
        if self.queue.count or self.queueing.delay_ns:
            return None
        started = _clock()
        outputs = self.workers.run_now(inputs, fit)
        if outputs is None:
            return None
        now = _clock()
        self.statistics.answered_now(fit.rows, now - arrived, now - started)
        self._run_ns += (now - started - self._run_ns) / 16
        return outputs

    def pump(self) -> None:
        """Hand over what waits while there are workers to take it."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self.queue.count and (worker := self.workers.claim()) is not None:
                now = _clock()
                members, left = self.queue.take(now, self.queueing.delay_ns)
                if not members:
                    self._wake = self._wake or asyncio.get_running_loop().call_later(left / 1e9, self._woken)
                    return
                self.running += 1
                worker.start_job(Job(members, now))
        finally:
            self._pumping = False

    def done(self, job: Job, outputs: list[np.ndarray], infer_ns: int, *, owned: bool) -> None:
        """A run has ended well.

        Args:
            job: what was run.
            outputs: in the contract's order, of all members together.
            infer_ns: nanoseconds in the engine.
            owned: whether the arrays are the requests' to keep; else they are copied here.
        """
        started = _clock()
        members, start = job.members, 0
        for member in members:
            if len(members) == 1:
                member.outputs = outputs if owned else [output.copy() for output in outputs]
            else:
                part = slice(start, start + member.fit.rows)
                pairs = zip(outputs, self.output_axes, strict=True)
                member.outputs = [output[(slice(None),) * axis + (part,)].copy() for output, axis in pairs]
                start += member.fit.rows
        now = _clock()
        self._run_ns += (now - job.started - self._run_ns) / 16
        self.statistics.run(job.rows, job.input_ns, infer_ns, now - started)
        for member in members:
            if member.future is None or not member.future.done():
                self._count(member, job, infer_ns, now - started, now)
                _answer(member)
        self._finished()

    def failed(self, job: Job, message: str) -> None:
        """The engine refused a run: find who is at fault by running the members alone."""
        self._again(job, message, crashed=False)

    def crashed(self, job: Job, message: str, *, started: bool) -> None:
        """The process of a run died; ``started``: this run was the one it was at."""
        if started:
            self._again(job, message, crashed=True)
            return
        for member in reversed(job.members):
            if member.future is None or not member.future.done():
                self.queue.enter(member, first=True)
        self._finished()

    def fail_all(self, error: ServeError) -> None:
        """Answer everything that waits with an error."""
        for pending in self.queue.all():
            self.queue.leave(pending)
            self._refuse(pending, error, stats.OTHER)
        self._signal_idle()

    async def drained(self) -> None:
        """Return when nothing waits or runs."""
        while self.queue.count or self.running:
            self._idle = self._idle or asyncio.Event()
            self._idle.clear()
            await self._idle.wait()

    def level(self, priority: int) -> int:
        """The level of a request's priority.

        Raises:
            ServeError: INVALID, no such level.
        """
        if priority == 0:
            return self.queueing.default_level
        if not 1 <= priority <= self.queueing.levels:
            allowed = f"0 to {self.queueing.levels}" if self.queueing.levels > 1 else "0 and 1"
            raise ServeError(Status.INVALID, f"got priority {priority}; allowed: {allowed}")
        return priority

    def _put(self, pending: Pending) -> None:
        queueing, queue = self.queueing, self.queue
        pending.queued = _clock()
        full = queue.count >= queueing.size
        if full or (queue.count and queue.nbytes + pending.fit.nbytes > queueing.nbytes):
            self.statistics.fail(stats.REJECTED, pending.queued - pending.arrived)
            what = f"{queue.count} requests" if full else f"{queue.nbytes} bytes of inputs"
            wait = max(0.05, self._run_ns * queue.count / 1e9)
            raise ServeError(Status.FULL, f"the queue is full: {what} are waiting; try again later", wait)
        queue.enter(pending)

    def _expire(self, pending: Pending) -> None:
        if pending.group is not None:
            self.queue.leave(pending)
            waited = (_clock() - pending.queued) / 1e6
            error = ServeError(Status.TIMEOUT, f"the request waited {waited:.0f} ms in the queue, its time-out")
            self._refuse(pending, error, stats.REJECTED)
            self._signal_idle()

    def _cancel(self, pending: Pending) -> None:
        if pending.group is not None:
            self.queue.leave(pending)
        if pending.outputs is None and pending.error is None:
            self.statistics.fail(stats.CANCELED, _clock() - pending.arrived)
        self._signal_idle()

    def _woken(self) -> None:
        self._wake = None
        self.pump()

    def _again(self, job: Job, message: str, *, crashed: bool) -> None:
        """Repeat a run's requests alone, apart from those that are at fault for certain."""
        for member in reversed(job.members):
            member.crashes += crashed
            if member.future is not None and member.future.done():
                continue
            if member.crashes >= _CRASHES or (len(job.members) == 1 and not crashed):
                self._refuse(member, ServeError(Status.INTERNAL, message), stats.BACKEND)
            else:
                member.alone = True
                self.queue.enter(member, first=True)
        self._finished()
        self.pump()

    def _count(self, member: Pending, job: Job, infer_ns: int, output_ns: int, now: int) -> None:
        took, waited = now - member.arrived, job.started - member.queued
        self.statistics.answered(member.fit.rows, took, waited, job.input_ns, infer_ns, output_ns)

    def _refuse(self, pending: Pending, error: ServeError, reason: str) -> None:
        pending.error = error
        self.statistics.fail(reason, _clock() - pending.arrived)
        _answer(pending)

    def _finished(self) -> None:
        self.running -= 1
        self._signal_idle()

    def _signal_idle(self) -> None:
        if self._idle is not None and not self.queue.count and not self.running:
            self._idle.set()


def _answer(pending: Pending) -> None:
    if pending.future is not None and not pending.future.done():
        pending.future.set_result(None)
