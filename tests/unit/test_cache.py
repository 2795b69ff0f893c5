"""The stage cache: an entry is whole or absent, whatever happens to a writer or to the files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.caches import add, leftovers, put, record_file
from helpers.processes import wait_until

from toolchain.artifact import Artifact
from toolchain.cache import Cache, Record, default_folder, default_limit
from toolchain.digests import DigestStore
from toolchain.errors import ExitCode, ToolchainError

# ---- artifacts ----


def test_an_added_artifact_is_there_whole(cache: Cache) -> None:
    artifact = add(cache, a="1", b="22")
    assert cache.has(artifact)
    assert (cache.path(artifact) / "b").read_text() == "22"
    assert artifact.size == 3
    assert leftovers(cache) == []


def test_the_same_content_is_kept_once(cache: Cache) -> None:
    assert add(cache, a="1") == add(cache, a="1")
    assert cache.size()["artifacts"] == 1


def test_an_artifact_that_was_never_added_is_not_there(cache: Cache, tmp_path: Path) -> None:
    assert not Cache(tmp_path / "other").has(add(cache, a="1"))


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "file gone", "file replaced by a folder"])
def test_a_damaged_artifact_is_dropped_and_can_be_made_again(cache: Cache, damage: str) -> None:
    artifact = add(cache, a="some content", b="2")
    file = cache.path(artifact) / "a"
    match damage:
        case "truncated":
            os.truncate(file, 4)
        case "one bit flipped":
            file.write_text("some cOntent")
        case "file gone":
            file.unlink()
        case _:
            file.unlink()
            file.mkdir()
    assert not cache.has(artifact)
    assert not cache.path(artifact).exists()
    assert add(cache, a="some content", b="2") == artifact
    assert cache.has(artifact)
    assert leftovers(cache) == []


def test_adding_over_a_damaged_artifact_repairs_it(cache: Cache) -> None:
    artifact = add(cache, a="some content")
    os.truncate(cache.path(artifact) / "a", 2)
    assert add(cache, a="some content") == artifact
    assert (cache.path(artifact) / "a").read_text() == "some content"


def test_a_flipped_bit_is_seen_though_the_digest_was_remembered(cache: Cache) -> None:
    artifact = add(cache, a="some content")
    file = cache.path(artifact) / "a"
    os.utime(file, (1, 1))
    wait_until(lambda: time.time_ns() - file.stat().st_ctime_ns > 60_000_000, "the file has settled")
    assert cache.has(artifact)
    file.write_text("some cOntent")
    os.utime(file, (1, 1))  # the same size and modification time as before
    assert not cache.has(artifact)


_WRITER = """
import sys
from pathlib import Path
from toolchain.cache import Cache
cache = Cache(Path(sys.argv[1]))
for number in range(1000000):
    with cache.scratch() as scratch:
        folder = scratch / "out"
        folder.mkdir()
        for name in "abc":
            (folder / name).write_bytes(bytes([number % 256]) * 200000)
        cache.add("text", folder)
    if number == 3:
        print("going", flush=True)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_no_half_entry(cache: Cache, tmp_path: Path) -> None:
    for delay in (0.0, 0.013, 0.027):
        with python(_WRITER, str(tmp_path / "cache")) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "going\n"
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
    folders = list((cache.folder / "artifacts").iterdir())
    assert len(folders) >= 3
    for folder in folders:
        assert Artifact.of_folder("text", folder).digest == f"sha256:{folder.name}"
    cache.prune(1 << 40)
    assert leftovers(cache) == []


_RACER = """
import sys
from pathlib import Path
from toolchain.cache import Cache
cache = Cache(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(40):
    with cache.lock("sha256:race"), cache.scratch() as scratch:
        (scratch / "out").mkdir()
        (scratch / "out" / "a").write_text(str(number))
        first = cache.add("text", scratch / "out")
    with cache.scratch() as scratch:
        (scratch / "out").mkdir()
        (scratch / "out" / "a").write_text(str(number))
        assert cache.add("text", scratch / "out") == first
    assert cache.has(first)
"""


def test_two_processes_may_write_at_once(cache: Cache, tmp_path: Path) -> None:
    racers = [python(_RACER, str(tmp_path / "cache")) for _ in range(2)]
    for racer in racers:
        racer.communicate(timeout=30)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert cache.size()["artifacts"] == 40
    assert leftovers(cache) == []


# ---- records ----


def test_records_come_newest_first(cache: Cache) -> None:
    artifact = add(cache, a="1")
    for number in (1, 2):
        cache.put(Record("sha256:k", {}, (("file", f"$ROOT/{number}", "x"),), {"text": artifact}, {"n": number}))
        time.sleep(0.01)
    assert [r.facts["n"] for r in cache.records("sha256:k")] == [2, 1]
    cache.used(cache.records("sha256:k")[1])
    assert [r.facts["n"] for r in cache.records("sha256:k")] == [1, 2]


def test_a_record_reads_back_as_it_was(cache: Cache) -> None:
    artifact = add(cache, a="1")
    dependencies = (("file", "$ROOT/é \udcff.py", "sha256:1"), ("absent", "/x", "absent"))
    record = Record("sha256:k", {"options": {"a": [1, None]}}, dependencies, {"text": artifact}, {"x": 0.1}, "no")
    cache.put(record)
    assert cache.records("sha256:k") == [record]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"record": {}, "digest": ""}', b'{"record": [], "digest": "sha256:0"}'],
)
def test_an_unreadable_record_is_dropped(cache: Cache, content: bytes) -> None:
    record = put(cache, "one", add(cache, a="1"))
    path = record_file(cache, record)
    path.write_bytes(content)
    assert cache.records(record.key) == []
    assert not path.exists()


def test_a_record_that_still_reads_but_was_altered_is_dropped(cache: Cache) -> None:
    record = put(cache, "one", add(cache, a="1"))
    path = record_file(cache, record)
    path.write_bytes(path.read_bytes().replace(b'"name":"one"', b'"name":"two"'))
    assert cache.records(record.key) == []
    assert not path.exists()


def test_a_key_keeps_a_bounded_number_of_records(cache: Cache) -> None:
    artifact = add(cache, a="1")
    for number in range(20):
        cache.put(Record("sha256:k", {}, (("file", f"$ROOT/{number}", "x"),), {"text": artifact}, {"n": number}))
        time.sleep(0.002)
    assert [r.facts["n"] for r in cache.records("sha256:k")] == list(range(19, 3, -1))


def test_the_last_record_of_a_node_is_remembered(cache: Cache) -> None:
    record = put(cache, "one", add(cache, a="1"))
    cache.note_last("recipe/export", record)
    assert cache.last("recipe/export") == record
    assert cache.last("recipe/other") is None


# ---- digests, settings ----


def test_a_digest_follows_every_edit(tmp_path: Path) -> None:
    store, file = DigestStore(tmp_path / "digests.json"), tmp_path / "file"
    seen = set()
    for number in range(30):
        file.write_text(f"{number:04}")  # the same size, within the same clock tick
        seen.add(store.digest(file))
    assert len(seen) == 30


def test_digests_are_remembered_across_builds_and_only_while_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    wait_until(lambda: time.time_ns() - file.stat().st_ctime_ns > 60_000_000, "the file has settled")
    store = DigestStore(tmp_path / "digests.json")
    digest = store.digest(file)
    store.save(tmp_path)
    (known,) = json.loads((tmp_path / "digests.json").read_text()).values()
    assert known[-1] == digest
    file.write_text("2")
    assert DigestStore(tmp_path / "digests.json").digest(file) != digest


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 3}', '{"x": [1, 2]}', "\x00"])
def test_a_damaged_digest_file_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "digests.json").write_text(content)
    assert DigestStore(tmp_path / "digests.json").digest(tmp_path / "digests.json").startswith("sha256:")


def test_the_folder_and_the_limit_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", "/some/where")
    monkeypatch.setenv("TOOLCHAIN_CACHE_LIMIT_MB", "3")
    assert default_folder() == Path("/some/where")
    assert default_limit() == 3 << 20
    for wrong in ("-1", "3.5", "many", ""):
        monkeypatch.setenv("TOOLCHAIN_CACHE_LIMIT_MB", wrong)
        with pytest.raises(ToolchainError, match="a whole number of MiB") as caught:
            default_limit()
        assert caught.value.code is ExitCode.USAGE
