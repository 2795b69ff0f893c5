"""The zygote's side of :mod:`toolchain.worker`: imports a group of libraries once, forks a child a call.

It talks over one socket, a JSON object a line.  To it: ``{"id", "function", "request", "reply", "log"}``.
From it: ``{"ready": true}`` after the imports, ``{"id", "pid"}`` when a child starts and
``{"id", "status", "cpu"}`` when it has ended.  When the socket closes, everything that it started ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Container
from typing import Any

from toolchain.errors import ToolchainError

GROUPS: dict[str, tuple[str, ...]] = {
    "torch": ("numpy", "onnx", "torch", "torch.export", "onnxscript", "onnxruntime"),
    "onnx": ("numpy", "onnx", "onnxruntime"),
    "tvm": ("numpy", "onnx", "onnxruntime", "tvm", "tvm.relax", "tvm.relax.frontend.onnx"),
}
"""What each group's zygote imports before it forks."""

NO_SPACE_STATUS = 74
"""Exit status (EX_IOERR) of a child that could not write its log or reply because the disk is full."""

_FAILED_STATUS = 70
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
_GARBAGE_THRESHOLD = 100_000


def main() -> None:
    group, descriptor = sys.argv[1], int(sys.argv[2])
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    _keep_memory()
    _preload(group)
    _serve(connection)


def _keep_memory() -> None:
    """Let malloc keep what is freed: children live for seconds, and large arrays would fault in anew each time."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _preload(group: str) -> None:
    if group == "tvm":
        # tvm_ffi imports torch when it finds it: 2 s and 200 MB for nothing here.  TVM imports what it has for all
        # kinds of devices, and its distributed run-time to find out that the wheel lacks it: another 0.3 s.
        for name in ("torch", "tvm.runtime.disco"):
            sys.modules[name] = None  # type: ignore[assignment]
        os.environ["TVM_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if group == "torch":
        # OpenMP's threads otherwise spin while they wait for each other: most of the CPU time on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # OpenBLAS's threads (numpy's) spin for a while too before they sleep, once per process; 2^4 cycles instead of 2^26.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    import warnings

    warnings.simplefilter("ignore")
    # Modules and classes are no garbage: looking for some in them is lost time, here and in every child.
    gc.disable()
    for name in GROUPS[group]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()
    # A child lives for seconds and tracing makes millions of objects: the usual 700 costs it a twentieth of its time.
    gc.set_threshold(_GARBAGE_THRESHOLD, 20, 100)


def _serve(connection: socket.socket) -> None:
    # Orphaned grandchildren, also those in a session of their own, come to this process and are ended.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    children: dict[int, int] = {}
    buffer = b""
    wake_read, wake_write = os.pipe()
    sources: list[socket.socket | int] = [connection, wake_read]
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        _send(connection, {"ready": True})
        while True:
            ready, _, _ = select.select(sources, [], [])
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
                    pid = _fork(request, connection)
                    children[pid] = request["id"]
                    _send(connection, {"id": request["id"], "pid": pid})
    except (BrokenPipeError, ConnectionResetError):
        return  # the build process is gone
    finally:
        _end_everything(children)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _reap(children: dict[int, int], connection: socket.socket) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if (number := children.pop(pid, None)) is None:
            continue
        # What the child started and left behind must not outlive the call.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _end_strays(children)
        _send(connection, {"id": number, "status": status, "cpu": usage.ru_utime + usage.ru_stime})


def _end_strays(children: Container[int]) -> None:
    """Kill the processes that were handed to this one and are not its ``children``."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            pids = [int(pid) for pid in file.read().split()]
    except OSError:  # a kernel without this list: what stayed in the child's process group has ended all the same
        return
    for pid in pids:
        if pid not in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _end_everything(children: dict[int, int]) -> None:
    for pid in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            _end_strays(())
            time.sleep(0.005)


def _fork(request: dict[str, Any], connection: socket.socket) -> int:
    zygote = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    status = _FAILED_STATUS
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == zygote:
            connection.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = _child(request)
    finally:
        os._exit(status)


def _child(request: dict[str, Any]) -> int:
    """Run the call and write its reply; returns the exit status."""
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        reply = _encode(_call(request))
        for stream in (sys.stdout, sys.stderr):
            # A lost line of the log is no reason to lose the result.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        partial = request["reply"] + ".partial"
        with open(partial, "wb") as file:
            file.write(reply)
        os.replace(partial, request["reply"])
    except OSError as error:
        return NO_SPACE_STATUS if error.errno in (errno.ENOSPC, errno.EDQUOT) else _FAILED_STATUS
    return 0


def _call(request: dict[str, Any]) -> dict[str, Any]:
    try:
        module, name = request["function"].split(":")
        function: Callable[[dict[str, Any]], dict[str, Any]] = getattr(importlib.import_module(module), name)
        return {"result": function(request["request"])}
    except ToolchainError as error:
        if not error.debug:
            error.debug = traceback.format_exc()
        return {"error": error.to_json()}
    except MemoryError:
        return {"exception": "MemoryError: out of memory", "traceback": traceback.format_exc()}
    except BaseException as error:
        reply: dict[str, Any] = {
            "exception": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
        if isinstance(error, OSError):
            reply["errno"] = error.errno
        return reply


def _encode(reply: dict[str, Any]) -> bytes:
    try:
        return json.dumps(reply, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        failure = {"exception": f"the result is not JSON: {error}", "traceback": traceback.format_exc()}
        return json.dumps(failure).encode()


if __name__ == "__main__":
    main()
