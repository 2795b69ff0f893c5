"""Ctrl-C, a kill and two builds at once, with whole build processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.processes import descendants, read_pids, running, wait_until
from helpers.stages import runs

from toolchain.artifact import Artifact
from toolchain.cache import Cache

_BUILD = """
import os, sys
from pathlib import Path
from helpers import stages
from helpers.stages import Code, text_node
from toolchain.cache import Cache
from toolchain.errors import ToolchainError
from toolchain.execute import Silent, execute
from toolchain.runner import Node, Runner
folder, repo, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sleep = '''
import subprocess, tempfile, time, os
from pathlib import Path
from helpers.calls import note
(ctx.output('text') / 'half.txt').write_text('half')
tempfile.mkdtemp(prefix='toolchain-left-')
child = subprocess.Popen(['sleep', '300'])
note(Path({!r}), [os.getpid(), child.pid])
time.sleep(300)
'''
nodes = [text_node("first", "one", trail=folder / "trail"), text_node("second", x="first", trail=folder / "trail")]
if what == "sleep":
    nodes += [Node(f"sleep{n}", stages.CODE, Code(sleep.format(str(folder / f"pids{n}")))) for n in range(2)]
else:
    nodes += [text_node(f"n{n}", str(n), x="second", trail=folder / "trail", seconds=0.1) for n in range(6)]
class Say(Silent):
    def started(self, node):
        os.write(1, f"started {node.id}\\n".encode())  # at once, whatever the other threads say
runner = Runner(Cache(folder / "cache"), repo, "recipe")
try:
    with runner.pool, runner.cache.in_use():
        outcomes = execute(nodes, runner, 3, Say())
    runner.cache.save_digests()
except KeyboardInterrupt:
    sys.exit(130)
except ToolchainError as error:
    print(error)
    sys.exit(int(error.code))
print("done", " ".join(outcomes[n.id].status for n in nodes))
"""


@contextlib.contextmanager
def build(folder: Path, repo: Path, what: str = "plain") -> Iterator[subprocess.Popen[str]]:
    """A build process; killed at the end if it is still there."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(folder), str(repo), what],
        env=dict(os.environ, PYTHONPATH=path),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def statuses(process: subprocess.Popen[str]) -> list[str]:
    """What became of each node, once the build is done."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out.rpartition("done ")[2].split()


def sleeping(folder: Path) -> list[int]:
    return read_pids(folder / "pids0") + read_pids(folder / "pids1")


def test_ctrl_c_leaves_no_process_and_no_half_written_or_temporary_file(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with build(tmp_path, repo, "sleep") as process:
        pids = sleeping(tmp_path)
        last = tmp_path / "cache" / "v1" / "last"
        wait_until(lambda: len(list(last.iterdir())) == 2, "the other two are done")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - started < 3
    assert running(pids) == []
    assert list((tmp_path / "temporary").glob("toolchain-*")) == []
    cache = Cache(tmp_path / "cache")
    assert list((cache.folder / "tmp").iterdir()) == []
    for artifact in (cache.folder / "artifacts").iterdir():
        assert Artifact.of_folder("text", artifact).digest == f"sha256:{artifact.name}"
    with build(tmp_path, repo) as process:
        assert statuses(process) == ["cached", "cached"] + ["ran"] * 6


def test_ctrl_c_while_waiting_for_another_build_does_not_wait(tmp_path: Path, repo: Path) -> None:
    with build(tmp_path, repo, "sleep") as first:
        pids = sleeping(tmp_path)
        with build(tmp_path, repo, "sleep") as second:
            assert second.stdout is not None
            assert "started sleep1\n" in iter(second.stdout.readline, "")
            time.sleep(0.2)  # now it waits for the lock that the first build holds
            second.send_signal(signal.SIGINT)
            assert second.wait(3) == 130
        assert running(pids) == pids
        first.send_signal(signal.SIGINT)
        assert first.wait(10) == 130


def test_a_killed_build_leaves_no_process_and_the_next_one_goes_on(tmp_path: Path, repo: Path) -> None:
    with build(tmp_path, repo, "sleep") as process:
        pids = sleeping(tmp_path)
        below = descendants(process.pid)
        process.kill()
    wait_until(lambda: not running([*pids, *below]), "everything ends")
    cache = Cache(tmp_path / "cache")
    assert list((cache.folder / "tmp").iterdir()) != []  # nobody was left to clear up
    with build(tmp_path, repo) as process:
        assert statuses(process)[-6:] == ["ran"] * 6
    assert cache.prune(1 << 40) is not None
    assert list((cache.folder / "tmp").iterdir()) == []


def test_two_builds_at_once_share_the_work_and_break_nothing(tmp_path: Path, repo: Path) -> None:
    with build(tmp_path, repo) as one, build(tmp_path, repo) as two:
        results = [statuses(one), statuses(two)]
    assert runs(tmp_path / "trail") == 8
    for pair in zip(*results, strict=True):
        assert sorted(pair) == ["cached", "ran"]
    cache = Cache(tmp_path / "cache")
    assert list((cache.folder / "tmp").iterdir()) == []
    for artifact in (cache.folder / "artifacts").iterdir():
        assert Artifact.of_folder("text", artifact).digest == f"sha256:{artifact.name}"


def test_a_build_on_a_full_disk_ends_with_its_code_and_works_again_with_space(tmp_path: Path, repo: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (disk / "cache").mkdir()
        with open(disk / "filler", "wb", buffering=0) as file:
            left = shutil.disk_usage(disk).free - (24 << 10)
            file.write(bytes(left))
        with build(disk, repo) as process:
            out, _ = process.communicate(timeout=30)
        assert process.returncode == 41, out
        assert "no space left on the disk" in out
        (disk / "filler").unlink()
        with build(disk, repo) as process:
            assert statuses(process)
    finally:
        subprocess.run(["umount", disk], check=True)
