"""Worker processes: whatever a child does is reported, and nothing outlives the pool."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import descendants, read_pids, running, wait_until

from toolchain.errors import ExitCode, ToolchainError
from toolchain.install import install_command
from toolchain.worker import ChildEnd, WorkerPool

Call = Callable[..., ChildEnd]


@pytest.fixture
def call(pool: WorkerPool, tmp_path: Path) -> Call:
    return caller(pool, tmp_path)


def caller(pool: WorkerPool, folder: Path) -> Call:
    numbers = itertools.count()

    def call(function: str, **request: Any) -> ChildEnd:
        name = f"{function}-{next(numbers)}"
        reply, log = folder / f"{name}.reply", folder / f"{name}.log"
        return pool.call("onnx", f"helpers.calls:{function}", request, reply, log)

    return call


def zygote_of(call: Call) -> int:
    """The process id of the zygote: the parent of a child."""
    end = call("echo")
    assert end.reply is not None
    return int(end.reply["result"]["zygote"])


def test_a_call_returns_the_functions_result(call: Call) -> None:
    end = call("echo", number=3, text="é")
    assert end.reply is not None
    assert end.reply["result"]["got"] == {"number": 3, "text": "é"}
    assert end.status == 0


def test_every_call_has_a_process_of_its_own_from_the_same_zygote(call: Call) -> None:
    first, second = call("echo"), call("echo")
    assert first.reply is not None
    assert second.reply is not None
    assert first.reply["result"]["pid"] != second.reply["result"]["pid"]
    assert zygote_of(call) == zygote_of(call)


def test_what_one_call_breaks_the_next_does_not_see(call: Call) -> None:
    call("fill_memory_of_module")
    end = call("use_numpy")
    assert end.reply == {"result": {"sum": 6}}


@pytest.mark.parametrize(
    ("function", "request_", "words"),
    [
        ("segfault", {}, "killed by signal 11, SIGSEGV"),
        ("kill_itself", {}, "killed by signal 9, SIGKILL (out of memory?)"),
        ("exit_at_once", {"status": 3}, "ended with status 3 and no reply"),
        ("exit_at_once", {"status": 0}, "ended with status 0 and no reply"),
    ],
)
def test_a_child_that_dies_is_described_and_the_zygote_survives(
    call: Call, function: str, request_: dict[str, Any], words: str
) -> None:
    zygote = zygote_of(call)
    end = call(function, **request_)
    assert end.reply is None
    assert end.describe() == words
    assert not end.out_of_space
    assert zygote_of(call) == zygote


def test_a_child_killed_from_outside_is_described(call: Call, tmp_path: Path) -> None:
    ends: list[ChildEnd] = []
    thread = threading.Thread(target=lambda: ends.append(call("sleep", pids=str(tmp_path / "pids"))))
    thread.start()
    child, _ = read_pids(tmp_path / "pids")
    os.kill(child, signal.SIGTERM)
    thread.join(10)
    assert ends[0].describe() == "killed by signal 15, SIGTERM"


def test_a_toolchain_error_arrives_whole(call: Call) -> None:
    end = call("raise_toolchain_error")
    assert end.reply is not None
    error = ToolchainError.from_json(end.reply["error"])
    assert error.render() == "conv1: bad layer\n  one\n  two\n  hint: split it"
    assert error.code is ExitCode.EXPORT
    assert "raise_toolchain_error" in error.debug


def test_any_other_exception_arrives_with_its_traceback(call: Call) -> None:
    end = call("raise_value_error")
    assert end.reply is not None
    assert end.reply["exception"] == "ValueError: seven is not eight"
    assert "in raise_value_error" in end.reply["traceback"]


def test_sys_exit_is_an_exception_too(call: Call) -> None:
    end = call("sys_exit")
    assert end.reply is not None
    assert end.reply["exception"] == "SystemExit: done here"


def test_an_os_error_carries_its_number(call: Call) -> None:
    end = call("raise_disk_full")
    assert end.reply is not None
    assert end.reply["errno"] == 28


@pytest.mark.parametrize("nan", [True, False])
def test_a_result_that_is_not_json_is_explained(call: Call, nan: bool) -> None:
    end = call("no_json", nan=nan)
    assert end.reply is not None
    assert end.reply["exception"].startswith("the result is not JSON: ")


def test_output_of_any_length_goes_to_the_log(call: Call, tmp_path: Path) -> None:
    end = call("print_a_lot", lines=20_000)
    assert end.reply == {"result": {"done": True}}
    (log,) = tmp_path.glob("print_a_lot-*.log")
    text = log.read_text()
    assert text.count("\n") == 20_002
    assert "to stderr" in text
    assert "from compiled code" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_does_not_lose_the_result(pool: WorkerPool, tmp_path: Path) -> None:
    end = pool.call("onnx", "helpers.calls:print_a_lot", {"lines": 10}, tmp_path / "reply", Path("/dev/full"))
    assert end.reply is not None
    assert "No space left" in end.reply["exception"]
    assert end.reply["errno"] == 28


def test_cpu_seconds_are_the_childs_own(call: Call) -> None:
    assert 0.1 <= call("burn", seconds=0.1).cpu_seconds < 1.0
    assert call("echo").cpu_seconds < 0.1


def test_grandchildren_left_behind_end_with_the_call(call: Call, tmp_path: Path) -> None:
    end = call("start_grandchildren", pids=str(tmp_path / "pids"), sleep=0)
    assert end.reply is not None
    pids = end.reply["result"]["pids"]
    wait_until(lambda: not running(pids), "grandchildren end")


def test_calls_from_several_threads_run_side_by_side(call: Call) -> None:
    ends: dict[int, ChildEnd] = {}

    def one(number: int) -> None:
        ends[number] = call("echo", number=number)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    replies = {n: end.reply["result"]["got"]["number"] for n, end in ends.items() if end.reply}
    assert replies == {n: n for n in range(12)}


def test_files_of_the_current_folder_do_not_take_the_place_of_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')\n")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')\n")
    monkeypatch.chdir(tmp_path)
    with WorkerPool() as pool:
        end = caller(pool, tmp_path)("where")
    assert end.reply is not None
    assert end.reply["result"]["cwd"] == str(tmp_path)
    assert not end.reply["result"]["numpy"].startswith(str(tmp_path))


def failing_family(call: Call, pids: Path) -> tuple[threading.Thread, list[ToolchainError]]:
    """A call in a thread, whose child starts grandchildren and notes them in ``pids``; and what it will raise."""
    errors: list[ToolchainError] = []

    def one() -> None:
        with pytest.raises(ToolchainError) as caught:
            call("start_grandchildren", pids=str(pids), sleep=300)
        errors.append(caught.value)

    thread = threading.Thread(target=one)
    thread.start()
    return thread, errors


def test_closing_ends_running_children_and_grandchildren_and_their_calls(tmp_path: Path) -> None:
    pool = WorkerPool()
    call = caller(pool, tmp_path)
    thread, errors = failing_family(call, tmp_path / "pids")
    pids = read_pids(tmp_path / "pids")
    assert running(pids) == pids
    started = time.monotonic()
    pool.close()
    assert running(pids) == []
    assert time.monotonic() - started < 2
    thread.join(5)
    assert [error.code for error in errors] == [ExitCode.INTERRUPTED]
    with pytest.raises(ToolchainError, match="interrupted"):
        call("echo")
    assert pool.closed


def test_closing_a_pool_that_is_still_importing_takes_no_time(tmp_path: Path) -> None:
    pool = WorkerPool()
    errors: list[BaseException] = []

    def one() -> None:
        try:
            pool.call("tvm", "helpers.calls:echo", {}, tmp_path / "reply", tmp_path / "log")
        except ToolchainError as error:
            errors.append(error)

    thread = threading.Thread(target=one)
    thread.start()
    wait_until(lambda: bool(pool._zygotes), "the zygote starts")
    started = time.monotonic()
    pool.close()
    thread.join(5)
    assert time.monotonic() - started < 1
    assert [e.code for e in errors if isinstance(e, ToolchainError)] == [ExitCode.INTERRUPTED]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    pool = WorkerPool()
    pool.close()
    pool.close()


def test_a_killed_zygote_fails_its_calls_ends_their_processes_and_is_replaced(tmp_path: Path) -> None:
    with WorkerPool() as pool:
        call = caller(pool, tmp_path)
        thread, errors = failing_family(call, tmp_path / "pids")
        child, plain, session, forked = read_pids(tmp_path / "pids")
        os.kill(zygote_of(call), signal.SIGKILL)
        thread.join(5)
        end = "killed by signal 9, SIGKILL (out of memory?)"
        assert errors[0].what == f"the 'onnx' worker ended while it was needed: {end}"
        wait_until(lambda: not running([child, plain, forked]), "the child and its group end")
        os.kill(session, signal.SIGKILL)  # it had left the group, and its keeper is dead
        assert call("use_numpy").reply == {"result": {"sum": 6}}


_PARENT = """
import sys
from pathlib import Path
from toolchain.worker import WorkerPool
folder = Path(sys.argv[1])
pool = WorkerPool()
pool.call("onnx", "helpers.calls:start_grandchildren", {"pids": str(folder / "pids"), "sleep": 300},
          folder / "reply", folder / "log")
"""


def test_no_process_outlives_a_killed_build_process(tmp_path: Path) -> None:
    path = [str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], env=environment)
    try:
        pids = read_pids(tmp_path / "pids")
        below = descendants(parent.pid)
        assert set(pids) <= set(below)
        assert len(below) == 5  # the zygote, the child, three grandchildren
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not running(below), "everything ends")


def test_a_group_with_a_library_missing_says_which_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with WorkerPool() as pool, pytest.raises(ToolchainError) as caught:
        caller(pool, tmp_path)("echo")
    assert caught.value.what == "the 'onnx' worker did not start: ModuleNotFoundError: No module named 'numpy'"
    assert caught.value.hint == install_command("build")
    assert caught.value.code is ExitCode.MISSING_TOOL


def test_a_graph_call_goes_to_the_torch_zygote_where_one_runs_else_to_that_of_onnx(tmp_path: Path) -> None:
    def zygote(pool: WorkerPool, group: str, number: int) -> int:
        end = pool.call(group, "helpers.calls:echo", {}, tmp_path / f"reply-{number}", tmp_path / f"log-{number}")
        assert end.reply is not None
        return int(end.reply["result"]["zygote"])

    with WorkerPool() as pool:
        alone = zygote(pool, "graph", 0)
        assert alone == zygote(pool, "onnx", 1)
        torch = zygote(pool, "torch", 2)
        assert torch not in (alone, zygote(pool, "onnx", 3))
        assert zygote(pool, "graph", 4) == torch
