"""The runner: a stage does not run again for what cannot change its result."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import stages
from helpers.bench import Bench, other_process, stale

from toolchain.cache import Cache
from toolchain.runner import Outcome

# ---- what must not run again ----


def test_going_back_to_an_earlier_state_is_cached(bench: Bench, repo: Path) -> None:
    original = (repo / "helper.py").read_text()
    bench.run(bench.model())
    (repo / "helper.py").write_text(original.replace("* 2", "* 3"))
    bench.run(bench.model())
    (repo / "helper.py").write_text(original)
    assert bench.run(bench.model()).status == "cached"
    assert bench.read(bench.run(bench.model())) == "12"


def test_touching_every_file_runs_nothing(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    for path in repo.rglob("*"):
        path.touch()
    assert bench.run(bench.model()).status == "cached"


def test_an_unrelated_file_runs_nothing(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    (repo / "notes.py").write_text("x")
    (repo / "data" / "other.txt").write_text("x")
    assert bench.run(bench.model()).status == "cached"


def test_a_compiled_file_beside_the_source_runs_nothing(bench: Bench, repo: Path) -> None:
    node = bench.code("import os; os.listdir(ctx.root); import sys; sys.path.insert(0, str(ctx.root)); import helper")
    bench.run(node)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(repo)], check=True)
    assert bench.run(node).status == "cached"


@pytest.mark.parametrize("how", ["moved", "copied", "behind a link"])
def test_the_repository_at_another_place_runs_nothing(bench: Bench, repo: Path, tmp_path: Path, how: str) -> None:
    bench.run(bench.model())
    there = tmp_path / "some" / "where"
    there.parent.mkdir()
    if how == "moved":
        repo.rename(there)
    elif how == "copied":
        shutil.copytree(repo, there, copy_function=shutil.copy)
    else:
        there.symlink_to(repo)
    bench.root = there
    assert bench.run(bench.model()).status == "cached"
    (there / "helper.py").write_text("def scale(value):\n    return value * 5\n")
    stale(bench, bench.model(), "file helper.py has changed")


def test_the_cache_at_another_place_runs_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.run(bench.model())
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    bench.cache = Cache(tmp_path / "elsewhere")
    outcome = bench.run(bench.model())
    assert outcome.status == "cached"
    assert bench.read(outcome) == "12"


def test_another_user_home_folder_locale_and_current_folder_run_nothing(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    home = str(tmp_path / "home")
    assert other_process(bench, tmp_path) == "ran"
    status = other_process(
        bench, Path("/"), HOME=home, USER="someone", LOGNAME="someone", LC_ALL="C", TZ="Asia/Tokyo", TMPDIR=home
    )
    assert (status, bench.runs) == ("cached", 1)


def test_another_process_sees_a_change_too(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    (repo / "helper.py").write_text("def scale(value):\n    return value * 5\n")
    assert (other_process(bench, repo), bench.runs) == ("ran", 2)
    assert bench.read(bench.run(bench.model())) == "30"


def test_an_output_that_comes_out_the_same_keeps_later_stages_cached(bench: Bench, repo: Path) -> None:
    later = bench.text(id="later", source="model")
    first = bench.run(bench.model()).outputs["text"]
    bench.run(later, source=first)
    (repo / "helper.py").write_text("def scale(value):\n    return value + value  # the same in other words\n")
    again = bench.run(bench.model())
    assert again.status == "ran"
    assert bench.run(later, source=again.outputs["text"]).status == "cached"


def test_two_builds_at_once_do_the_same_work_once(bench: Bench) -> None:
    node = stages.text_node("slow", "hello", trail=bench.trail, seconds=0.3)
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(bench.run(node))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(outcome.status for outcome in outcomes) == ["cached", "cached", "ran"]
    assert bench.runs == 1
