"""Whole build processes on a warm cache: the IR dumps, and Ctrl-C in each stage."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import descendants, running
from helpers.shop import RECIPE, Shop

import toolchain.stages
from toolchain.cache import Cache
from toolchain.errors import ExitCode
from toolchain.record import Record

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]

EDGE = """
schema = 1
name = "edge"
description = "x86-64-v3, with the edge runtime in its bundles"
extends = "x86-64-v3"

[runtime]
runner = true
"""
# Interrupted in test_build_device.py; and of a form that the recipe here does not have.
ELSEWHERE = {"measure_device", "link_static"}
STAGES = [m.name for m in pkgutil.iter_modules(toolchain.stages.__path__) if m.name not in ELSEWHERE]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A built repository whose recipe uses every stage."""
    made = Shop(tmp_path_factory.mktemp("shop"))
    text = RECIPE.replace('"int8-static"]', '"int8-static", "int8-mixed"]').replace(
        "max_seconds = 2.0", "max_seconds = 0.2"
    )
    assert '"x86-64-v3"' in text
    made.recipe.write_text(text.replace('"x86-64-v3"', '"edge.toml"'))
    made.recipe.with_name("edge.toml").write_text(EDGE)
    code, _, errors = made.build()
    assert code == 0, errors
    return made


def records_of(shop: Shop, stage: str) -> dict[Path, Record]:
    found = {path: Record.decode(path.read_bytes()) for path in (shop.cache / "v1" / "records").glob("*/*")}
    return {path: record for path, record in found.items() if record.components["stage"] == stage}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nodes_to_run(shop: Shop) -> set[str]:
    """Ids of the plan's nodes that the cache does not hold."""
    plan = json.loads(shop.call("build", shop.recipe, "--cache", shop.cache, "--dry-run", "--json").stdout)
    return {s["id"] for s in plan["stages"] if s["state"] == "run"}


def below(process: subprocess.Popen[str], seconds: float) -> list[int]:
    """The processes below a build once one of its workers has forked a child; all there are after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        workers = _children(process.pid)
        if any(_children(worker) for worker in workers):
            break
        time.sleep(0.002)
    return descendants(process.pid)


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_in_a_stage_leaves_nothing_behind_and_the_next_build_succeeds(
    shop: Shop, tmp_path: Path, stage: str
) -> None:
    copy = shop.copied(tmp_path)
    removed = records_of(copy, stage)
    assert removed, f"the recipe's plan has no stage {stage}"
    for path in removed:
        path.unlink()
    expected = nodes_to_run(copy)
    assert expected

    arguments = ["build", copy.recipe, "--cache", copy.cache, "--output", copy.output, "--jobs", "1"]
    command = [sys.executable, "-m", "toolchain.cli.main", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            shown = ""
            for line in process.stderr:
                shown += line
                if line.strip().startswith("started"):
                    break
            pids = below(process, 20)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == ExitCode.INTERRUPTED == 130, shown + errors
    assert shown.split()[-1] in expected
    assert "Traceback" not in errors
    assert out == ""
    assert len(pids) >= 2
    assert running(pids) == []
    assert not copy.output.exists() or not list(copy.output.rglob("*"))
    cache = Cache(copy.cache)
    assert list((cache.folder / "tmp").iterdir()) == []
    assert names_in(cache.folder / "artifacts") == names_in(shop.cache / "v1" / "artifacts")
    assert records_of(copy, stage) == {}
    assert copy.ran() >= expected
    assert (copy.release / "index.json").is_file()


def test_the_ir_of_a_cached_compile_is_dumped_by_numbered_phases(shop: Shop, tmp_path: Path) -> None:
    assert shop.ran() == set()
    folder = tmp_path / "ir"
    ran = shop.ran("--dump-ir", folder)
    assert "compile[fp32/tvm]@edge" in ran
    assert all(name.startswith("compile[") and "/tvm]" in name for name in ran)
    dumped = folder / "edge" / "compile[fp32-tvm]"
    names = sorted(path.name for path in dumped.iterdir())
    parts = [re.fullmatch(r"(\d\d)-([a-z0-9_-]+)\.(?:py|c)", name) for name in names]
    assert all(parts), names
    assert [int(part[1]) for part in parts if part] == list(range(1, len(names) + 1))
    assert names.pop().endswith("-plan.c")
    assert names[0].endswith("-import.py")
    assert names[-1].endswith("-codegen.py")
    assert len(names) > 2
    texts = [(dumped / name).read_text() for name in names]
    assert all("@I.ir_module" in text for text in texts)
    assert "R.matmul" in texts[0]
    assert "R.matmul" not in texts[-1]
    assert shop.ran() == set()


def test_another_c_compiler_compiles_tvm_engines_again_and_why_names_it(shop: Shop, tmp_path: Path) -> None:
    copy = shop.copied(tmp_path)
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "cc 99.1" && exit\nexec {shutil.which("cc")} "$@"\n')
    compiler.chmod(0o755)
    environment = {"PATH": f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"}
    told = copy.call("why", copy.recipe, "--cache", copy.cache, env=environment).stdout
    assert re.search(r"compile\[fp32/tvm\]@edge +would run +tool cc: .* -> cc 99.1\n", told), told
    ran = copy.ran("--no-measure", env=environment)
    assert "compile[fp32/tvm]@edge" in ran
    # The library is the same, byte for byte, so nothing that is made of it is made again.
    assert all(("/tvm]" in name and name.startswith("compile")) or name == "runner@edge" for name in ran)
    assert copy.ran("--no-measure", env=environment) == set()
