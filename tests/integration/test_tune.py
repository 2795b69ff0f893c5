"""`toolchain tune` on a small network: search, records in later builds, interruption, candidates that go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tvm_support import Graph, Stages, save_unary, stages

from toolchain.host import detect_host
from toolchain.search import Search, Settings, Task
from toolchain.stages import compile_tvm
from toolchain.target import load_target
from toolchain.trials import Progress, Workers
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.nests import Choice, Nest
from toolchain.tvm.records import load_records, save_records, to_json
from toolchain.worker import WorkerPool

HOST = load_target("host")
BITS, REGISTERS = HOST.cpu.vector_bits, HOST.cpu.registers
SAME = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 1)
PRODUCT = Nest.of("float32", ["batch", 32], (32, 48), None, BITS, REGISTERS)
RECIPE = """
schema = 1
name = "tiny"
version = "1.0.0"
targets = [{targets}]
[model]
source = "net/model.onnx"
[[model.inputs]]
name = "x"
dtype = "float32"
shape = ["batch", 16, 8, 8]
[model.dims.batch]
max = 8
batch = true
"""

pytestmark = [
    pytest.mark.skipif(detect_host().arch not in ("x86_64", "aarch64"), reason="no host profile"),
    pytest.mark.xdist_group("tune"),
]


def network(folder: Path) -> Path:
    """Two convolutions and a product."""
    g = Graph()
    x = g.add("Conv", "x", g.weight(32, 16, 3, 3, scale=0.1), g.weight(32), pads=[1] * 4)
    x = g.add("Conv", g.add("Relu", x), g.weight(32, 32, 1, 1, scale=0.1), g.weight(32))
    x = g.add("Flatten", g.add("GlobalAveragePool", g.add("Relu", x)))
    return save_unary(folder, g, g.add("MatMul", x, g.weight(32, 48)), ["batch", 16, 8, 8], ["batch", 48])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    network(tmp_path / "repository" / "net")
    path = tmp_path / "repository" / "tiny.toml"
    path.write_text(RECIPE.format(targets='"host"'))
    return path


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    yield from stages(tmp_path_factory.mktemp("compile"))


def command(recipe: Path, *more: str) -> list[str]:
    cache = recipe.parent.parent / "cache"
    return [sys.executable, "-m", "toolchain.cli.main", "tune", str(recipe), "--cache", str(cache), *more]


def tune(recipe: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, *more), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_writes_records_and_the_next_one_goes_on_after_ctrl_c(recipe: Path) -> None:
    with subprocess.Popen(command(recipe, "--budget", "5m"), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if "   1/3  " in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert "[searched]" in first
    file = recipe.with_name("tiny.tune.toml")
    assert not file.exists()
    done = tune(recipe, "--budget", "1s", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["targets"]["host"]
    # One second is spent before the first loop nest: what is known is from the first run.
    assert [nest["state"] for nest in result["nests"]] == ["known", "not reached", "not reached"]
    assert to_json(load_records(file).get("host", {})) == result["records"]
    assert result["whole_model"]["ratio"] <= 1
    kept = {nest["nest"]: nest["best"] for nest in result["nests"] if nest["kept"]}
    assert kept == result["records"]
    again = tune(recipe, "--budget", "1s", "--restart")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("not reached") == 3
    # What was not measured again is kept, as long as the whole model is faster with it.
    assert to_json(load_records(file).get("host", {})).items() <= result["records"].items()


def search(folder: Path, trial: str, candidates: list[str]) -> dict[str, object]:
    """One product's search with other trials."""
    machine = {
        "target": HOST.tvm_target(), "kind": "cpu", "arch": HOST.arch, "vector_bits": BITS, "registers": REGISTERS,
    }  # fmt: skip
    nest = {"nest": str(PRODUCT), "data": [4, 32], "rule": "1x4 x 1", "share": 1.0, "candidates": candidates}
    (folder / "host").mkdir()
    with WorkerPool() as pool:
        task = Task("host", machine, HOST.tvm.linker, folder, {"batch": 4}, folder / "host")
        settings = Settings(budget=60, trial=trial)
        made = Search(task, settings, Workers(pool, folder), Progress(folder / "known.json", False), lambda _: None)
        found = made.nest(0, nest, {})
        again = made.nest(1, nest, {})
    return {"found": found, "again": again}


def test_a_candidate_that_crashes_hangs_or_fails_costs_itself_only(tmp_path: Path) -> None:
    made = search(tmp_path, "helpers.tuning:some_go_wrong", ["1x1 x 1", "1x2 x 1", "1x5 x 1", "1x3 x 1", "1x6 x 1"])
    found, again = made["found"], made["again"]
    assert found.failed == (  # type: ignore[attr-defined]
        "1x1 x 1: killed by signal 11, SIGSEGV", "1x2 x 1: took too long", "1x3 x 1: ValueError: no such thing",
    )  # fmt: skip
    assert found.tried == 2  # type: ignore[attr-defined]
    assert found.state == "searched"  # type: ignore[attr-defined]
    assert again.state == "known"  # type: ignore[attr-defined]


def options(records: dict[Nest, Choice]) -> compile_tvm.Options:
    return compile_tvm.Options(
        target=HOST.tvm_target(),
        kind="cpu",
        arch=HOST.arch,
        native=True,
        vector_bits=BITS,
        registers=REGISTERS,
        linker="cc",
        libc_min="",
        precision="fp32",
        records=to_json(records),
        records_file="tiny.tune.toml",
    )


def test_a_build_takes_the_records_and_gives_the_same_bytes_twice(compiler: Stages, tmp_path: Path) -> None:
    model = network(tmp_path / "net")
    unused = Nest.of("float32", [5, 5], (5, 5), None, BITS, REGISTERS)
    records = {PRODUCT: Choice(1, 2, 2), unused: Choice(1, 1, 1)}
    runs = [compiler.run(compile_tvm, options(records), model) for _ in range(2)]
    plain = compiler.run(compile_tvm, options({}), model)
    assert [(run.error, run.refused) for run in (*runs, plain)] == [(None, "")] * 3
    lanes = BITS // 32
    tiles = [{k["tile"] for k in run.facts["kernels"] if k["rule"] == "dense"} for run in (*runs, plain)]
    assert tiles[0] == tiles[1] == {f"1x2 x 2x{lanes}"}
    assert tiles[2] != tiles[0]
    assert runs[0].facts["records"] == {"file": "tiny.tune.toml", "given": 2, "used": 1}
    assert "records" not in plain.facts
    first, second, other = ((run.engine / "model.so").read_bytes() for run in (*runs, plain))
    assert first == second != other


def test_a_record_that_does_not_fit_stops_the_build_with_its_line(recipe: Path) -> None:
    file = recipe.with_name("tiny.tune.toml")
    save_records(file, {"host": {PRODUCT: Choice(1, 14, 8)}})
    cache = str(recipe.parent.parent / "cache")
    build = [sys.executable, "-m", "toolchain.cli.main", "build", str(recipe), "--cache", cache]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 10
    assert "tiny.tune.toml: 1 record can't be used" in done.stderr
    assert "vector registers" in done.stderr


def test_why_names_the_file_of_records(recipe: Path) -> None:
    save_records(recipe.with_name("tiny.tune.toml"), {"host": {PRODUCT: Choice(1, 2, 2)}})
    cache = str(recipe.parent.parent / "cache")
    why = [sys.executable, "-m", "toolchain.cli.main", "why", str(recipe), "--cache", cache]
    done = subprocess.run(why, capture_output=True, text=True, check=False)
    assert "host uses 1 tuning record of tiny.tune.toml" in done.stdout, done.stderr


@pytest.mark.slow
def test_records_that_do_not_pay_for_the_whole_model_are_dropped(recipe: Path) -> None:
    file = recipe.with_name("tiny.tune.toml")
    slow = Nest.of("float32", ["batch", 16, 8, 8], (32, 16, 3, 3), SAME, BITS, REGISTERS)
    elsewhere = {"other-target": {PRODUCT: Choice(1, 2, 2)}}
    save_records(file, {"host": {slow: Choice(1, 1, 1)}, **elsewhere})
    done = tune(recipe, "--budget", "1s")
    assert done.returncode == 0, done.stderr
    assert "they don't pay" in done.stderr
    assert "dropped: does not pay" in done.stdout
    assert "no records pay; builds go on as the rules say" in done.stdout
    assert load_records(file) == elsewhere


def test_a_target_that_cannot_run_here_is_refused_with_the_reason(recipe: Path) -> None:
    foreign = "cortex-a72" if detect_host().arch == "x86_64" else "x86-64-v3"
    recipe.write_text(RECIPE.format(targets=f'"{foreign}"'))
    done = tune(recipe)
    assert done.returncode == 30
    assert f"{foreign}: needs a processor of architecture" in done.stderr
    assert not recipe.with_name("tiny.tune.toml").exists()


def test_a_budget_that_is_none_is_refused(recipe: Path) -> None:
    done = tune(recipe, "--budget", "10 apples")
    assert done.returncode == 2
    assert "allowed: seconds, or a number with a unit" in done.stderr
