"""Ask a real server for everything at once for SECONDS, check every answer, and look for what grows.

    python benchmarks/soak_serve.py 600

Clients over REST (JSON, binary, gzip) and gRPC ask four models, one compiled ahead of time, for answers that say
which version gave them, while versions come and go in a watched folder, models are loaded with other configurations,
worker processes are killed, clients go away in the middle, and others send nonsense.  Ends with 1 if an answer was lost
or wrong, nonsense was not refused with a 4xx, or the memory or the open files of the server's processes grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper
from serve_models import aot_release, contract_of, onnx_release, small_model
from serve_servers import descendants

SWITCH_SECONDS = 4.0
KILL_SECONDS = 15.0
RELOAD_SECONDS = 6.0
SETTINGS = """schema = 1
http_port = 0
grpc_port = 0
admin = true
watch_interval_s = 0.3
[defaults]
threads = 1
max_batch_size = 8
trial_requests = 5
[models.wide]
execution = "thread"
[models.quick]
execution = "inline"
"""
MODELS = ("shift", "wide", "quick", "ahead")
#: The shape of a row.
_WIDTHS = {"shift": 8, "wide": 16384, "quick": 16, "ahead": 64}
_ROWS = 4
_COMPILER = Path(__file__).with_name("edge_build.py")


def offset_of(model: str, number: int) -> int:
    """What a version adds; the engines ahead of time are compiled once, so that versions take turns with two."""
    return 1 + number % 2 if model == "ahead" else number


def adds(offset: float, width: int | str = "width") -> ModelProto:
    """One row or more, of any width or of this: y = x + offset."""
    shape = ("float32", ("batch", width))
    node = helper.make_node("Add", ["x", "offset"], ["y"])
    return small_model([node], {"x": shape}, {"y": shape}, {"offset": np.array(offset, np.float32)})


@dataclass
class Found:
    """What happened: counts by kind, what went wrong, and the server's size over time."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    def expect(self, good: bool, what: str) -> None:
        if not good and len(self.wrong) < 20:
            self.wrong.append(what)
        self.counts["wrong"] += not good


class Soak:
    """A running server, its folder of releases, and the clients."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.found = Found()
        self.number = 1
        self.host, self.http, self.grpc = "127.0.0.1", 0, 0
        self.process: asyncio.subprocess.Process
        self.stopped = False

    async def run(self) -> Found:
        """Start the server, soak it, stop it."""
        for number in (1, 2):
            await self.compile(number)
        for model in MODELS:
            self.publish(model, 1)
        (self.folder / "serve.toml").write_text(SETTINGS)
        words = ["-m", "toolchain.cli.main", "serve", "--settings", str(self.folder / "serve.toml")]
        log = (self.folder / "log").open("wb")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *words, "--watch", str(self.folder / "releases"), stdout=asyncio.subprocess.PIPE, stderr=log
        )
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        ports = re.findall(r":(\d+)", line)
        assert len(ports) == 2, line + (self.folder / "log").read_text()
        self.http, self.grpc = map(int, ports)
        clients = [self.json_client, self.binary_client, self.grpc_client, self.leaver, self.vandal, self.reload]
        tasks = [asyncio.create_task(self.forever(client)) for client in clients]
        tasks += [asyncio.create_task(task()) for task in (self.switch, self.kill, self.sample)]
        try:
            await asyncio.sleep(self.seconds)
            self.stopped = True
            await asyncio.gather(*tasks)
            await self.end()
        finally:
            if self.process.returncode is None:
                self.process.kill()
        return self.found

    async def end(self) -> None:
        workers = descendants(self.process.pid)
        self.process.terminate()
        code = await asyncio.wait_for(self.process.wait(), 40)
        self.found.expect(code == 0, f"the server ended with {code}")
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        self.found.expect(not left, f"processes outlive the server: {left}")

    def publish(self, model: str, number: int) -> None:
        """Version ``number`` of a model, which adds that number; it appears at once."""
        making, version = self.folder / f"making-{model}-{number}", f"{number}.0.0"
        offset = offset_of(model, number)
        if model == "ahead":
            contract = json.loads((self.folder / f"ahead-{offset}" / "contract.json").read_text())
            made = aot_release(making, model, self.folder / f"ahead-{offset}" / "model.so", contract, version)
        else:
            made = onnx_release(making, model, adds(offset), version)
        target = self.folder / "releases" / model / f"{number}.0.0"
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)
        shutil.rmtree(making)

    async def compile(self, offset: int) -> None:
        """An engine ahead of time that adds ``offset``; the compiler is no part of this process."""
        folder = self.folder / f"ahead-{offset}"
        folder.mkdir()
        model = adds(offset, _WIDTHS["ahead"])
        onnx.save(model, folder / "model.onnx")
        (folder / "contract.json").write_text(json.dumps(contract_of(model)))
        words = [sys.executable, str(_COMPILER), str(folder), "host", str(folder)]
        compiler = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        told, _ = await compiler.communicate()
        assert (folder / "model.so").exists(), told.decode()

    async def forever(self, client: Callable[[], Awaitable[None]]) -> None:
        while not self.stopped:
            try:
                await client()
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                self.found.expect(False, f"{client.__name__}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)

    # What is asked and checked.

    def question(self) -> tuple[str, np.ndarray]:
        model = random.choice(MODELS)
        return model, np.random.default_rng().normal(size=(random.randint(1, _ROWS), _WIDTHS[model])).astype(np.float32)

    def judge(self, kind: str, model: str, x: np.ndarray, version: str, y: np.ndarray) -> None:
        self.found.counts[kind] += 1
        expected = x + np.float32(offset_of(model, int(version.partition(".")[0])))
        good = y.shape == x.shape and bool(np.allclose(y, expected, 1e-6, 1e-5))
        self.found.expect(good, f"{kind}: {model} {version} gave a wrong answer")

    async def json_client(self) -> None:
        """A connection that asks a few times, some of it compressed."""
        reader, writer = await asyncio.open_connection(self.host, self.http)
        try:
            for _ in range(random.randint(1, 20)):
                model, x = self.question()
                tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
                body = json.dumps({"inputs": [tensor]}).encode()
                headers = ""
                if random.random() < 0.2:
                    body, headers = gzip.compress(body, 1), "Content-Encoding: gzip\r\n"
                status, _, answer = await asked(reader, writer, f"/v2/models/{model}/infer", body, headers)
                if status != 200:
                    self.found.expect(False, f"json: {model} {status} {answer[:200]!r}")
                    continue
                document = json.loads(answer)
                (output,) = document["outputs"]
                y = np.array(output["data"], np.float32).reshape(output["shape"])
                self.judge("json", model, x, document["model_version"], y)
        finally:
            writer.close()

    async def binary_client(self) -> None:
        """The same with binary tensors."""
        reader, writer = await asyncio.open_connection(self.host, self.http)
        try:
            for _ in range(random.randint(1, 20)):
                model, x = self.question()
                body, headers = binary_body(x)
                status, length, answer = await asked(reader, writer, f"/v2/models/{model}/infer", body, headers)
                if status != 200:
                    self.found.expect(False, f"binary: {model} {status} {answer[:200]!r}")
                    continue
                document = json.loads(answer[:length])
                y = np.frombuffer(answer[length:], np.float32).reshape(document["outputs"][0]["shape"])
                self.judge("binary", model, x, document["model_version"], y)
        finally:
            writer.close()

    async def grpc_client(self) -> None:
        """The same over gRPC; one call of ten is given up at once."""
        import grpc

        from toolchain.runtime.server.proto import stubs

        pb = stubs()
        async with grpc.aio.insecure_channel(f"{self.host}:{self.grpc}") as channel:
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                pb.ModelInferRequest.SerializeToString,
                pb.ModelInferResponse.FromString,
            )
            for _ in range(50):
                model, x = self.question()
                message = pb.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
                message.inputs.add(name="x", datatype="FP32", shape=x.shape)
                going = call(message)
                if random.random() < 0.1:
                    await asyncio.sleep(random.random() * 0.002)
                    going.cancel()
                    self.found.counts["gRPC calls given up"] += 1
                    continue
                try:
                    answer = await going
                except grpc.aio.AioRpcError as error:
                    self.found.expect(False, f"grpc: {model} {error.code()} {error.details()}")
                    continue
                y = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
                self.judge("grpc", model, x, answer.model_version, y)

    # What must do no harm.

    async def leaver(self) -> None:
        """Sends a request, whole or in part, and goes."""
        _, writer = await asyncio.open_connection(self.host, self.http)
        model, x = self.question()
        body, headers = binary_body(x)
        data = head(f"/v2/models/{model}/infer", body, headers) + body
        writer.write(data[: random.choice([len(data), random.randrange(len(data))])])
        await writer.drain()
        await asyncio.sleep(random.random() * 0.01)
        writer.transport.abort()
        self.found.counts["clients that left"] += 1

    async def vandal(self) -> None:
        """Sends what is wrong in one way or another."""
        model, x = self.question()
        good, headers = binary_body(x)
        size = int(headers.partition(": ")[2].split()[0])
        lie = f"Inference-Header-Content-Length: {size + random.randint(1, 999)}\r\n"
        cases: list[tuple[str, bytes, str]] = [
            (f"/v2/models/{model}/infer", b'{"inputs": [', ""),
            (f"/v2/models/{model}/infer", random.randbytes(200), ""),
            (f"/v2/models/{model}/infer", good, lie),
            (f"/v2/models/{model}/infer", good[:-4], headers),
            (f"/v2/models/{model}/infer", good + b"1234", headers),
            (f"/v2/models/{model}/infer", binary_body(x, "y")[0], binary_body(x, "y")[1]),
            (f"/v2/models/{model}x/infer", good, headers),
            (f"/v2/models/{model}/versions/77777.0.0/infer", good, headers),
            (f"/v2/models/{model}/infer", gzip.compress(good)[:-9], headers + "Content-Encoding: gzip\r\n"),
        ]
        reader, writer = await asyncio.open_connection(self.host, self.http)
        try:
            path, body, extra = random.choice(cases)
            status, _, answer = await asked(reader, writer, path, body, extra)
            good_answer = 400 <= status < 500 and "error" in json.loads(answer)
            self.found.expect(good_answer, f"nonsense: {path} {body[:40]!r} {status} {answer[:200]!r}")
            self.found.counts["nonsense refused"] += 1
        finally:
            writer.close()
        await asyncio.sleep(0.01)

    # What happens meanwhile.

    async def switch(self) -> None:
        """New versions of all models; the folders of old ones go."""
        while not self.stopped:
            await self.pause(SWITCH_SECONDS)
            self.number += 1
            for model in MODELS:
                await asyncio.to_thread(self.publish, model, self.number)
                if self.number > 3:
                    gone = self.folder / "releases" / model / f"{self.number - 3}.0.0"
                    await asyncio.to_thread(shutil.rmtree, gone)
            self.found.counts["versions"] += len(MODELS)

    async def kill(self) -> None:
        """Kill a worker process."""
        while not self.stopped:
            await self.pause(KILL_SECONDS)
            workers = descendants(self.process.pid)
            if workers and not self.stopped:
                # It may have ended by itself, as its version went.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(workers), signal.SIGKILL)
                    self.found.counts["workers killed"] += 1

    async def reload(self) -> None:
        """Load a model with another configuration; it cannot be where a version goes at that moment."""
        await self.pause(RELOAD_SECONDS)
        model, config = random.choice(MODELS), {"max_batch_size": random.randint(_ROWS, 64)}
        body = json.dumps({"parameters": {"config": json.dumps(config)}} if random.random() < 0.7 else {}).encode()
        reader, writer = await asyncio.open_connection(self.host, self.http)
        try:
            status, _, answer = await asked(reader, writer, f"/v2/repository/models/{model}/load", body)
            self.found.expect(status in (200, 503), f"load: {model} {config} {status} {answer[:200]!r}")
            self.found.counts["loads with a configuration"] += status == 200
        finally:
            writer.close()

    async def sample(self) -> None:
        """Memory and open files of all processes, often enough for a median of each quarter."""
        started = time.monotonic()
        while not self.stopped:
            memory = sum(map(private_mb, [self.process.pid, *descendants(self.process.pid)]))
            files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
            self.found.samples.append((time.monotonic() - started, memory, files))
            await self.pause(max(0.2, self.seconds / 200))

    async def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopped and time.monotonic() < end:
            await asyncio.sleep(0.1)


def binary_body(x: np.ndarray, name: str = "x") -> tuple[bytes, str]:
    """A request with a binary tensor, and its header."""
    entry = {"name": name, "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    start = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return start + x.tobytes(), f"Inference-Header-Content-Length: {len(start)}\r\n"


def head(path: str, body: bytes, headers: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()


async def asked(reader: Any, writer: Any, path: str, body: bytes, headers: str = "") -> tuple[int, int, bytes]:
    """Status, length of the JSON in front of binary tensors, and body of an answer."""
    writer.write(head(path, body, headers) + body)
    await writer.drain()
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", answer)
    before = re.search(rb"(?i)\r\ninference-header-content-length: *(\d+)", answer)
    assert length is not None
    content = await asyncio.wait_for(reader.readexactly(int(length[1])), 30)
    return int(answer[9:12]), int(before[1]) if before else 0, content


def private_mb(pid: int) -> float:
    """Megabytes of memory that a process has for itself, and its share of what it shares with the server.

    Files that are mapped do not count: how they are shared depends on what else runs on the machine.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(map(int, re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+)", text))) / 1e3


def growth(values: list[float]) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = len(values) // 4
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[3 * quarter :])


def report(found: Found, seconds: float) -> bool:
    """Print what was found; whether all of it is good."""
    asked_for = sum(found.counts[kind] for kind in ("json", "binary", "grpc"))
    print(f"{seconds:g} s: {asked_for} answers checked, {found.counts['wrong']} wrong or lost")
    print("  " + ", ".join(f"{kind} {count}" for kind, count in sorted(found.counts.items()) if kind != "wrong"))
    memory = growth([sample[1] for sample in found.samples])
    files = growth([float(sample[2]) for sample in found.samples])
    print(f"  memory of all processes: {memory[0]:.1f} MB in the second quarter, {memory[1]:.1f} MB in the last")
    late = np.array([sample[:2] for sample in found.samples[len(found.samples) // 4 :]])
    slope, _ = np.polyfit(late[:, 0] / 60, late[:, 1], 1)
    print(f"  memory from the second quarter on: {slope:+.2f} MB a minute")
    print(f"  open files of the server: {files[0]:.0f} in the second quarter, {files[1]:.0f} in the last")
    for line in found.wrong:
        print(f"  {line}")
    # Short runs are still filling their caches.
    allowed = 1.03 if seconds >= 300 else 1.15
    flat = memory[1] <= memory[0] * allowed + 2 and files[1] <= files[0] + 8
    if not flat:
        print("  memory or open files grow")
    return flat and not found.counts["wrong"] and asked_for > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(Soak(Path(folder), seconds).run())
    sys.exit(not report(found, seconds))


if __name__ == "__main__":
    main()
