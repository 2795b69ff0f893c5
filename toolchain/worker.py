"""Worker processes: every stage runs in a child, so a crash in a library is a report, not the end.

One *zygote* per group of libraries imports them once and forks a child for each call: a child starts
in milliseconds and with a clean state, and what one call imports or breaks no other call sees.
The zygote's own process group is not the terminal's, so Ctrl-C reaches the build process alone, which
then ends the children and everything that they started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.install import install_command
from toolchain.zygote import GROUPS, NO_SPACE_STATUS

__all__ = ["GROUPS", "ChildEnd", "WorkerPool"]

_HOSTS = {"graph": ("torch", "onnx")}
"""A group without a zygote of its own: the first of these that runs already is asked, else the last is started.

Both hold what it needs; ``torch`` also holds libraries that children of ``onnx`` would have to import.
"""


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended: its JSON reply, or the signal or exit status that took it without one."""

    reply: dict[str, Any] | None
    status: int
    cpu_seconds: float

    @property
    def out_of_space(self) -> bool:
        """Whether it could not even write its reply because the disk is full."""
        return self.reply is None and self.status == NO_SPACE_STATUS << 8

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it, as the kernel does to whom it takes memory back from."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def describe(self) -> str:
        """E.g. ``"killed by signal 11, SIGSEGV"``; meaningful when there is no reply."""
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = f", {signal.Signals(number).name}" if number in set(signal.Signals) else ""
            return f"killed by signal {number}{name}" + (" (out of memory?)" if self.killed else "")
        return f"ended with status {os.waitstatus_to_exitcode(self.status)} and no reply"


class WorkerPool:
    """Starts zygotes on demand and runs calls in children; safe to use from several threads."""

    def __init__(self) -> None:
        self._zygotes: dict[str, _Zygote] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def call(self, group: str, function: str, request: dict[str, Any], reply: Path, log: Path) -> ChildEnd:
        """Run ``function`` (``"module:name"``, taking and returning a JSON dict) in a child of ``group``.

        Args:
            group: one of :data:`GROUPS`, or ``"graph"``: whichever of ``torch`` and ``onnx`` costs less.
            function: its module is imported in the child.
            request: its argument.
            reply: where the child writes its reply; a path in an existing folder.
            log: file that gets the child's standard output and error.

        Raises:
            ToolchainError: MISSING_TOOL when a library of the group is not installed, INTERRUPTED when the
                pool is closed, INTERNAL when the zygote ends for another reason.
        """
        with self._lock:
            if self._closed:
                raise interrupted()
            zygote = self._zygote(group)
        status, cpu = zygote.run({"function": function, "request": request, "reply": str(reply), "log": str(log)})
        data = json.loads(reply.read_bytes()) if reply.exists() else None
        return ChildEnd(data, status, cpu)

    def _zygote(self, group: str) -> _Zygote:
        """A living zygote for ``group``, started if there is none; the lock is held."""
        *_, own = hosts = _HOSTS.get(group, (group,))
        for host in hosts:
            if (zygote := self._zygotes.get(host)) is not None and zygote.alive():
                return zygote
        zygote = self._zygotes[own] = _Zygote(own)
        return zygote

    def close(self) -> None:
        """End all zygotes and children, running ones included."""
        with self._lock:
            self._closed = True
            zygotes, self._zygotes = list(self._zygotes.values()), {}
        for zygote in zygotes:
            zygote.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interrupted() -> ToolchainError:
    """The error of everything that was under way when the pool was closed."""
    return ToolchainError("the build was interrupted", code=ExitCode.INTERRUPTED)


class _Zygote:
    """The build process's end of one zygote."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._pending: dict[int, _Call] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._ready = self._closing = self._dead = False
        self._errors: list[bytes] = []
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file of the current folder never takes the place of a library.
                [sys.executable, "-P", "-m", "toolchain.zygote", group, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
            )
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()
        self._reply_reader = threading.Thread(target=self._read_replies, daemon=True)
        self._reply_reader.start()

    def alive(self) -> bool:
        return not self._dead and self._process.poll() is None

    def run(self, request: dict[str, Any]) -> tuple[int, float]:
        """Fork a child for ``request`` and wait for it: (wait status, CPU seconds)."""
        call = _Call(threading.Event())
        with self._lock:
            self._next += 1
            number = self._next
            self._pending[number] = call
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps({**request, "id": number}).encode() + b"\n")
        # The zygote may die between its last look at the pending calls and this one's entry among them.
        while not call.done.wait(0.2) and not self._dead:
            pass
        if call.answer is None:
            raise self._broken()
        return call.answer

    def close(self) -> None:
        self._closing = True
        # Closing the socket tells the zygote to end its children; before it is ready it has none.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=2 if self._ready else 0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reply_reader.join(timeout=2)

    def _broken(self) -> ToolchainError:
        if self._closing:
            return interrupted()
        text = b"".join(self._errors).decode(errors="replace").strip()
        end = ChildEnd(None, _wait_status(self._process.returncode), 0.0).describe()
        last = text.splitlines()[-1] if text else end
        missing = not self._ready and ("No module named" in last or "cannot open shared object" in last)
        happened = "ended while it was needed" if self._ready else "did not start"
        return ToolchainError(
            f"the {self._group!r} worker {happened}: {last}",
            hint=install_command("build") if missing else "run again with --debug for the whole output",
            code=ExitCode.MISSING_TOOL if missing else ExitCode.INTERNAL,
            debug=text,
        )

    def _read_errors(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                self._errors = [*self._errors[-200:], line]

    def _read_replies(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as file:
            for line in file:
                self._take(json.loads(line))
        self._process.wait()
        # A zygote that was killed could not end what its children had started.
        for call in list(self._pending.values()):
            if call.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(call.pid, signal.SIGKILL)
        self._error_reader.join(timeout=2)
        with self._lock:
            self._dead = True
            self._socket.close()
        for call in list(self._pending.values()):
            call.done.set()

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready = True
        elif "pid" in message:
            self._pending[message["id"]].pid = message["pid"]
        else:
            call = self._pending.pop(message["id"])
            call.answer = (int(message["status"]), float(message["cpu"]))
            call.done.set()


@dataclass(slots=True)
class _Call:
    """A call under way: its child's process id once it has started, (wait status, CPU seconds) once it ended."""

    done: threading.Event
    pid: int = 0
    answer: tuple[int, float] | None = None


def _environment() -> dict[str, str]:
    environment = dict(os.environ, PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
    folder = Path(__file__).resolve().parent.parent
    if folder.name not in ("site-packages", "dist-packages"):
        # The package may be run from a checkout that is not on the children's path.
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def _wait_status(returncode: int | None) -> int:
    return -(returncode or 0) if (returncode or 0) < 0 else (returncode or 0) << 8
