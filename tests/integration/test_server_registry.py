"""A server that follows a tag in a registry, and that serves only what is signed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.keys import make_key
from helpers.registry import network, running_registry

from tests.helpers.serving_core import obedient_release, request_of
from toolchain.bundle.read import open_release
from toolchain.bundle.sign import sign_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.registry.push import push
from toolchain.registry.reference import RegistryReference
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.settings import load_settings

pytestmark = pytest.mark.xdist_group("registry")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


def sent(place: RegistryReference, folder: Path, number: int, key: Path | None = None, **how: Any) -> None:
    """Release ``number``.0.0, which adds its number, under the tag."""
    release = obedient_release(folder, f"{number}.0.0", offset=number, **how)
    if key is not None:
        sign_release(release, key)
    push(open_release(release), place)


@asynccontextmanager
async def following(place: RegistryReference, folder: Path, **settings: Any) -> AsyncIterator[ServingCore]:
    overrides = {"defaults.threads": 1, "defaults.trial_requests": 0, "registry.folder": str(folder)}
    core = ServingCore(load_settings(None, {**overrides, "registry.interval_s": 0.05, **settings}))
    try:
        await core.start([str(place)])
        yield core
    finally:
        await asyncio.wait_for(core.close(), 20)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not come true")


async def answers(core: ServingCore, seen: list[str]) -> None:
    """Ask for ever; every answer must be that of the version that it names."""
    while True:
        answer = await core.infer(request_of(1.0))
        assert answer.outputs["y"][0, 0] == 1.0 + float(answer.version[0])
        seen.append(answer.version)
        await asyncio.sleep(0.002)


def test_the_tag_decides_what_is_served_and_no_request_fails_when_it_moves(host: str, tmp_path: Path) -> None:
    place = RegistryReference(host, "followed/moves", "stable")

    async def main() -> None:
        sent(place, tmp_path / "r", 1)
        async with following(place, tmp_path / "kept") as core:
            seen: list[str] = []
            client = asyncio.create_task(answers(core, seen))
            for number in (2, 3, 1, 4):
                # Back from 3 to 1, too: the tag is what counts, not the larger number.
                await asyncio.to_thread(sent, place, tmp_path / "r", number)
                await until(lambda number=number: seen[-1:] == [f"{number}.0.0"] or client.done())
            client.cancel()
            with pytest.raises(asyncio.CancelledError):
                await client
            await until(lambda: [e.version for e in core.index(ready_only=True)] == ["4.0.0"])
            assert len(list((tmp_path / "kept").glob("*/*/*/index.json"))) == 2

    asyncio.run(main())


def test_what_no_trusted_key_signed_is_not_served_and_the_index_says_why(host: str, tmp_path: Path) -> None:
    place = RegistryReference(host, "followed/signed", "stable")
    own, public = make_key(tmp_path / "own.pem")
    other, _ = make_key(tmp_path / "other.pem")

    async def main() -> None:
        sent(place, tmp_path / "r", 1)
        with pytest.raises(ToolchainError) as caught:
            async with following(place, tmp_path / "kept", trust_key=str(public)):
                pass
        assert caught.value.code is ExitCode.UNTRUSTED
        assert str(place) in caught.value.where
        sent(place, tmp_path / "r", 1, own)
        async with following(place, tmp_path / "kept", trust_key=str(public)) as core:
            for key, reason in ((None, "is not signed"), (other, "none of its")):
                await asyncio.to_thread(sent, place, tmp_path / "r", 2, key)
                await until(lambda reason=reason: any(reason in entry.reason for entry in core.index()))
                assert (await core.infer(request_of(1.0))).version == "1.0.0"
            await asyncio.to_thread(sent, place, tmp_path / "r", 2, own)
            await until(lambda: {e.version: e.state for e in core.index()}.get("2.0.0") == "READY")
            assert (await core.infer(request_of(1.0))).version == "2.0.0"
            assert not [entry for entry in core.index() if entry.version == "stable"]

    asyncio.run(main())


def test_a_release_that_fails_its_self_test_does_not_take_over(host: str, tmp_path: Path) -> None:
    place = RegistryReference(host, "followed/broken", "stable")

    async def main() -> None:
        sent(place, tmp_path / "r", 1)
        async with following(place, tmp_path / "kept") as core:
            await asyncio.to_thread(sent, place, tmp_path / "r", 2, None, recorded=7.0)
            await until(lambda: any("self-test" in entry.reason for entry in core.index()))
            assert (await core.infer(request_of(1.0))).version == "1.0.0"

    asyncio.run(main())


def test_a_server_starts_with_what_it_had_when_the_registry_does_not_answer(host: str, tmp_path: Path) -> None:
    async def main() -> None:
        with network(host) as relay:
            place = RegistryReference(relay.host, "followed/gone", "stable")
            sent(place, tmp_path / "r", 1)
            async with following(place, tmp_path / "kept"):
                pass
            relay.fault = lambda line, sent, data: None
            async with following(place, tmp_path / "kept") as core:
                assert (await core.infer(request_of(1.0))).version == "1.0.0"
                relay.fault = None
                await asyncio.to_thread(sent, place, tmp_path / "r", 2)
                await until(lambda: [e.version for e in core.index(ready_only=True)] == ["2.0.0"])
            relay.fault = lambda line, sent, data: None
            with pytest.raises(ToolchainError) as caught:
                async with following(place, tmp_path / "nothing"):
                    pass
            assert caught.value.code is ExitCode.REGISTRY

    asyncio.run(main())


def test_the_command_ends_with_the_code_of_what_is_wrong(tmp_path: Path) -> None:
    release = obedient_release(tmp_path)
    _, public = make_key(tmp_path / "own.pem")
    environment = os.environ | {"TOOLCHAIN_CACHE": str(tmp_path / "cache")}

    def ended(*words: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "toolchain.cli.main", "serve", "--http-port=0", "--no-grpc", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        return done.returncode, done.stderr

    code, text = ended(release, "--trust-key", public)
    assert (code, "is not signed" in text) == (34, True)
    code, text = ended("oci://127.0.0.1:1/models/sample:stable")
    assert (code, "cannot be reached" in text) == (43, True)
    code, text = ended("oci://127.0.0.1:1/Models")
    assert (code, "allowed: oci://HOST" in text) == (2, True)


def test_a_watched_folder_is_served_when_it_is_signed_and_what_is_hidden_is_not_looked_at(tmp_path: Path) -> None:
    own, public = make_key(tmp_path / "own.pem")
    watched = tmp_path / "watched"
    for part in (".pull/0123", "obedient/.1.0.0.tmp-1"):
        (watched / part).mkdir(parents=True)
        (watched / part / "index.json").write_text("{}")

    async def main() -> None:
        release = obedient_release(tmp_path / "made", "1.0.0", offset=1)
        release.rename(watched / "obedient" / "1.0.0")
        settings = {"watch": str(watched), "watch_interval_s": 0.05, "trust_key": str(public), "defaults.threads": 1}
        core = ServingCore(load_settings(None, settings))
        try:
            await core.start([])
            [entry] = core.index()
            assert (entry.name, entry.version, entry.state) == ("obedient", "1.0.0", "UNAVAILABLE")
            assert entry.reason == "is not signed"
            await asyncio.to_thread(sign_release, watched / "obedient" / "1.0.0", own)
            await until(lambda: [e.state for e in core.index()] == ["READY"])
            assert (await core.infer(request_of(1.0))).version == "1.0.0"
        finally:
            await core.close()

    asyncio.run(main())
