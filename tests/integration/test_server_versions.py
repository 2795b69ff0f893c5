"""Versions of a model that come and go while clients ask: switches, trials, roll-backs, a watched folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.serving_core import obedient_release, request_of, serving
from toolchain.errors import ToolchainError
from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.traffic import version_key

pytestmark = pytest.mark.xdist_group("server_versions")


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        await asyncio.sleep(0.005)


async def answered_by(core: ServingCore, count: int, **how: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    for i in range(count):
        answer = await core.infer(request_of(i, **how))
        # Each version adds its own number: the answer must be of the version that it names.
        offset = float(answer.version.split(".")[0])
        np.testing.assert_array_equal(answer.outputs["y"], np.full((1, 4), i + how.get("index", 0) + offset))
        seen[answer.version] += 1
    return seen


def release(folder: Path, number: int, **how: float) -> Path:
    return obedient_release(folder, f"{number}.0.0", offset=number, **how)  # type: ignore[arg-type]


async def switch_under_load(tmp_path: Path, switches: int) -> None:
    releases = [release(tmp_path, number) for number in range(1, switches + 2)]
    async with serving(releases[0], trial_requests=0, max_batch_size=4) as core:
        stop = asyncio.Event()
        seen: Counter[str] = Counter()

        async def client() -> None:
            while not stop.is_set():
                seen.update(await answered_by(core, 5, work=200))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for number, path in enumerate(releases[1:], start=2):
            await core.repository.add(str(path))
            await until(lambda number=number: seen[f"{number}.0.0"])
        stop.set()
        await asyncio.gather(*clients)
        assert len(seen) == switches + 1
        assert sum(seen.values()) > 10 * switches
        # The index tells of the last ones that are gone.
        gone = min(switches - 1, 32)
        await until(lambda: Counter(e.state for e in core.index()) == {"READY": 2, "UNAVAILABLE": gone})
        # The first version was named at the start, so it stays; of the others only the last.
        states = {entry.version: entry.state for entry in core.index()}
        assert [v for v, state in states.items() if state == "READY"] == ["1.0.0", f"{switches + 1}.0.0"]


def test_no_request_fails_while_versions_are_switched(tmp_path: Path) -> None:
    asyncio.run(switch_under_load(tmp_path, 6))


@pytest.mark.slow
def test_no_request_fails_in_a_hundred_switches(tmp_path: Path) -> None:
    asyncio.run(switch_under_load(tmp_path, 100))


def test_a_version_on_trial_takes_its_share_and_then_all(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = release(tmp_path, 1), release(tmp_path, 2)
        async with serving(first, canary_share=0.1, trial_requests=20) as core:
            await core.repository.add(str(second))
            assert await answered_by(core, 100) == {"1.0.0": 90, "2.0.0": 10}
            assert (await core.infer(request_of(1, "1.0.0"))).version == "1.0.0"
            assert await answered_by(core, 100) == {"1.0.0": 90, "2.0.0": 10}
            assert await answered_by(core, 50) == {"2.0.0": 50}

    asyncio.run(main())


def test_a_version_that_fails_on_trial_is_rolled_back_and_no_client_notices(tmp_path: Path) -> None:
    async def main() -> None:
        first = release(tmp_path, 1)
        # It knows fewer indices than the version before: a regression that its self-test does not show.
        second = release(tmp_path, 2, rows=1)
        async with serving(first, canary_share=0.5, trial_requests=50) as core:
            await core.repository.add(str(second))
            assert await answered_by(core, 60, index=2) == {"1.0.0": 60}
            await until(lambda: core.index()[1].state == "UNAVAILABLE")
            assert "rolled back: 10 of 10 requests failed" in core.index()[1].reason
            assert core.ready()
            with pytest.raises(ServeError) as caught:
                await core.infer(request_of(1, "2.0.0"))
            assert caught.value.status is Status.NOT_FOUND

    asyncio.run(main())


def test_requests_that_fail_in_both_versions_do_not_count_against_the_new_one(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = release(tmp_path, 1), release(tmp_path, 2)
        async with serving(first, canary_share=1.0, trial_requests=10) as core:
            await core.repository.add(str(second))
            for i in range(20):
                with pytest.raises(ServeError, match="the engine failed"):
                    await core.infer(request_of(i, index=99))
            assert await answered_by(core, 12) == {"2.0.0": 12}
            assert core.repository.models["obedient"].trial is None
            assert core.metadata("obedient").versions == ("1.0.0", "2.0.0")

    asyncio.run(main())


def test_a_version_whose_workers_die_on_trial_costs_no_request(tmp_path: Path) -> None:
    async def main() -> None:
        first, second = release(tmp_path, 1), release(tmp_path, 2)
        async with serving(first, canary_share=1.0, trial_requests=1000) as core:
            new = await core.repository.add(str(second))
            for _ in range(3):
                for pid in new.pids:
                    os.kill(pid, signal.SIGKILL)
                seen = await answered_by(core, 20)
                assert sum(seen.values()) == 20

    asyncio.run(main())


def test_a_damaged_version_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, third = release(tmp_path, 1), release(tmp_path, 2), release(tmp_path, 3, recorded=9.0)
        largest = max((second / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
        largest.chmod(0o644)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
        async with serving(first) as core:
            for broken in (second, third):
                with pytest.raises(ToolchainError):
                    await core.repository.add(str(broken))
            assert await answered_by(core, 10) == {"1.0.0": 10}
            assert core.ready()

    asyncio.run(main())


def test_several_versions_of_one_model_are_served_side_by_side(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(release(tmp_path, 10), release(tmp_path, 9)) as core:
            assert core.metadata("obedient").versions == ("9.0.0", "10.0.0")
            assert await answered_by(core, 5) == {"10.0.0": 5}
            assert (await core.infer(request_of(1, "9.0.0"))).version == "9.0.0"

    asyncio.run(main())


def test_a_watched_folder_is_followed(tmp_path: Path) -> None:
    async def main() -> None:
        made, watched = tmp_path / "made", tmp_path / "watched"
        (watched / "obedient").mkdir(parents=True)

        def publish(number: int, **how: float) -> None:
            path = release(made, number, **how)
            shutil.copytree(path, watched / "obedient" / f".{number}")
            (watched / "obedient" / f".{number}").rename(watched / "obedient" / f"{number}.0.0")

        publish(1)
        async with serving(watch=watched, trial_requests=0) as core:
            assert await answered_by(core, 3) == {"1.0.0": 3}
            publish(2)
            await until(lambda: [e.state for e in core.index()] == ["UNAVAILABLE", "READY"])
            assert await answered_by(core, 3) == {"2.0.0": 3}
            publish(3, recorded=9.0)
            await until(lambda: [e.state for e in core.index()] == ["UNAVAILABLE", "READY", "UNAVAILABLE"])
            assert "self-test" in core.index()[2].reason
            assert await answered_by(core, 3) == {"2.0.0": 3}
            shutil.rmtree(watched / "obedient" / "3.0.0")
            shutil.rmtree(watched / "obedient" / "2.0.0")
            await until(lambda: "2.0.0" not in core.repository.models["obedient"].versions)
            await until(lambda: core.model_ready("obedient"))
            assert await answered_by(core, 3) == {"1.0.0": 3}

    asyncio.run(main())


def test_versions_are_ordered_as_semantic_versions() -> None:
    ordered = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0", "1.10.0"]
    shuffled = ordered[::-1]
    assert sorted(shuffled, key=version_key) == ordered


def test_the_same_version_twice_is_a_mistake_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        first, second = release(tmp_path / "a", 1), release(tmp_path / "b", 1)
        with pytest.raises(ToolchainError, match=r"is obedient 1\.0\.0, and so is"):
            async with serving(first, second):
                pass
        assert list(tmp_path.glob("toolchain-bundle-*")) == []

    asyncio.run(main())


def test_another_bundle_of_the_same_version_takes_its_place(tmp_path: Path) -> None:
    async def main() -> None:
        watched = tmp_path / "watched"
        path = obedient_release(watched, "1.0.0", offset=1)
        async with serving(watch=watched) as core:
            assert float((await core.infer(request_of(1))).outputs["y"][0, 0]) == 2
            replacement = obedient_release(tmp_path / "new", "1.0.0", offset=5)
            path.rename(tmp_path / "old")
            replacement.rename(path)
            end = time.monotonic() + 10
            values = set()
            while 6.0 not in values:
                values.add(float((await core.infer(request_of(1))).outputs["y"][0, 0]))
                assert time.monotonic() < end
                await asyncio.sleep(0.001)
            assert values <= {2.0, 6.0}
            assert [entry.state for entry in core.index()] == ["READY"]

    asyncio.run(main())
