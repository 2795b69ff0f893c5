"""A small serving core in memory, and a server of it on a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toolchain.runtime.server.api import (
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ServeError,
    Status,
    TensorSpec,
)
from toolchain.runtime.server.frontend import Frontends, FrontendSettings, Listen, TlsFiles, start

TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "double": ("FP32", (-1, 4)),
    "echo": ("", ()),
    "text": ("BYTES", (-1,)),
    "slow": ("FP32", (-1, 4)),
    "broken": ("FP32", (-1, 4)),
    "busy": ("FP32", (-1, 4)),
}


class SmallCore:
    """Models: double (x*2), echo (any inputs as they are), text, slow (waits for ``release``), broken, busy."""

    def __init__(self) -> None:
        self.unloaded: set[str] = set()
        self.cancelled = 0
        self.started = 0
        self.release = asyncio.Event()
        self.requests: list[InferRequest] = []
        self.keep = False

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return not self.unloaded

    def _known(self, name: str, version: str) -> None:
        if name not in TENSORS:
            raise ServeError(Status.NOT_FOUND, f"unknown model {name!r}")
        if version not in ("", "1"):
            raise ServeError(Status.NOT_FOUND, f"model {name!r} has no version {version!r}")

    def model_ready(self, name: str, version: str = "") -> bool:
        self._known(name, version)
        return name not in self.unloaded

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        self._known(name, version)
        datatype, shape = TENSORS[name]
        labels = ("zero", "one", "two", "three")
        if not datatype:  # echo: one of each
            return ModelMetadata(name, ("1",), "small", (), (TensorSpec("b", "BF16", (-1,)),))
        return ModelMetadata(
            name, ("1",), "small", (TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape, labels),)
        )

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        self._known(name, version)
        dims = list(TENSORS[name][1])[1:]
        data_type = f"TYPE_{TENSORS[name][0] or 'FP32'}"
        return {
            "name": name,
            "platform": "small",
            "max_batch_size": 8,
            "input": [{"name": "x", "data_type": data_type, "dims": dims}],
            "output": [{"name": "y", "data_type": data_type, "dims": dims}],
        }

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        names = [name] if name else sorted(TENSORS)
        for known in names:
            self._known(known, version)
        took = {"count": 3, "ns": 3000}
        keys = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        stats = {"inference_count": 3, "execution_count": 2, "inference_stats": dict.fromkeys(keys, took)}
        return [{"name": known, "version": "1", "last_inference": 5, **stats} for known in names]

    async def infer(self, request: InferRequest) -> InferResponse:
        self._known(request.model, request.version)
        if self.keep:
            self.requests.append(request)
        if request.model == "busy":
            raise ServeError(Status.FULL, "the queue is full", retry_after=1.2)
        if request.model == "broken":
            raise RuntimeError("broken")
        if request.model == "slow":
            self.started += 1
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if request.model == "echo":
            outputs = dict(request.inputs)
        else:
            x = request.inputs.get("x")
            if x is None or x.ndim != len(TENSORS[request.model][1]):
                raise ServeError(Status.INVALID, "input 'x' is missing or has another shape")
            outputs = {"y": x if request.model == "text" else x * 2}
        if request.outputs:
            outputs = {name: outputs[name] for name in request.outputs}
        return InferResponse(request.model, request.version or "1", request.id, outputs)

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        return None

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        states = [
            IndexEntry(n, "1", "UNAVAILABLE", "unloaded") if n in self.unloaded else IndexEntry(n, "1", "READY")
            for n in TENSORS
        ]
        return [entry for entry in states if entry.state == "READY" or not ready_only]

    async def load(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        self._known(name, "")
        self.unloaded.discard(name)

    async def unload(self, name: str) -> None:
        self._known(name, "")
        self.unloaded.add(name)

    def metrics(self) -> bytes:
        return b"# small\n"


class Running:
    """A running server, seen from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, core: SmallCore, frontends: Frontends) -> None:
        self.loop = loop
        self.core = core
        self.frontends = frontends
        self.http_port = frontends.http_port
        self.http = f"127.0.0.1:{frontends.http_port}"
        self.grpc = f"127.0.0.1:{frontends.grpc_port}"

    def drain(self, grace: float) -> None:
        asyncio.run_coroutine_threadsafe(self.frontends.drain(grace), self.loop).result(grace + 10)

    def do(self, call: Any) -> None:
        """Call something on the server's loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (call(), done.set()))
        assert done.wait(10)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.http_port), timeout=10)


@contextmanager
def serving(
    settings: FrontendSettings | None = None, *, grpc: bool = False, tls: TlsFiles | None = None
) -> Iterator[Running]:
    """A server of a :class:`SmallCore` on free ports, on a thread of its own."""
    import uvloop

    loop = uvloop.new_event_loop()

    async def begin() -> Running:
        core = SmallCore()
        listen = Listen("127.0.0.1", 0, 0 if grpc else None)
        return Running(loop, core, await start(core, settings or FrontendSettings(), listen, tls))

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    running = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
    try:
        yield running
    finally:
        running.do(running.core.release.set)
        running.drain(0.2)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
