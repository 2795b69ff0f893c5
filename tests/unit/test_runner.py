"""The runner: a stage runs again when something that can change its result has changed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import stages
from helpers.bench import Bench, stale
from helpers.distributions import install_distribution
from helpers.processes import wait_until

from toolchain.cache import Cache
from toolchain.errors import ExitCode, ToolchainError
from toolchain.keys import installed_version
from toolchain.runner import Node
from toolchain.worker import WorkerPool

# ---- running and reusing ----


def test_a_stage_runs_once_and_is_then_taken_from_the_cache(bench: Bench) -> None:
    first, second = bench.run(bench.text("hello")), bench.run(bench.text("hello"))
    assert (first.status, second.status, bench.runs) == ("ran", "cached", 1)
    assert bench.read(second) == "hello"
    assert second.outputs == first.outputs
    assert second.facts == first.facts == {"length": 5}
    assert first.seconds > 0
    assert second.seconds == second.cpu_seconds == 0
    assert list((bench.cache.folder / "tmp").iterdir()) == []


def test_user_code_is_run_and_its_reads_are_recorded(bench: Bench) -> None:
    outcome = bench.run(bench.model())
    assert bench.read(outcome) == "12"
    assert outcome.record is not None
    assert [name for _, name, _ in outcome.record.dependencies] == [
        "$ROOT/data/numbers.txt",
        "$ROOT/helper.py",
        "$ROOT/model.py",
    ]


def test_a_refusal_is_kept_like_a_result_and_has_no_outputs(bench: Bench) -> None:
    node = bench.code("(ctx.output('text') / 'half').write_text('x'); refused = 'no operator for it'")
    for status in ("ran", "cached"):
        outcome = bench.run(node)
        assert (outcome.status, outcome.refused, outcome.outputs) == (status, "no operator for it", {})


def test_the_first_look_up_says_that_it_has_not_run_yet(bench: Bench) -> None:
    assert bench.look_up(bench.text("hello")).reasons == ("it has not run yet",)


# ---- what must run again, and the words for it ----


def test_an_edited_helper_file_runs_it_again(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    (repo / "helper.py").write_text("def scale(value):\n    return value * 5\n")
    stale(bench, bench.model(), "file helper.py has changed")
    assert bench.read(bench.run(bench.model())) == "30"


def test_an_edit_that_keeps_size_and_times_runs_it_again_with_the_new_code(bench: Bench, repo: Path) -> None:
    helper = repo / "helper.py"
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(repo)], check=True)
    bench.run(bench.model())
    before = helper.stat()
    helper.write_text(helper.read_text().replace("* 2", "* 3"))
    os.utime(helper, ns=(before.st_atime_ns, before.st_mtime_ns))
    stale(bench, bench.model(), "file helper.py has changed")
    assert bench.read(bench.run(bench.model())) == "18"


def test_an_edited_model_file_runs_it_again_whatever_was_compiled(bench: Bench, repo: Path) -> None:
    model = repo / "model.py"
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(repo)], check=True)
    before = model.stat()
    model.write_text(model.read_text().replace("sum(", "max("))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bench.read(bench.run(bench.model())) == "6"


def test_changed_data_runs_it_again(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    (repo / "data" / "numbers.txt").write_text("1 2 4\n")
    stale(bench, bench.model(), "file data/numbers.txt has changed")


def test_data_that_is_gone_is_named_and_the_failure_is_the_users(bench: Bench, repo: Path) -> None:
    bench.run(bench.model())
    (repo / "data" / "numbers.txt").unlink()
    assert bench.look_up(bench.model()).reasons == ("file data/numbers.txt is gone",)
    with pytest.raises(ToolchainError) as caught:
        bench.run(bench.model())
    assert caught.value.code is ExitCode.USER_CODE


def test_a_changed_option_runs_it_again(bench: Bench) -> None:
    bench.run(bench.text("hello"))
    stale(bench, bench.text("hello", "you"), "option words: ['hello'] -> ['hello', 'you']")


def test_a_changed_stage_version_runs_it_again(bench: Bench) -> None:
    bench.run(bench.model())
    stale(bench, bench.model(version=2), "stage version: 1 -> 2")


def test_a_changed_host_fact_runs_it_again(bench: Bench) -> None:
    node = bench.text("x")
    bench.run(dataclasses.replace(node, extra={"cpu": "znver4"}))
    stale(bench, dataclasses.replace(node, extra={"cpu": "znver5"}), "host fact cpu: znver4 -> znver5")


def test_a_changed_input_runs_it_again(bench: Bench) -> None:
    one, two = (bench.run(bench.text(word, id=word)).outputs["text"] for word in ("one", "two"))
    node = bench.text(id="later", source="one")
    bench.run(node, source=one)
    short = {name: artifact.digest[7:19] for name, artifact in (("one", one), ("two", two))}
    stale(bench, node, f"input source: {short['one']} -> {short['two']}", source=two)
    assert bench.run(node, source=one).status == "cached"


def test_another_tool_version_runs_it_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    install_distribution(site, "fancy-compiler", "1.0", "fancy_compiler")
    monkeypatch.syspath_prepend(str(site))
    installed_version.cache_clear()
    node = bench.model(tools=("fancy-compiler",))
    assert bench.run(node).status == "ran"
    install_distribution(site, "fancy-compiler", "1.1", "fancy_compiler")
    installed_version.cache_clear()  # as a new build would
    stale(bench, node, "tool fancy-compiler: 1.0 -> 1.1")
    installed_version.cache_clear()


def test_another_version_of_what_user_code_imports_runs_it_again(
    cache: Cache, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    install_distribution(site, "fancy-layers", "1.0", "fancy_layers")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ["PYTHONPATH"]]))
    (repo / "helper.py").write_text("import fancy_layers\ndef scale(value):\n    return fancy_layers.VERSION\n")
    installed_version.cache_clear()
    with WorkerPool() as pool:
        bench = Bench(cache, repo, pool, tmp_path / "trail")
        assert bench.read(bench.run(bench.model())) == "1.0"
        install_distribution(site, "fancy-layers", "1.1", "fancy_layers")
        installed_version.cache_clear()
        stale(bench, bench.model(), "distribution fancy-layers: 1.0 -> 1.1")
        assert bench.read(bench.run(bench.model())) == "1.1"
    installed_version.cache_clear()


def test_a_file_that_has_appeared_runs_it_again(bench: Bench, repo: Path) -> None:
    node = bench.code(
        "try:\n    facts['v'] = open(ctx.root / 'local.json').read()\nexcept OSError:\n    facts['v'] = 'none'"
    )
    assert bench.run(node).facts == {"v": "none"}
    (repo / "local.json").write_text("7")
    stale(bench, node, "file local.json has appeared")
    assert bench.run(node).facts == {"v": "7"}


def test_a_new_file_in_a_listed_folder_runs_it_again(bench: Bench, repo: Path) -> None:
    node = bench.code("facts['names'] = sorted(p.name for p in (ctx.root / 'data').iterdir())")
    bench.run(node)
    (repo / "data" / "more-\udcff.txt").write_text("")  # not UTF-8
    stale(bench, node, "folder data has changed")


def test_a_link_that_points_elsewhere_runs_it_again(bench: Bench, repo: Path) -> None:
    for name in ("v1", "v2"):
        (repo / name).mkdir()
        (repo / name / "x.txt").write_text(name)
    (repo / "current").symlink_to("v1")
    node = bench.code("facts['v'] = (ctx.root / 'current' / 'x.txt').read_text()")
    bench.run(node)
    (repo / "current").unlink()
    (repo / "current").symlink_to("v2")
    stale(bench, node, "file current/x.txt has changed")


def test_a_file_edited_while_the_stage_ran_makes_the_result_good_for_once_only(bench: Bench, repo: Path) -> None:
    node = bench.code("(ctx.root / 'data' / 'numbers.txt').read_text(); import time; time.sleep(0.4)")
    thread = threading.Thread(target=bench.run, args=(node,))
    thread.start()
    wait_until(lambda: bench.runs == 1, "the stage runs")
    time.sleep(0.15)
    (repo / "data" / "numbers.txt").write_text("9\n")
    thread.join(10)
    stale(bench, node, "file data/numbers.txt changed while it was being used")


def test_a_damaged_artifact_is_made_again(bench: Bench) -> None:
    outcome = bench.run(bench.text("hello"))
    os.truncate(bench.cache.path(outcome.outputs["text"]) / "text.txt", 2)
    stale(bench, bench.text("hello"), "its cached result is damaged or gone")
    assert bench.read(bench.run(bench.text("hello"))) == "hello"


def test_a_pruned_result_is_made_again(bench: Bench) -> None:
    bench.run(bench.text("hello"))
    bench.cache.prune(0)
    stale(bench, bench.text("hello"), "its cached result is gone")


def test_temporary_files_of_a_stage_lie_in_its_own_folder(bench: Bench, tmp_path: Path) -> None:
    code = """
import os, subprocess, tempfile
from pathlib import Path
made = [tempfile.mkdtemp(prefix='left-'), subprocess.check_output(['mktemp', '-d'], text=True).strip()]
facts['inside'] = [Path(name).is_relative_to(ctx.out.parent) for name in made]
facts['outputs'] = os.listdir(ctx.out)
"""
    outcome = bench.run(Node("code", stages.CODE, stages.Code(code)))
    assert outcome.facts == {"inside": [True, True], "outputs": []}
    assert list((bench.cache.folder / "tmp").iterdir()) == []
