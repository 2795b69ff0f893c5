"""Functions that worker children run in the tests: each takes and returns a JSON object."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError


def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"got": request, "pid": os.getpid(), "zygote": os.getppid()}


def where(request: dict[str, Any]) -> dict[str, Any]:
    import numpy

    return {"cwd": os.getcwd(), "numpy": numpy.__file__, "path": sys.path}


def segfault(request: dict[str, Any]) -> dict[str, Any]:
    # Reading address 0 through ctypes is a real SIGSEGV.
    ctypes.string_at(0)
    return {}


def kill_itself(request: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def exit_at_once(request: dict[str, Any]) -> dict[str, Any]:
    os._exit(request["status"])


def sys_exit(request: dict[str, Any]) -> dict[str, Any]:
    sys.exit("done here")


def raise_toolchain_error(request: dict[str, Any]) -> dict[str, Any]:
    raise ToolchainError("bad layer", where="conv1", hint="split it", code=ExitCode.EXPORT, details=["one", "two"])


def raise_value_error(request: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("seven is not eight")


def raise_disk_full(request: dict[str, Any]) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_json(request: dict[str, Any]) -> dict[str, Any]:
    return {"value": float("nan")} if request["nan"] else {"value": object()}


def print_a_lot(request: dict[str, Any]) -> dict[str, Any]:
    for number in range(request["lines"]):
        print(f"line {number} " + "x" * 80)
    print("to stderr", file=sys.stderr)
    os.write(1, b"from compiled code\n")
    return {"done": True}


def fill_memory_of_module(request: dict[str, Any]) -> dict[str, Any]:
    """Break a library for the rest of this process."""
    import numpy

    numpy.array = None  # type: ignore[assignment]
    return {}


def use_numpy(request: dict[str, Any]) -> dict[str, Any]:
    import numpy

    return {"sum": int(numpy.array([1, 2, 3]).sum())}


def burn(request: dict[str, Any]) -> dict[str, Any]:
    end = time.process_time() + request["seconds"]
    while time.process_time() < end:
        pass
    return {}


def start_grandchildren(request: dict[str, Any]) -> dict[str, Any]:
    """Start three sleepers (plain, in its own session, forked) and note the pids in a file; then return or sleep."""
    plain = subprocess.Popen(["sleep", "300"])
    session = subprocess.Popen(["sleep", "300"], start_new_session=True)
    forked = os.fork()
    if forked == 0:
        time.sleep(300)
        os._exit(0)
    pids = [os.getpid(), plain.pid, session.pid, forked]
    note(Path(request["pids"]), pids)
    time.sleep(request["sleep"])
    return {"pids": pids}


def sleep(request: dict[str, Any]) -> dict[str, Any]:
    note(Path(request["pids"]), [os.getpid(), os.getppid()])
    time.sleep(300)
    return {}


def note(path: Path, pids: list[int]) -> None:
    """Write pids at once, so that a reader never sees half of them."""
    partial = path.with_suffix(".partial")
    partial.write_text(" ".join(map(str, pids)))
    partial.rename(path)


def trace_code(request: dict[str, Any]) -> dict[str, Any]:
    """Run ``code`` under a recorder, with ``root`` first on the path; ``site`` joins the path before that."""
    from toolchain import source_loader
    from toolchain.trace import Recorder

    if request.get("cwd"):
        os.chdir(request["cwd"])
    sys.path[:0] = [request["root"], *request.get("site", [])]
    source_loader.install()
    recorder = Recorder(Path(request["root"]), [Path(p) for p in request.get("private", [])])
    names: dict[str, Any] = {"root": Path(request["root"])}
    exec(request["code"], names)
    return {"dependencies": recorder.dependencies(), "value": names.get("value")}
