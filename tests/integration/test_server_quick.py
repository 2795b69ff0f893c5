"""What is remembered of earlier requests changes no answer: the same bytes out, whether a request is new or known."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.serving_core import inputs_of, obedient_release, serving
from toolchain.runtime.server.frontend import Frontends, FrontendSettings, Listen, start

PATH = "/v2/models/obedient/infer"
_NUMBERS = itertools.count()
_DATATYPES = {"float32": "FP32", "int64": "INT64"}


class Site:
    """A server of the obedient model, and one connection to it that stays."""

    def __init__(self, runner: asyncio.Runner, frontends: Frontends) -> None:
        self.runner = runner
        self.frontends = frontends
        self.streams: Any = None

    def ask(self, request: bytes) -> bytes:
        """The answer, without its date."""
        return self.runner.run(self._ask(request))

    async def leave(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            await self.streams[1].wait_closed()
        self.streams = None

    async def _ask(self, request: bytes) -> bytes:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.frontends.http_port)
        reader, writer = self.streams
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        body: bytes = await reader.readexactly(int(length[1]))
        if b"Connection: close" in head:
            await self.leave()
        return re.sub(rb"Date: [^\r]*\r\n", b"", head) + body


def _site(folder: Path, execution: str) -> Iterator[Site]:
    release = obedient_release(folder)
    with asyncio.Runner() as runner:
        context = serving(release, execution=execution, max_batch_size=8)
        core = runner.run(context.__aenter__())
        frontends = runner.run(start(core, FrontendSettings(), Listen(http_port=0, grpc_port=None)))
        site = Site(runner, frontends)
        yield site
        runner.run(site.leave())
        runner.run(frontends.drain(0))
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module", params=["inline", "process"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from _site(tmp_path_factory.mktemp(request.param), request.param)


def post(body: bytes, header: int | None = None, *extra: str, path: str = PATH) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *extra]
    if header is not None:
        lines.append(f"Inference-Header-Content-Length: {header}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def document(value: float, binary: bool, **how: Any) -> tuple[dict[str, Any], bytes]:
    entries, tail = [], b""
    for name, array in inputs_of(value, **how).items():
        entry: dict[str, Any] = {"name": name, "datatype": _DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    return {"inputs": entries}, tail


_BREAKS: list[tuple[str, Any]] = [
    ("as it is", lambda d: None),
    ("binary answer", lambda d: d.update(parameters={"binary_data_output": True})),
    ("id", lambda d: d.update(id="seven")),
    ("output", lambda d: d.update(outputs=[{"name": "y", "parameters": {"binary_data": True}}])),
    ("no such output", lambda d: d.update(outputs=[{"name": "z"}])),
    ("classes", lambda d: d.update(outputs=[{"name": "y", "parameters": {"classification": 2}}])),
    ("priority", lambda d: d.update(parameters={"priority": 7})),
    ("datatype", lambda d: d["inputs"][0].update(datatype="FP64")),
    ("no datatype", lambda d: d["inputs"][0].pop("datatype")),
    ("shape", lambda d: d["inputs"][0].update(shape=[1, 5])),
    ("huge shape", lambda d: d["inputs"][0].update(shape=[2**40, 2**40])),
    ("missing", lambda d: d["inputs"].pop()),
    ("twice", lambda d: d["inputs"].append(d["inputs"][0])),
    ("unknown", lambda d: d["inputs"][0].update(name="w")),
    ("size", lambda d: d["inputs"][0].update(parameters={"binary_data_size": 12})),
    ("both", lambda d: d["inputs"][0].update(parameters={"binary_data_size": 16}, data=[1.0] * 4)),
    ("text", lambda d: d["inputs"][0].update(data=["a"] * 4)),
    ("too large a number", lambda d: d["inputs"][0].update(data=[1e39, 1.0, 1.0, 1.0])),
    ("truth", lambda d: d["inputs"][0].update(data=[True, 1.0, 1.0, 1.0])),
    ("engine fails", lambda d: d["inputs"][1].update(data=[99])),
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.sampled_from([change for _, change in _BREAKS]),
    binary=st.booleans(),
    value=st.floats(-4, 4, width=32),
    index=st.sampled_from([0, 1, 99]),
    rows=st.integers(1, 3),
    cut=st.sampled_from([0, 0, 0, 1, 4]),
    lie=st.sampled_from([0, 0, 0, 0, 1, -1, 7]),
)
def test_a_known_request_is_answered_like_a_new_one(
    site: Site, change: Any, binary: bool, value: float, index: int, rows: int, cut: int, lie: int
) -> None:
    described, tail = document(value, binary, index=index, rows=rows)
    change(described)
    text = json.dumps(described).encode()
    body = text + tail
    header = len(text) + lie if binary else None
    body = body[: len(body) - cut]
    new = site.ask(post(body, header, f"X-Number: {next(_NUMBERS)}"))
    again = [site.ask(post(body, header)) for _ in range(4)]
    assert again == [new] * 4


@pytest.mark.parametrize("binary", [False, True])
def test_a_known_head_says_nothing_of_the_body(site: Site, binary: bool) -> None:
    described, tail = document(1.0, binary)
    text = json.dumps(described).encode()
    good = text + tail
    header = len(text) if binary else None
    for _ in range(3):
        assert site.ask(post(good, header)).startswith(b"HTTP/1.1 200 ")
    known = site.frontends.http.heads.known
    assert post(good, header)[: -len(good)] in known, "the head is known by now"
    for other in (good + bytes(4), good[:-4], good + bytes(1)):
        new = site.ask(post(other, header, f"X-Number: {next(_NUMBERS)}"))
        assert new.startswith(b"HTTP/1.1 400 ")
        assert [site.ask(post(other, header)) for _ in range(3)] == [new] * 3
    for broken in (bytes(len(good)), good[::-1], text[:-1] + b" " + tail, text.replace(b"FP32", b"FP64") + tail):
        new = site.ask(post(broken, header, f"X-Number: {next(_NUMBERS)}"))
        assert new.startswith(b"HTTP/1.1 400 ")
        assert [site.ask(post(broken, header)) for _ in range(3)] == [new] * 3


def test_every_request_is_counted_once_however_it_was_answered(site: Site) -> None:
    def counts() -> np.ndarray:
        text = site.ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").decode()
        names = ("request_success{", "inference_count{", "exec_count{", 'reason="OTHER"', 'reason="BACKEND"')
        return np.array([sum(int(n) for n in re.findall(rf"{re.escape(name)}.* (\d+)", text)) for name in names])

    before = counts()
    for index, shape in ((0, [2, 4]), (0, [2, 5]), (99, [2, 4])):
        described, _ = document(1.0, False, rows=2, index=index)
        described["inputs"][0]["shape"] = shape
        for _ in range(5):
            site.ask(post(json.dumps(described).encode()))
    wrong = document(1.0, False)[0]
    wrong["inputs"].pop()
    for _ in range(4):
        site.ask(post(json.dumps(wrong).encode()))
    assert (counts() - before).tolist() == [5, 10, 5, 4, 5]


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nUpgrade: h2c\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v2/models/obedient/infer HTTP/1.1\nHost: a\nContent-Length: 5\n\nabcde\r\n\r\n",
        b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
        b"\r\n\r\n",
        b"POST \r\n\r\n",
    ],
)
def test_only_plain_heads_are_remembered(site: Site, head: bytes) -> None:
    heads = site.frontends.http.heads
    for _ in range(3):
        heads.meet(head)
    assert head not in heads.known
    heads.meet(plain := b"POST /v2/models/obedient/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
    heads.meet(plain)
    assert heads.known[plain].length == 5


def test_requests_that_come_together_are_all_answered_in_order(site: Site) -> None:
    bodies = [json.dumps({**document(float(n), False)[0], "id": f"{n:04}"}).encode() for n in range(8)]
    for body in bodies[:3]:
        site.ask(post(body))

    async def together() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.frontends.http_port)
        writer.write(b"".join(post(body) for body in bodies[:4]))
        for body in bodies[4:]:
            writer.write(post(body)[:-7])
            await asyncio.sleep(0.02)
            writer.write(post(body)[-7:])
        answers = []
        for _ in bodies:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None
            answers.append(await reader.readexactly(int(length[1])))
        writer.close()
        await writer.wait_closed()
        return answers

    answers = site.runner.run(together())
    assert [json.loads(answer)["id"] for answer in answers] == [f"{n:04}" for n in range(8)]
    assert [json.loads(answer)["outputs"][0]["data"][0] for answer in answers] == list(range(8))


def test_a_large_body_behind_a_known_head_comes_whole(site: Site) -> None:
    described, tail = document(2.0, True, rows=64, width=1024)
    text = json.dumps({**described, "parameters": {"binary_data_output": True}}).encode()
    body = text + tail
    answers = [site.ask(post(body, len(text))) for _ in range(5)]
    assert answers == [answers[0]] * 5
    assert answers[0].endswith(inputs_of(2.0, rows=64, width=1024)["x"].tobytes())
    assert post(body, len(text))[: -len(body)] in site.frontends.http.heads.known
    assert site.frontends.http.pending == 0


def test_a_token_is_looked_at_in_every_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(obedient_release(tmp_path), execution="inline") as core:
            settings = FrontendSettings(authorize=(allowed := {"a"}).__contains__)
            frontends = await start(core, settings, Listen(http_port=0, grpc_port=None))
            body = json.dumps(document(1.0, False)[0]).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", frontends.http_port)
            for good in (True, True, True, True, False):
                if not good:
                    allowed.clear()
                writer.write(post(body, None, "Authorization: Bearer a"))
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                assert head.startswith(b"HTTP/1.1 200 " if good else b"HTTP/1.1 401 ")
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length is not None
                await reader.readexactly(int(length[1]))
            writer.close()
            await writer.wait_closed()
            await frontends.drain(0)

    asyncio.run(main())
