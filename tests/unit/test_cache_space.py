"""The stage cache: bounded, movable, and clear about a disk that refuses."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from helpers.caches import add, leftovers, put, record_file

from toolchain.bundle.atomic import replace_folder
from toolchain.cache import Cache, Record
from toolchain.errors import ExitCode, ToolchainError
from toolchain.storage import check_can_be_made

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


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_place_where_nothing_can_be_made_is_one_clear_error() -> None:
    with pytest.raises(ToolchainError, match="nothing can be made here") as caught:
        Cache(Path("/proc/nowhere"))
    assert caught.value.code is ExitCode.STORAGE
    assert caught.value.hint == "choose another cache folder (--cache or TOOLCHAIN_CACHE)"


def test_a_release_that_finds_no_room_leaves_no_folder_and_the_hint_names_its_own_option(small_disk: Path) -> None:
    def write(staging: Path) -> None:
        fill(staging)
        (staging / "more").write_bytes(bytes(1 << 20))

    (small_disk / "out").mkdir()
    with pytest.raises(ToolchainError) as caught:
        replace_folder(small_disk / "out" / "tiny" / "0.1.0", write, "another --output folder")
    assert caught.value.code is ExitCode.STORAGE
    assert caught.value.hint == "free some space or choose another --output folder, then run again"
    assert list(small_disk.rglob("*")) == [small_disk / "out"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_release_cannot_be_written_where_nothing_can_be_made() -> None:
    with pytest.raises(ToolchainError, match="nothing can be made here") as caught:
        replace_folder(Path("/proc/nowhere/tiny/0.1.0"), lambda folder: None)
    assert caught.value.code is ExitCode.STORAGE


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


def test_an_output_that_cannot_be_made_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_can_be_made(tmp_path, "another --output folder")
    check_can_be_made(tmp_path / "new" / "deeper", "another --output folder")
    with pytest.raises(ToolchainError, match="a folder is needed here") as caught:
        check_can_be_made(tmp_path / "file" / "tiny" / "0.1.0", "another --output folder")
    assert (caught.value.code, caught.value.where) == (ExitCode.STORAGE, str(tmp_path / "file"))
    assert caught.value.hint == "choose another --output folder"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
