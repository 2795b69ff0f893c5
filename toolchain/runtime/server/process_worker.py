"""One worker process as the server sees it: started, given jobs, and given up when it dies."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from toolchain.bundle.manifest import Tolerance
from toolchain.errors import ToolchainError
from toolchain.runtime.server import spare
from toolchain.runtime.server.batcher import Job
from toolchain.runtime.server.slots import HEADER, MESSAGE_BYTES, Kind, Shapes, Slot, TensorLayout

if TYPE_CHECKING:
    import numpy as np

#: Jobs that a worker may hold: one runs while the next is already in memory.
SLOTS = 2
_QUICK_NS = 1_000_000
_STEP = 0.002
_STEPS = 100
_clock = time.monotonic_ns


@dataclass(frozen=True, slots=True)
class Launch:
    """What a worker process is started with.

    Attributes:
        folder: the files of the bundle.
        provider: ONNX Runtime execution provider.
        threads: threads of one run; 0: all processors.
        tensor_bytes: most bytes of the inputs, and of the outputs, of one run.
        selftest: the tolerance to test with before it is ready; None: no test.
    """

    folder: Path
    provider: str
    threads: int
    tensor_bytes: int
    selftest: Tolerance | None = None


class Owner(Protocol):
    """Who is told what happens to a worker, on the loop's thread."""

    inputs: TensorLayout
    outputs: TensorLayout

    def ready(self, worker: ProcessWorker, facts: dict[str, float]) -> None: ...
    def done(self, job: Job, outputs: list[np.ndarray], infer_ns: int) -> None: ...
    def idle(self) -> None: ...
    def failed(self, job: Job, message: str) -> None: ...
    def died(self, worker: ProcessWorker, reason: str, refusal: ToolchainError | None) -> None: ...


class ProcessWorker:
    """A worker process, starting from its construction on."""

    def __init__(self, owner: Owner, launch: Launch, axes: tuple[int, ...]) -> None:
        self._owner = owner
        self._axes = axes
        self._limit = launch.tensor_bytes + 64 * len(owner.inputs.dtypes)
        self._slots = [Slot.create() for _ in range(SLOTS)]
        self._free = list(range(SLOTS))
        self._known: dict[tuple[int, Shapes], bytes] = {}
        self._refusal: ToolchainError | None = None
        self.jobs: deque[tuple[int, Job]] = deque()
        self.is_ready = False
        self.served = 0
        self.mean_ns = float(_QUICK_NS)
        self.reason = ""
        self._process, self._channel = spare.take()
        self._send_launch(launch)
        self._channel.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel.fileno(), self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def room(self) -> bool:
        """Whether it may be given a job: it is idle, or its runs are so short that waiting for it would show."""
        jobs = len(self.jobs)
        return jobs == 0 or (jobs < SLOTS and self.mean_ns < _QUICK_NS)

    def start_job(self, job: Job) -> None:
        """Write the job's inputs into shared memory and tell the process."""
        index = self._free.pop()
        members = job.members
        slot = self._slots[index]
        arrays = members[0].arrays
        shapes = tuple([array.shape for array in arrays])
        if len(members) > 1:
            pairs = zip(shapes, self._axes, strict=True)
            shapes = tuple((*shape[:axis], job.rows, *shape[axis + 1 :]) for shape, axis in pairs)
        try:
            views = slot.views(self._owner.inputs, shapes, self._limit)
        except (ValueError, OSError, MemoryError) as error:
            self._free.append(index)
            self._owner.failed(job, f"there is no room for the inputs: {error}")
            return
        if len(members) == 1:
            for view, array in zip(views, arrays, strict=True):
                view[...] = array
        else:
            self._merge(job, views)
        self.jobs.append((index, job))
        key = index, shapes
        message = self._known.get(key)
        if message is None:
            if len(self._known) > 256:
                self._known.clear()
            message = self._known[key] = self._owner.inputs.pack(Kind.RUN, index, 0, shapes)
        job.input_ns = _clock() - job.started
        try:
            self._channel.send(message)
        except OSError:
            # It is dead; the end of its socket is about to be read.
            return

    def _merge(self, job: Job, views: list[np.ndarray]) -> None:
        for position, (view, axis) in enumerate(zip(views, self._axes, strict=True)):
            start = 0
            before = (slice(None),) * axis
            for member in job.members:
                end = start + member.fit.rows
                view[(*before, slice(start, end))] = member.arrays[position]
                start = end

    def trim(self) -> None:
        """Give back memory that large runs needed and that has not been used lately."""
        for index in self._free:
            self._slots[index].trim()

    def kill(self, reason: str) -> None:
        """End it now; what it was at counts as crashed for ``reason``."""
        self.reason = self.reason or reason
        self._process.kill()

    async def stop(self) -> None:
        """Let it end by itself, and make it end if it does not."""
        self._close()
        for _ in range(_STEPS):
            if self._process.poll() is not None:
                return
            await asyncio.sleep(0.01)
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    def _send_launch(self, launch: Launch) -> None:
        arguments = {
            "folder": str(launch.folder),
            "provider": launch.provider,
            "threads": launch.threads,
            "tensor_bytes": launch.tensor_bytes,
            "selftest": None if launch.selftest is None else asdict(launch.selftest),
        }
        try:
            socket.send_fds(self._channel, [json.dumps(arguments).encode()], [slot.fd for slot in self._slots])
        except OSError:
            # It is dead already; the end of its socket is about to be read.
            return

    def _readable(self) -> None:
        try:
            message = self._channel.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._loop.remove_reader(self._channel.fileno())
            self._gone(0)
            return
        kind, _, _, nanoseconds = HEADER.unpack_from(message)
        if kind == Kind.DONE:
            slot, job = self.jobs.popleft()
            self.served += 1
            self.mean_ns += (nanoseconds - self.mean_ns) / 8
            shapes = self._owner.outputs.unpack(message[HEADER.size :])
            views = self._slots[slot].views(self._owner.outputs, shapes)
            self._owner.done(job, views, nanoseconds)
            self._free.append(slot)
            self._owner.idle()
        elif kind == Kind.FAILED:
            slot, job = self.jobs.popleft()
            self._free.append(slot)
            self._owner.failed(job, message[HEADER.size :].decode(errors="replace"))
        elif kind == Kind.READY:
            self.is_ready = True
            self._owner.ready(self, json.loads(message[HEADER.size :]))
        else:
            self._refusal = ToolchainError.from_json(json.loads(message[HEADER.size :]))

    def _gone(self, step: int) -> None:
        """Its end of the socket is closed: wait for the process to have ended, to be able to say how."""
        code = self._process.poll()
        if code is None and step < _STEPS:
            self._loop.call_later(_STEP, self._gone, step + 1)
            return
        self._process.kill()
        self._close()
        self.is_ready = False
        self._owner.died(self, self.reason or _ending(code), self._refusal)

    def _close(self) -> None:
        if self._channel.fileno() < 0:
            return
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        for slot in self._slots:
            slot.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "its process closed the connection"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        return f"its process was ended by signal {-code} ({name})"
    return f"its process ended with code {code}"
