"""The serving core on real bundles in real worker processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.serving_core import TENTH, inputs_of, obedient_release, request_of, serving
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.api import InferRequest, ServeError, Status
from toolchain.runtime.server.core import ServingCore


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return obedient_release(tmp_path_factory.mktemp("releases"))


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        await asyncio.sleep(0.005)


async def refusal(core: ServingCore, request: InferRequest) -> ServeError:
    with pytest.raises(ServeError) as caught:
        await core.infer(request)
    return caught.value


def pids(core: ServingCore) -> list[int]:
    return [pid for version in core.repository.versions() for pid in version.pids]


def running(core: ServingCore) -> int:
    return sum(version.batcher.running for version in core.repository.versions())


@pytest.mark.parametrize("execution", ["process", "thread", "inline"])
def test_every_request_of_many_gets_its_own_answer(release: Path, execution: str) -> None:
    async def main() -> None:
        async with serving(release, execution=execution, max_batch_size=8) as core:
            rows = [1 + i % 3 for i in range(200)]
            tasks = [core.infer(request_of(i, rows=n, index=i % 4)) for i, n in enumerate(rows)]
            answers = await asyncio.gather(*tasks)
            for i, (answer, n) in enumerate(zip(answers, rows, strict=True)):
                np.testing.assert_array_equal(answer.outputs["y"], np.full((n, 4), i + i % 4, np.float32))
            (stats,) = core.statistics("obedient")
            assert stats["inference_stats"]["success"]["count"] == 200
            assert stats["inference_count"] == sum(rows)
            if execution == "process":
                assert stats["execution_count"] < 200
            assert all(batch["batch_size"] <= 8 for batch in stats["batch_stats"])

    asyncio.run(main())


def test_requests_of_other_sizes_are_not_merged_and_large_ones_grow_the_memory(release: Path) -> None:
    async def main() -> None:
        async with serving(release, max_batch_size=64) as core:
            tasks = [core.infer(request_of(i, width=1 + i % 5, rows=1 + i % 2)) for i in range(60)]
            tasks += [core.infer(request_of(7, width=4096, rows=64)), core.infer(request_of(8, width=2))]
            for i, answer in enumerate(await asyncio.gather(*tasks[:60])):
                assert answer.outputs["y"].shape == (1 + i % 2, 1 + i % 5)
                assert (answer.outputs["y"] == i).all()
            large, small = await asyncio.gather(*tasks[60:])
            assert (large.outputs["y"] == 7).all()
            assert large.outputs["y"].shape == (64, 4096)
            assert (small.outputs["y"] == 8).all()

    asyncio.run(main())


def test_a_poison_request_fails_alone(release: Path) -> None:
    async def main() -> None:
        async with serving(release, max_batch_size=16) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=TENTH)))
            await until(lambda: running(core))
            tasks = [core.infer(request_of(i, index=99 if i in (3, 11) else 0)) for i in range(16)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await blocker
            for i, result in enumerate(results):
                if i in (3, 11):
                    assert isinstance(result, ServeError)
                    assert result.status is Status.INTERNAL
                    assert "the engine failed on these inputs" in result.message
                else:
                    assert not isinstance(result, BaseException)
                    assert (result.outputs["y"] == i).all()
            assert 'reason="BACKEND"} 2' in core.metrics().decode()

    asyncio.run(main())


def test_requests_in_flight_survive_a_segfault_of_the_engine(release: Path) -> None:
    async def main() -> None:
        async with serving(release, instances=2, max_batch_size=4) as core:
            done = 0

            async def client(number: int) -> None:
                nonlocal done
                for i in range(30):
                    value = number * 100 + i
                    answer = await core.infer(request_of(value, work=1000))
                    assert (answer.outputs["y"] == value).all()
                    done += 1

            async def killer() -> None:
                for goal in (20, 60, 100, 140):
                    await until(lambda goal=goal: done >= goal)
                    victim = pids(core)[0]
                    os.kill(victim, signal.SIGSEGV)
                    await until(lambda victim=victim: victim not in pids(core))

            await asyncio.gather(*(client(n) for n in range(8)), killer())
            await until(lambda: len(pids(core)) == 2)
            assert "toolchain_worker_restart_count{" in core.metrics().decode()
            (version,) = core.repository.versions()
            assert version.statistics.restarts == 4
            assert version.statistics.failed == 0

    asyncio.run(main())


def test_a_request_that_kills_its_worker_twice_fails_and_the_server_answers_on(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            deadly = asyncio.create_task(core.infer(request_of(1, work=100 * TENTH)))
            for _ in range(2):
                await until(lambda: running(core) and pids(core))
                (pid,) = pids(core)
                os.kill(pid, signal.SIGSEGV)
                await until(lambda pid=pid: pid not in pids(core))
            with pytest.raises(ServeError, match="SIGSEGV") as caught:
                await deadly
            assert caught.value.status is Status.INTERNAL
            assert ((await core.infer(request_of(2))).outputs["y"] == 2).all()

    asyncio.run(main())


def test_a_run_that_does_not_end_is_ended(release: Path) -> None:
    async def main() -> None:
        async with serving(release, run_timeout_s=0.3) as core:
            error = await refusal(core, request_of(1, work=200 * TENTH))
            assert error.status is Status.INTERNAL
            assert "did not end within 0.3 s" in error.message
            assert ((await core.infer(request_of(2))).outputs["y"] == 2).all()

    asyncio.run(main())


def test_a_full_queue_answers_at_once_and_says_when_to_come_again(release: Path) -> None:
    async def main() -> None:
        async with serving(release, queue_size=3) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=3 * TENTH)))
            await until(lambda: running(core))
            waiting = [asyncio.create_task(core.infer(request_of(i))) for i in range(3)]
            await asyncio.sleep(0)
            started = time.monotonic()
            error = await refusal(core, request_of(9))
            assert time.monotonic() - started < 0.05
            assert error.status is Status.FULL
            assert error.retry_after
            await asyncio.gather(blocker, *waiting)

    asyncio.run(main())


def test_the_bytes_that_wait_are_bounded(release: Path) -> None:
    async def main() -> None:
        async with serving(release, queue_mb=1) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=2 * TENTH)))
            await until(lambda: running(core))
            waiting = asyncio.create_task(core.infer(request_of(1, rows=60, width=4096)))
            await asyncio.sleep(0)
            assert (await refusal(core, request_of(2, rows=60, width=4096))).status is Status.FULL
            await asyncio.gather(blocker, waiting)

    asyncio.run(main())


def test_cancelled_requests_leave_the_queue_and_are_not_run(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=2 * TENTH)))
            await until(lambda: running(core))
            waiting = [asyncio.create_task(core.infer(request_of(i))) for i in range(5)]
            await asyncio.sleep(0)
            (version,) = core.repository.versions()
            assert version.batcher.queue.count == 5
            for task in waiting[:4]:
                task.cancel()
            await asyncio.gather(*waiting[:4], return_exceptions=True)
            assert version.batcher.queue.count == 1
            await asyncio.gather(blocker, waiting[4])
            assert version.statistics.executions == 2
            assert version.statistics.failures["CANCELED"] == 4

    asyncio.run(main())


def test_requests_time_out_in_the_queue(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=3 * TENTH)))
            await until(lambda: running(core))
            error = await refusal(core, request_of(1, timeout_us=20_000))
            assert error.status is Status.TIMEOUT
            assert not blocker.done()
            await blocker

    asyncio.run(main())


def test_higher_priorities_go_first(release: Path) -> None:
    async def main() -> None:
        async with serving(release, priorities=3) as core:
            blocker = asyncio.create_task(core.infer(request_of(0, work=TENTH)))
            await until(lambda: running(core))
            order: list[int] = []

            async def ask(priority: int) -> None:
                await core.infer(request_of(1, priority=priority))
                order.append(priority)

            tasks = [asyncio.create_task(ask(p)) for p in (3, 0, 3, 1, 2, 1)]
            await asyncio.gather(blocker, *tasks)
            assert order == [1, 1, 0, 2, 3, 3]
            assert (await refusal(core, request_of(1, priority=4))).status is Status.INVALID

    asyncio.run(main())


def test_mistakes_are_named_before_anything_is_queued(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            for change, text in [
                ({"x": np.zeros((1, 4), np.float64)}, "input 'x' has datatype FP64, the model takes FP32"),
                ({"x": np.zeros((4,), np.float32)}, "input 'x' has shape [4], the model takes [batch, width]"),
                ({"x": np.zeros((1, 5000), np.float32)}, "with a size of width from 1 to 4096"),
                ({"index": np.zeros((2,), np.int64)}, "batch is 2 in input 'index' and 1 in input 'x'"),
                ({"indx": np.zeros((1,), np.int64)}, "unknown input 'indx' (did you mean 'index'?)"),
            ]:
                inputs = {**inputs_of(1), **change}
                error = await refusal(core, InferRequest("obedient", "", inputs))
                assert error.status is Status.INVALID
                assert text in error.message
            missing = inputs_of(1)
            del missing["work"]
            assert "input 'work' is missing" in (await refusal(core, InferRequest("obedient", "", missing))).message
            assert "unknown output 'z'" in (await refusal(core, request_of(1, outputs=("z",)))).message
            error = await refusal(core, request_of(1, model="obedent"))
            assert error.status is Status.NOT_FOUND
            assert "did you mean 'obedient'" in error.message
            assert (await refusal(core, request_of(1, version="9.0.0"))).status is Status.NOT_FOUND

    asyncio.run(main())


def test_a_bundle_that_fails_its_self_test_is_not_served(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ToolchainError, match="the self-test failed") as caught:
            async with serving(obedient_release(tmp_path, recorded=5.0)):
                pass
        assert caught.value.code == ExitCode.DAMAGED_BUNDLE

    asyncio.run(main())


def test_unloading_answers_what_is_in_flight_and_loading_brings_the_model_back(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            flying = [asyncio.create_task(core.infer(request_of(i, work=TENTH // 4))) for i in range(4)]
            await until(lambda: running(core))
            await core.unload("obedient")
            for i, task in enumerate(flying):
                assert ((await task).outputs["y"] == i).all()
            assert pids(core) == []
            assert [(e.state, e.reason) for e in core.index()] == [("UNAVAILABLE", "unloaded")]
            assert (await refusal(core, request_of(1))).status is Status.UNAVAILABLE
            assert not core.model_ready("obedient")
            assert core.ready()
            await core.load("obedient")
            assert core.model_ready("obedient")
            assert ((await core.infer(request_of(1))).outputs["y"] == 1).all()
            with pytest.raises(ServeError):
                await core.load("other")

    asyncio.run(main())


def test_closing_answers_what_is_in_flight_and_leaves_no_process(release: Path) -> None:
    async def main() -> None:
        async with serving(release, instances=2) as core:
            flying = [asyncio.create_task(core.infer(request_of(i, work=TENTH // 4))) for i in range(6)]
            await until(lambda: running(core))
            before = pids(core)
            await core.close()
            for i, task in enumerate(flying):
                assert ((await task).outputs["y"] == i).all()
            assert not core.ready()
            for pid in before:
                assert not Path(f"/proc/{pid}").exists()

    asyncio.run(main())


def test_the_model_says_what_it_is(release: Path) -> None:
    async def main() -> None:
        async with serving(release, max_batch_size=4) as core:
            meta = core.metadata("obedient")
            assert meta.versions == ("1.0.0",)
            assert next((s.name, s.datatype, s.shape) for s in meta.inputs) == ("x", "FP32", (-1, -1))
            config = core.config("obedient")
            assert config["max_batch_size"] == 64
            assert config["input"][0]["dims"] == [-1]
            assert config["input"][1]["data_type"] == "TYPE_INT64"
            assert config["dynamic_batching"]["preferred_batch_size"] == [4]

    asyncio.run(main())


def test_a_model_whose_workers_cannot_start_any_more_is_unavailable_until_they_can(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            (version,) = core.repository.versions()
            folder = version.placed.folder
            folder.rename(folder.with_suffix(".away"))
            os.kill(pids(core)[0], signal.SIGKILL)
            # It waits while workers are tried, and is answered when they are given up.
            error = await refusal(core, request_of(1))
            assert error.status is Status.UNAVAILABLE
            assert [e.state for e in core.index()] == ["UNAVAILABLE"]
            assert not core.ready()
            assert (await refusal(core, request_of(1))).status is Status.UNAVAILABLE
            folder.with_suffix(".away").rename(folder)
            await until(core.ready)
            assert ((await core.infer(request_of(2))).outputs["y"] == 2).all()

    asyncio.run(main())


def test_workers_go_before_the_server_where_memory_runs_out(release: Path) -> None:
    async def main() -> None:
        async with serving(release) as core:
            (pid,) = pids(core)
            mine, its = (int(Path(f"/proc/{p}/oom_score_adj").read_text()) for p in ("self", pid))
            assert its > mine

    asyncio.run(main())
