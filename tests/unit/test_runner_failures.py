"""The runner: what a failing stage says and leaves, and how options reach the child."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import stages
from helpers.bench import Bench

from toolchain.cache import Cache
from toolchain.errors import ExitCode, ToolchainError
from toolchain.keys import describe_difference, key_components
from toolchain.runner import Node
from toolchain.stage_child import rebuild

# ---- failures ----


def fails(bench: Bench, node: Node) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        bench.run(node)
    assert list((bench.cache.folder / "tmp").iterdir()) == []
    assert bench.cache.size()["records"] == 0
    return caught.value


def test_a_crash_is_named_with_the_nodes_code_and_its_output(bench: Bench) -> None:
    node = bench.code("import ctypes; print('before', flush=True); ctypes.string_at(0)", failure=ExitCode.COMPILE)
    error = fails(bench, node)
    assert error.what == "the child process was killed by signal 11, SIGSEGV"
    assert (error.where, error.code) == ("code", ExitCode.COMPILE)
    assert "before" in error.debug


def test_a_kill_for_want_of_memory_is_told_with_what_needs_less(bench: Bench) -> None:
    node = bench.code("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", failure=ExitCode.EXPORT)
    error = fails(bench, node)
    assert error.what == "the child process was killed by signal 9, SIGKILL (out of memory?)"
    assert (error.where, error.code) == ("code", ExitCode.EXPORT)
    assert "--jobs 1" in error.hint


def test_an_exception_is_named_with_the_nodes_code(bench: Bench) -> None:
    error = fails(bench, bench.code("raise KeyError('conv1')", failure=ExitCode.QUANTIZE))
    assert (error.what, error.code) == ("KeyError: 'conv1'", ExitCode.QUANTIZE)
    assert "Traceback" in error.debug


def test_an_expected_failure_keeps_its_own_code_and_place(bench: Bench) -> None:
    code = "from toolchain.errors import *; raise ToolchainError('no', where={!r}, code=ExitCode.EXPORT)"
    error = fails(bench, bench.code(code.format("model.py:3")))
    assert (error.render(), error.code) == ("model.py:3: no", ExitCode.EXPORT)
    assert fails(bench, bench.code(code.format(""))).where == "code"


def test_only_the_end_of_a_long_output_is_kept(bench: Bench) -> None:
    error = fails(bench, bench.code("for n in range(50_000): print('line', n)\nraise ValueError('x')"))
    assert error.debug.endswith("line 49999")
    assert len(error.debug) < 100_000


@pytest.mark.parametrize("facts", ["float('nan')", "object()"])
def test_facts_that_are_not_json_are_a_failure_of_the_stage(bench: Bench, facts: str) -> None:
    assert fails(bench, bench.code(f"facts['x'] = {facts}")).what.startswith("the result is not JSON")


def test_a_failure_is_not_cached(bench: Bench, repo: Path) -> None:
    node = bench.code("open(ctx.root / 'weights.bin').close()")
    fails(bench, node)
    (repo / "weights.bin").write_text("")
    assert bench.run(node).status == "ran"


_TRY = "try:\n    (ctx.output('text') / 'big').write_bytes(bytes(4 << 20))\nexcept OSError:\n"


@pytest.mark.parametrize(
    "code",
    [
        "(ctx.output('text') / 'big').write_bytes(bytes(4 << 20))",
        "import numpy; numpy.zeros(4 << 20).tofile(ctx.output('text') / 'big')",
        "for n in range(40_000): print('x' * 100)",
        "import os, itertools\nfor n in itertools.count(): os.write(1, b'x' * 4096)",
        _TRY + "    from toolchain.errors import *\n    raise ToolchainError('cannot save', code=ExitCode.EXPORT)",
        _TRY + "    pass",
    ],
)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(
    bench: Bench, small_disk: Path, code: str
) -> None:
    bench.cache = Cache(small_disk)
    error = fails(bench, bench.code(code, failure=ExitCode.EXPORT))
    assert error.code is ExitCode.STORAGE
    assert error.what.startswith("no space left on the disk")
    assert bench.cache.size()["artifacts"] == 0
    assert bench.run(bench.text("small")).status == "ran"


# ---- options and words ----


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: tuple[Inner, ...]
    pair: tuple[int, str]
    maybe: Inner | None
    either: tuple[str, ...] | str
    named: dict[str, Inner]
    numbers: list[float]


@pytest.mark.parametrize("maybe", [None, Inner("m", ())])
@pytest.mark.parametrize("either", ["word", ("a", "b")])
def test_options_arrive_as_they_were(maybe: Inner | None, either: tuple[str, ...] | str) -> None:
    inner = Inner("i", (1, 2))
    options = Outer(inner, (inner, inner), (1, "x"), maybe, either, {"k": inner}, [0.5])
    assert rebuild(Outer, json.loads(json.dumps(dataclasses.asdict(options)))) == options


def test_a_tuple_among_options_is_no_difference_to_a_cached_list() -> None:
    node = stages.text_node("x", "a", "b")
    components = key_components(node, {})
    assert json.loads(json.dumps(components)) == components
    assert describe_difference(components, key_components(node, {})) == []


def test_a_difference_names_what_came_and_what_went() -> None:
    old = {"tools": {"torch": "1", "onnx": "1"}, "python": "3.11"}
    new = {"tools": {"torch": "2", "tvm": "1"}, "python": "3.12"}
    assert describe_difference(old, new) == [
        "python: 3.11 -> 3.12",
        "tool onnx: 1 -> nothing",
        "tool torch: 1 -> 2",
        "tool tvm: nothing -> 1",
    ]
