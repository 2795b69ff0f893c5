"""The servers that are compared: how each is started, what it is sent, and what its processes cost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import Grpc, Http, LoadError, Wire

HERE = Path(__file__).parent
PEERS = HERE / "serve_peers"
#: A script that runs in our own environment.
OWN = "."
_START_SECONDS = 90.0
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Workload:
    """One model and one request of it: inputs, and the outputs that ONNX Runtime gives for them."""

    name: str
    model: Path
    release: Path
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def verify(self, answer: bytes) -> None:
        """Look for the first output in an answer, raw or as JSON.

        Raises:
            LoadError: it is not there.
        """
        expected = next(iter(self.outputs.values()))
        if len(answer) >= expected.nbytes:
            at = answer.rfind(expected.tobytes()[:16])
            tails = [at] if at >= 0 else [len(answer) - expected.nbytes]
            for start in tails:
                raw = answer[start : start + expected.nbytes]
                if len(raw) == expected.nbytes and np.allclose(
                    np.frombuffer(raw, expected.dtype), expected.ravel(), 1e-3, 1e-4
                ):
                    return
        try:
            numbers = _numbers(json.loads(answer))
        except ValueError:
            numbers = []
        for start in (0, len(numbers) - expected.size):
            part = np.array(numbers[max(start, 0) :][: expected.size], np.float64)
            if part.size == expected.size and np.allclose(part, expected.ravel(), 1e-3, 1e-4):
                return
        raise LoadError(f"not the expected outputs: {answer[:200]!r}")


def _numbers(document: Any) -> list[float]:
    """All numbers of the longest list in a JSON document."""
    if isinstance(document, dict):
        return max((_numbers(value) for value in document.values()), key=len, default=[])
    if not isinstance(document, list):
        return []
    if all(isinstance(value, int | float) for value in document):
        return document
    parts = [_numbers(value) for value in document]
    return (
        [number for part in parts for number in part]
        if not any(isinstance(v, dict) for v in document)
        else max(parts, key=len)
    )


def v2_json(work: Workload, path: str) -> Wire:
    """A request of the Open Inference Protocol with its tensors as JSON."""
    inputs = [
        {"name": name, "datatype": _datatype(a), "shape": a.shape, "data": a.ravel().tolist()}
        for name, a in work.inputs.items()
    ]
    return Http(path, json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"})


def v2_binary(work: Workload, path: str) -> Wire:
    """The same with its tensors, and those of the answer, behind the JSON."""
    inputs = [
        {"name": n, "datatype": _datatype(a), "shape": a.shape, "parameters": {"binary_data_size": a.nbytes}}
        for n, a in work.inputs.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Http(path, head + b"".join(a.tobytes() for a in work.inputs.values()), headers)


def v2_grpc(work: Workload, model: str) -> Wire:
    """The same over gRPC, raw contents."""
    from toolchain.runtime.server.proto import stubs

    pb = stubs()
    message = pb.ModelInferRequest(model_name=model)
    for name, array in work.inputs.items():
        message.inputs.add(name=name, datatype=_datatype(array), shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return Grpc(_METHOD, message.SerializeToString())


def plain_json(work: Workload, path: str) -> Wire:
    """Of servers with a protocol of their own: ``{name: nested lists}``."""
    body = json.dumps({name: array.tolist() for name, array in work.inputs.items()}).encode()
    return Http(path, body, {"Content-Type": "application/json"})


def plain_raw(work: Workload, path: str) -> Wire:
    """Of servers that take any body: the inputs' bytes one after the other."""
    body = b"".join(array.tobytes() for array in work.inputs.values())
    return Http(path, body, {"Content-Type": "application/octet-stream"})


def _datatype(array: np.ndarray) -> str:
    return {"float32": "FP32", "int64": "INT64"}[array.dtype.name]


@dataclass(frozen=True)
class Running:
    """A server that answers: its process, its ports, and what requests look like by protocol."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    wires: Mapping[str, Callable[[Workload], Wire]]

    def cpu(self) -> float:
        """CPU seconds of all of its processes."""
        return cpu_seconds(self.process.pid)


@dataclass(frozen=True)
class Server:
    """How a server is started; ``{model}`` and the like are put in by :meth:`running`.

    Attributes:
        name: as printed.
        venv: the peer's; OWN for a script in ours; "" for our server.
        script: the peer's file in ``serve_peers``, or our execution.
        wires: request by protocol ("json", "binary", "grpc").
        ready: a path that answers 200 when it is ready.
    """

    name: str
    venv: str
    script: str
    wires: Mapping[str, Callable[[Workload], Wire]]
    ready: str = ""
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self, work: Workload, venvs: Path) -> Iterator[Running]:
        """Start it for one model.

        Raises:
            LoadError: it does not start.
        """
        http, grpc = free_port(), free_port()
        with tempfile.TemporaryDirectory() as scratch:
            command = self._command(work, venvs, http, grpc)
            variables = {
                "MODEL": str(work.model),
                "HTTP_PORT": str(http),
                "GRPC_PORT": str(grpc),
                "METRICS_PORT": str(free_port()),
                "SCRATCH": scratch,
                "INPUTS": str(work.release.parent / "inputs.npz"),
                "OMP_NUM_THREADS": "1",
                **self.env,
            }
            log = Path(scratch) / "log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=scratch,
                    env={**os.environ, **variables},
                    start_new_session=True,
                )
            try:
                self._wait(process, http, log, work)
                yield Running(process, http, grpc, self.wires)
            finally:
                _end(process)

    def _command(self, work: Workload, venvs: Path, http: int, grpc: int) -> list[str]:
        if self.venv == OWN:
            return [sys.executable, str(PEERS / self.script)]
        if self.venv:
            return [str(venvs / self.venv / "bin" / "python"), str(PEERS / self.script)]
        ports = ["--http-port", str(http), "--grpc-port", str(grpc)]
        serve = [sys.executable, "-m", "toolchain.cli.main", "serve", str(work.release), *ports, "--threads", "1"]
        return [*serve, "--execution", self.script, *self.flags]

    def _wait(self, process: subprocess.Popen[bytes], port: int, log: Path, work: Workload) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                break
            if self._answers(port, work):
                return
            time.sleep(0.1)
        lines = log.read_text(errors="replace").strip().splitlines()
        raise LoadError(f"does not start: {lines[-1][:160] if lines else ''}")

    def _answers(self, port: int, work: Workload) -> bool:
        try:
            if self.ready:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{self.ready}", timeout=2) as response:
                    return response.status == 200
            wire = next(iter(self.wires.values()))(work)
            with socket.create_connection(("127.0.0.1", port), 2) as connection:
                connection.sendall(wire.request())
                connection.settimeout(10)
                return b" 200 " in connection.recv(4096)[:20]
        except OSError:
            return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and all of its processes."""
    members = [process.pid, *descendants(process.pid)]
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in members:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(root: int) -> list[int]:
    """All processes below ``root``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def cpu_seconds(root: int) -> float:
    """CPU time of a process and all below it, in seconds, to the nanosecond by what the scheduler counts."""
    total = 0
    for pid in (root, *descendants(root)):
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except (OSError, IndexError):
                continue
    return total / 1e9
