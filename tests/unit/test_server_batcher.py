"""The queue and the batcher, over a worker that computes in this process and ends a run when the test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.batcher import Batcher, Job
from toolchain.runtime.server.checks import Fit
from toolchain.runtime.server.stats import Statistics
from toolchain.runtime.server.waiting import Pending, Queueing


class StepWorker:
    """Doubles its input; a negative number in it is refused.  It is busy until :meth:`end` is called."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.job: Job | None = None
        self.runs: list[list[float]] = []

    def claim(self) -> StepWorker | None:
        return None if self.job else self

    def run_now(self, inputs: dict[str, np.ndarray], fit: Fit) -> None:
        return

    def start_job(self, job: Job) -> None:
        self.job = job
        self.runs.append([float(m.arrays[0].flat[0]) for m in job.members])

    def end(self) -> None:
        assert self.job is not None
        job, self.job = self.job, None
        merged = np.concatenate([m.arrays[0] for m in job.members], axis=self.batcher.axes[0])
        if (merged < 0).any():
            self.batcher.failed(job, "negative")
        else:
            self.batcher.done(job, [merged * 2], 1000, owned=False)
        self.batcher.pump()

    def crash(self) -> None:
        assert self.job is not None
        job, self.job = self.job, None
        self.batcher.crashed(job, "crashed", started=True)
        self.batcher.pump()

    async def end_all(self) -> None:
        await asyncio.sleep(0)
        while self.job is not None:
            self.end()
            await asyncio.sleep(0)


def made(axis: int = 0, **queueing: int) -> tuple[Batcher, StepWorker]:
    batcher = Batcher(Queueing(**queueing), (axis,), (axis,), Statistics())
    worker = StepWorker(batcher)
    batcher.workers = worker
    return batcher, worker


def pending(value: float, rows: int = 1, width: int = 2, level: int = 1, axis: int = 0) -> Pending:
    shape = (rows, width) if axis == 0 else (width, rows)
    array = np.full(shape, value, np.float32)
    group = ((-1, width) if axis == 0 else (width, -1),)
    return Pending([array], Fit(rows, group, array.nbytes, {"batch": rows}), level, time.monotonic_ns())


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


def ask(batcher: Batcher, *requests: Pending, timeout_ns: int = 0) -> list[asyncio.Task[list[np.ndarray]]]:
    return [asyncio.create_task(batcher.infer(request, timeout_ns)) for request in requests]


def test_a_request_goes_at_once_and_those_that_come_meanwhile_go_together() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=4)
        tasks = ask(batcher, *(pending(i) for i in range(7)))
        await worker.end_all()
        assert worker.runs == [[0], [1, 2, 3, 4], [5, 6]]
        for i, task in enumerate(tasks):
            np.testing.assert_array_equal((await task)[0], np.full((1, 2), 2 * i))
        assert {rows: count.count for rows, count in batcher.statistics.batches.items()} == {1: 1, 4: 1, 2: 1}

    run(main())


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_count_and_each_member_gets_its_own_rows(axis: int) -> None:
    async def main() -> None:
        batcher, worker = made(axis=axis, max_rows=5)
        tasks = ask(batcher, *(pending(i, rows, axis=axis) for i, rows in enumerate([1, 2, 3, 3, 9, 1])))
        await worker.end_all()
        assert worker.runs == [[0], [1, 2], [3], [4], [5]]
        for i, (task, rows) in enumerate(zip(tasks, [1, 2, 3, 3, 9, 1], strict=True)):
            expected = np.full((rows, 2) if axis == 0 else (2, rows), 2 * i)
            np.testing.assert_array_equal((await task)[0], expected)

    run(main())


def test_requests_of_other_sizes_are_never_merged_and_none_starves() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=8)
        tasks = ask(batcher, *(pending(i, width=2 + i % 2) for i in range(7)))
        await worker.end_all()
        assert worker.runs == [[0], [1, 3, 5], [2, 4, 6]]
        for i, task in enumerate(tasks):
            assert (await task)[0].shape == (1, 2 + i % 2)

    run(main())


def test_without_batching_requests_go_one_by_one_in_their_order() -> None:
    async def main() -> None:
        batcher, worker = made()
        tasks = ask(batcher, *(pending(i) for i in range(4)))
        await worker.end_all()
        assert worker.runs == [[0], [1], [2], [3]]
        await asyncio.gather(*tasks)

    run(main())


def test_a_delay_waits_for_more_but_not_when_the_batch_is_full() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=3, delay_ns=20_000_000)
        started = time.monotonic()
        tasks = ask(batcher, pending(0))
        await asyncio.sleep(0)
        assert worker.runs == []
        tasks += ask(batcher, pending(1), pending(2))
        await asyncio.sleep(0)
        assert worker.runs == [[0, 1, 2]]
        assert time.monotonic() - started < 0.015
        worker.end()
        tasks += ask(batcher, pending(3))
        while len(worker.runs) < 2:
            await asyncio.sleep(0.001)
        assert worker.runs[1] == [3]
        assert time.monotonic() - started > 0.02
        worker.end()
        await asyncio.gather(*tasks)

    run(main())


def test_the_poison_request_of_a_batch_fails_alone() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=8)
        tasks = ask(batcher, *(pending(value) for value in [0, 1, -1, 2, 3]))
        await worker.end_all()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, ServeError) for result in results] == [False, False, True, False, False]
        assert worker.runs == [[0], [1, -1, 2, 3], [1], [-1], [2], [3]]
        assert batcher.statistics.failures["BACKEND"] == 1

    run(main())


def test_after_a_crash_the_members_run_once_more_alone_and_who_crashes_again_fails() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=8)
        tasks = ask(batcher, *(pending(i) for i in range(4)))
        await asyncio.sleep(0)
        worker.end()
        worker.crash()
        assert worker.runs[1:] == [[1, 2, 3], [1]]
        worker.end()
        worker.crash()
        await worker.end_all()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, ServeError) for result in results] == [False, False, True, False]

    run(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        batcher, worker = made(size=2)
        tasks = ask(batcher, *(pending(i) for i in range(4)))
        await asyncio.sleep(0)
        with pytest.raises(ServeError) as caught:
            await tasks[3]
        assert caught.value.status is Status.FULL
        assert caught.value.retry_after
        await worker.end_all()
        await asyncio.gather(*tasks[:3])

    run(main())


def test_cancelled_and_late_requests_leave_the_queue() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=8)
        tasks = ask(batcher, pending(0), pending(1), pending(2))
        late = ask(batcher, pending(3), timeout_ns=5_000_000)
        await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(ServeError) as caught:
            await late[0]
        assert caught.value.status is Status.TIMEOUT
        assert (batcher.queue.count, batcher.queue.nbytes) == (1, 8)
        await worker.end_all()
        assert worker.runs == [[0], [2]]
        await asyncio.gather(tasks[0], tasks[2])
        assert batcher.queue.count == batcher.queue.nbytes == batcher.running == 0

    run(main())


def test_a_request_cancelled_in_its_run_disturbs_no_other() -> None:
    async def main() -> None:
        batcher, worker = made(max_rows=8)
        tasks = ask(batcher, *(pending(i) for i in range(4)))
        await asyncio.sleep(0)
        worker.end()
        tasks[2].cancel()
        await asyncio.sleep(0)
        await worker.end_all()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[2], asyncio.CancelledError)
        assert [float(results[i][0].flat[0]) for i in (0, 1, 3)] == [0, 2, 6]  # type: ignore[index]

    run(main())


def test_the_highest_level_goes_first() -> None:
    async def main() -> None:
        batcher, worker = made(levels=3, default_level=2)
        assert [batcher.level(p) for p in (0, 1, 3)] == [2, 1, 3]
        with pytest.raises(ServeError, match="allowed: 0 to 3"):
            batcher.level(4)
        tasks = ask(batcher, *(pending(i, level=level) for i, level in enumerate([3, 3, 2, 1, 2])))
        await worker.end_all()
        assert worker.runs == [[0], [3], [2], [4], [1]]
        await asyncio.gather(*tasks)

    run(main())


def test_drained_waits_for_everything() -> None:
    async def main() -> None:
        batcher, worker = made()
        tasks = ask(batcher, pending(0), pending(1))
        await asyncio.sleep(0)
        drained = asyncio.create_task(batcher.drained())
        await asyncio.sleep(0)
        worker.end()
        await asyncio.sleep(0)
        assert not drained.done()
        worker.end()
        await drained
        await asyncio.gather(*tasks)

    run(main())
