"""Worker processes: every stage runs in a child, so a crash in a library is a report, not the end.

One *zygote* per group of libraries imports them once and forks a child for each call: a child starts
in milliseconds and with a clean state, and what one call imports or breaks no other call sees.
The zygote's own process group is not the terminal's, so Ctrl-C reaches the build process alone, which
then ends the children and everything that they started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError

GROUPS: dict[str, tuple[str, ...]] = {
    "torch": ("numpy", "onnx", "torch", "torch.export", "onnxscript"),
    "onnx": ("numpy", "onnx", "onnxruntime"),
    "tvm": ("numpy", "onnx", "onnxruntime", "tvm", "tvm.relax", "tvm.relax.frontend.onnx"),
}
"""What each group's zygote imports before it forks."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended: its JSON reply, or the signal or exit status that took it without one."""

    reply: dict[str, Any] | None
    status: int
    cpu_seconds: float

    def describe(self) -> str:
        """E.g. ``"killed by SIGSEGV"``; meaningful when there is no reply."""
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"ended with status {os.waitstatus_to_exitcode(self.status)} and no reply"


class WorkerPool:
    """Starts zygotes on demand and runs calls in children; safe to use from several threads."""

    def __init__(self) -> None:
        self._zygotes: dict[str, _Zygote] = {}
        self._lock = threading.Lock()
        self._closed = False

    def call(self, group: str, function: str, request: dict[str, Any], reply: Path, log: Path) -> ChildEnd:
        """Run ``function`` (``"module:name"``, taking and returning a JSON dict) in a child of ``group``.

        Args:
            reply: where the child writes its reply; a path in an existing folder.
            log: file that gets the child's standard output and error.
        """
        with self._lock:
            if self._closed:
                raise ToolchainError("the build was interrupted", code=ExitCode.INTERRUPTED)
            zygote = self._zygotes.get(group)
            if zygote is None or not zygote.alive():
                zygote = self._zygotes[group] = _Zygote(group)
        status, cpu = zygote.run({"function": function, "request": request, "reply": str(reply), "log": str(log)})
        data = json.loads(reply.read_text()) if reply.exists() else None
        return ChildEnd(data, status, cpu)

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


class _Zygote:
    """The build process's end of one zygote."""

    def __init__(self, group: str) -> None:
        self._socket, theirs = socket.socketpair()
        environment = dict(os.environ, PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
        # The package may be run from a checkout that is not on the children's path.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "toolchain.worker", group, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
        self._group = group
        self._pending: dict[int, tuple[threading.Event, list[Any]]] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._dead = False
        self._errors: list[bytes] = []
        threading.Thread(target=self._read_errors, daemon=True).start()
        threading.Thread(target=self._read_replies, daemon=True).start()

    def alive(self) -> bool:
        return not self._dead and self._process.poll() is None

    def run(self, request: dict[str, Any]) -> tuple[int, float]:
        """Fork a child for ``request`` and wait for it: (wait status, CPU seconds)."""
        event, answer = threading.Event(), []
        with self._lock:
            self._next += 1
            number = self._next
            self._pending[number] = (event, answer)
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps({**request, "id": number}).encode() + b"\n")
        while not event.wait(0.2):
            if self._dead and not event.is_set():
                raise self._broken()
        if not answer:
            raise self._broken()
        return int(answer[0]), float(answer[1])

    def close(self) -> None:
        # Closing the socket tells the zygote to end its children; it gets a second to do so.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._socket.close()

    def _broken(self) -> ToolchainError:
        text = b"".join(self._errors).decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no message"
        missing = "No module named" in last
        return ToolchainError(
            f"the {self._group!r} worker did not start: {last}",
            hint="pip install 'toolchain[build]'" if missing else "run again with --debug for the whole output",
            code=ExitCode.MISSING_TOOL if missing else ExitCode.INTERNAL,
            debug=text,
        )

    def _read_errors(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        for line in stream:
            self._errors = [*self._errors[-200:], line]

    def _read_replies(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as file:
            for line in file:
                message = json.loads(line)
                event, answer = self._pending.pop(message["id"])
                answer += [message["status"], message["cpu"]]
                event.set()
        self._process.wait()
        self._dead = True
        for event, _ in list(self._pending.values()):
            event.set()


# ---- the zygote's side ----------------------------------------------------------------------------


def _preload(group: str) -> None:
    if group == "tvm":
        # tvm_ffi imports torch when it finds it: 2 s and 200 MB for nothing here.
        sys.modules["torch"] = None  # type: ignore[assignment]
    import warnings

    warnings.simplefilter("ignore")
    for name in GROUPS[group]:
        importlib.import_module(name)


def _serve(connection: socket.socket) -> None:
    children: dict[int, int] = {}
    buffer = b""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        while True:
            ready, _, _ = select.select([connection, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 512)
                _reap(children, connection)
            if connection in ready:
                data = connection.recv(1 << 16)
                if not data:
                    return
                buffer += data
                while b"\n" in buffer:
                    line, buffer = buffer.split(b"\n", 1)
                    request = json.loads(line)
                    children[_fork(request, connection)] = request["id"]
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _reap(children: dict[int, int], connection: socket.socket) -> None:
    while children:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if (number := children.pop(pid, None)) is None:
            continue
        cpu = usage.ru_utime + usage.ru_stime
        connection.sendall(json.dumps({"id": number, "status": status, "cpu": cpu}).encode() + b"\n")


def _fork(request: dict[str, Any], connection: socket.socket) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _child(request)
        status = 0
    finally:
        os._exit(status)


def _child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    reply: dict[str, Any]
    try:
        module, name = request["function"].split(":")
        function: Callable[[dict[str, Any]], dict[str, Any]] = getattr(importlib.import_module(module), name)
        reply = {"result": function(request["request"])}
    except ToolchainError as error:
        if not error.debug:
            error.debug = traceback.format_exc()
        reply = {"error": error.to_json()}
    except MemoryError:
        reply = {"exception": "MemoryError: out of memory", "traceback": traceback.format_exc()}
    except BaseException as error:
        reply = {"exception": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        if isinstance(error, OSError):
            reply["errno"] = error.errno
    sys.stdout.flush()
    sys.stderr.flush()
    partial = request["reply"] + ".partial"
    with open(partial, "w") as file:
        json.dump(reply, file)
    os.replace(partial, request["reply"])


def main() -> None:
    group, descriptor = sys.argv[1], int(sys.argv[2])
    connection = socket.socket(fileno=descriptor)
    _preload(group)
    _serve(connection)


if __name__ == "__main__":
    main()
