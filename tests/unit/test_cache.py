"""The stage cache: whole or absent, bounded, movable, and clear about a disk that refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.processes import wait_until

from toolchain.artifact import Artifact, digest_json
from toolchain.cache import Cache, Record, default_folder, default_limit
from toolchain.digests import DigestStore
from toolchain.errors import ExitCode, ToolchainError


def add(cache: Cache, kind: str = "text", **files: str) -> Artifact:
    """Put an artifact with these files into the cache."""
    with cache.scratch() as scratch:
        folder = scratch / "out"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return cache.add(kind, folder)


def put(cache: Cache, name: str, artifact: Artifact, age: float = 0.0) -> Record:
    """Put a record of that name, last used ``age`` seconds ago."""
    components = {"stage": name}
    record = Record(digest_json(components), components, (), {artifact.kind: artifact}, {"name": name})
    cache.put(record)
    then = time.time() - age
    os.utime(record_file(cache, record), (then, then))
    return record


def record_file(cache: Cache, record: Record) -> Path:
    (path,) = (cache.folder / "records" / record.key.removeprefix("sha256:")).iterdir()
    return path


def leftovers(cache: Cache) -> list[Path]:
    return list((cache.folder / "tmp").iterdir())


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


# ---- space ----


def test_pruning_removes_what_was_used_least_recently(cache: Cache) -> None:
    records = {n: put(cache, n, add(cache, a=n * 1000), age) for n, age in (("a", 30), ("b", 10), ("c", 20))}
    cache.used(records["a"])
    one = 1000 + record_file(cache, records["a"]).stat().st_size
    freed = cache.prune(2 * one + 100)
    assert freed is not None
    assert freed["removed_records"] == freed["removed_artifacts"] == 1
    assert [name for name, record in records.items() if cache.records(record.key)] == ["a", "b"]
    assert cache.has(records["a"].outputs["text"])
    assert not cache.has(records["c"].outputs["text"])
    assert cache.size()["bytes"] == freed["bytes"] <= 2 * one + 100


def test_nothing_older_than_what_is_removed_stays(cache: Cache) -> None:
    small = put(cache, "small", add(cache, a="1"), age=30)
    put(cache, "large", add(cache, a="x" * 50_000), age=10)
    cache.prune(10_000)
    assert cache.records(small.key) == []
    assert cache.size() == {"bytes": 0, "artifacts": 0, "records": 0}


def test_an_artifact_stays_as_long_as_one_record_names_it(cache: Cache) -> None:
    artifact = add(cache, a="x" * 1000)
    new, old = put(cache, "new", artifact), put(cache, "old", artifact, age=60)
    cache.prune(1000 + record_file(cache, new).stat().st_size + 10)
    assert cache.records(new.key)
    assert not cache.records(old.key)
    assert cache.has(artifact)


def test_pruning_removes_artifacts_that_no_record_names(cache: Cache) -> None:
    orphan = add(cache, a="1")
    kept = put(cache, "kept", add(cache, a="2"))
    freed = cache.prune(1 << 30)
    assert freed is not None
    assert (freed["removed_records"], freed["removed_artifacts"], freed["freed_bytes"]) == (0, 1, 1)
    assert not cache.has(orphan)
    assert cache.has(kept.outputs["text"])


def test_pruning_refuses_while_a_build_uses_the_cache(cache: Cache, tmp_path: Path) -> None:
    put(cache, "one", add(cache, a="1"))
    with cache.in_use():
        assert Cache(tmp_path / "cache").prune(0) is None
        assert cache.size()["artifacts"] == 1
    assert cache.prune(0) is not None
    assert cache.size()["artifacts"] == 0


def test_two_builds_may_use_the_cache_at_once(cache: Cache) -> None:
    with cache.in_use(), cache.in_use():
        assert cache.prune(0) is None


def test_an_error_in_a_build_is_not_taken_for_one_of_the_cache(cache: Cache) -> None:
    with pytest.raises(PermissionError), cache.in_use():
        raise PermissionError(13, "Permission denied", "somewhere/else")


def test_waiting_for_a_lock_can_be_given_up(cache: Cache, tmp_path: Path) -> None:
    stopped = threading.Event()
    threading.Timer(0.2, stopped.set).start()
    other = Cache(tmp_path / "cache")
    with (
        cache.lock("sha256:k"),
        pytest.raises(ToolchainError, match="interrupted") as caught,
        other.lock("sha256:k", stopped.is_set),
    ):
        pass
    assert caught.value.code is ExitCode.INTERRUPTED
    with other.lock("sha256:k"):  # released by now
        pass


# ---- places ----


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_cache_works_at_another_place(cache: Cache, tmp_path: Path, how: str) -> None:
    record = put(cache, "one", add(cache, a="1"))
    cache.note_last("node", record)
    cache.save_digests()
    if how == "moved":
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
    else:
        shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere", copy_function=shutil.copy)
    there = Cache(tmp_path / "elsewhere")
    assert there.records(record.key) == [record]
    assert there.has(record.outputs["text"])
    assert there.last("node") == record


def test_nothing_in_a_cache_names_the_place_it_lies_in(cache: Cache, tmp_path: Path) -> None:
    cache.note_last("node", put(cache, "one", add(cache, a="1")))
    cache.save_digests()
    texts = {p.name: p.read_bytes() for p in cache.folder.rglob("*") if p.is_file() and p.name != "digests.json"}
    assert len(texts) >= 3
    assert [name for name, text in texts.items() if os.fsencode(tmp_path) in text] == []


# ---- disks that refuse ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Take all space of a file system."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(small_disk: Path) -> None:
    cache = Cache(small_disk)
    artifact = add(cache, a="1")
    record = put(cache, "one", artifact)
    fill(small_disk)
    with pytest.raises(ToolchainError) as caught:
        put(cache, "two", artifact)
    assert caught.value.code is ExitCode.STORAGE
    assert caught.value.what.startswith("no space left on the disk")
    assert "free some space" in caught.value.hint
    assert len(list((cache.folder / "records").glob("*/*.json"))) == 1
    cache.digest(record_file(cache, record))
    cache.save_digests()  # a mere shortcut: no error
    assert leftovers(cache) == []
    (small_disk / "filler").unlink()
    assert cache.has(artifact)
    put(cache, "two", artifact)


def test_a_read_only_disk_still_gives_what_it_holds_and_refuses_to_take_more(small_disk: Path) -> None:
    cache = Cache(small_disk)
    record = put(cache, "one", add(cache, a="1"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache = Cache(small_disk)
    assert cache.records(record.key) == [record]
    assert cache.has(record.outputs["text"])
    cache.used(record)
    for act in (lambda: add(cache, a="2"), lambda: cache.put(record), lambda: cache.prune(0), cache.in_use().__enter__):
        with pytest.raises(ToolchainError, match="cannot be written") as caught:
            act()
        assert caught.value.code is ExitCode.STORAGE
        assert caught.value.where.startswith(str(small_disk))
        assert "TOOLCHAIN_CACHE" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_forbidden_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ToolchainError, match="cannot be written"):
        Cache(tmp_path / "closed" / "cache")


def test_a_file_in_the_place_of_the_cache_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ToolchainError, match="a folder is needed here") as caught:
            Cache(folder)
        assert caught.value.code is ExitCode.STORAGE


def test_a_record_too_large_for_the_file_size_limit_leaves_nothing(cache: Cache) -> None:
    artifact = add(cache, a="1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(ToolchainError, match="File too large"):
            cache.put(Record("sha256:k", {"text": "x" * 5000}, (), {"text": artifact}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert cache.records("sha256:k") == []
    assert leftovers(cache) == []


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
