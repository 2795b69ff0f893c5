"""Executing a plan: order, side by side, alone, and nothing left behind when it ends early."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import stages
from helpers.bench import Bench
from helpers.processes import descendants, read_pids, running, wait_until
from helpers.stages import Code, text_node

from toolchain.errors import ExitCode, ToolchainError
from toolchain.execute import Silent, execute, forecast
from toolchain.runner import Node, Outcome
from toolchain.worker import WorkerPool


class Notes:
    """A listener that notes every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.run: list[str] = []
        self._lock = threading.Lock()

    def started(self, node: Node) -> None:
        self._note("started", node)

    def running(self, node: Node) -> None:
        self.run.append(node.id)

    def finished(self, node: Node, outcome: Outcome) -> None:
        self._note(outcome.status, node)

    def failed(self, node: Node, what: str) -> None:
        self._note("failed", node)

    def _note(self, event: str, node: Node) -> None:
        with self._lock:
            self.events.append((event, node.id))

    def position(self, event: str, id: str) -> int:
        return self.events.index((event, id))


def run(bench: Bench, nodes: Sequence[Node], jobs: int = 2) -> tuple[dict[str, Outcome], Notes]:
    notes = Notes()
    return execute(nodes, bench.runner(), jobs, notes), notes


def code(id: str, code: str = "", *, stage: Any = stages.CODE, **changes: Any) -> Node:
    return dataclasses.replace(Node(id, stage, Code(code)), **changes)


SLOW = "import time; (ctx.output('text') / 'text.txt').write_text('x'); time.sleep(0.25)"


def test_every_node_runs_after_those_it_takes_inputs_from(bench: Bench) -> None:
    nodes = [
        text_node("a", "a"),
        text_node("b", "b"),
        text_node("ab", x="a", y="b"),
        text_node("all", x="ab", y="a"),
    ]
    outcomes, notes = run(bench, nodes)
    assert bench.read(outcomes["all"]) == "x=X=A Y=B y=A"
    for node in nodes:
        for source, _ in node.inputs.values():
            assert notes.position("ran", source) < notes.position("started", node.id)


def test_independent_nodes_run_side_by_side_up_to_the_number_of_jobs(bench: Bench) -> None:
    nodes = [code(str(n), SLOW + f"  # {n}") for n in range(4)]
    _, notes = run(bench, nodes, jobs=2)
    under_way = list(itertools.accumulate(1 if event == "started" else -1 for event, _ in notes.events))
    assert max(under_way) == 2
    assert len(notes.events) == 8


def test_one_job_runs_one_node_at_a_time(bench: Bench) -> None:
    _, notes = run(bench, [text_node(word, word) for word in "abc"], jobs=1)
    assert [event for event, _ in notes.events] == ["started", "ran"] * 3


def test_exclusive_nodes_run_alone_and_last(bench: Bench) -> None:
    alone = dataclasses.replace(stages.CODE, exclusive=True)
    nodes = [
        code("slow", SLOW),
        code("m1", SLOW + " # 1", stage=alone),
        code("m2", SLOW + " # 2", stage=alone, inputs={"x": ("m1", "text")}),
        code("slow2", SLOW + " # 3"),
    ]
    _, notes = run(bench, nodes, jobs=4)
    assert notes.events[-4:] == [("started", "m1"), ("ran", "m1"), ("started", "m2"), ("ran", "m2")]


def test_a_second_build_takes_everything_from_the_cache(bench: Bench) -> None:
    nodes = [text_node("a", "a", trail=bench.trail), text_node("b", x="a", trail=bench.trail)]
    first, _ = run(bench, nodes)
    second, _ = run(bench, nodes)
    assert bench.runs == 2
    assert {o.status for o in second.values()} == {"cached"}
    assert {n: o.outputs for n, o in second.items()} == {n: o.outputs for n, o in first.items()}


def test_what_a_refused_stage_would_have_given_is_skipped_with_its_reason(bench: Bench) -> None:
    nodes = [
        code("compile", "refused = 'no operator for LSTM'"),
        text_node("verify", engine="compile"),
        text_node("report", verdict="verify"),
        dataclasses.replace(text_node("race", "go", engine="compile"), optional=frozenset({"engine"})),
    ]
    outcomes, notes = run(bench, nodes)
    assert (outcomes["verify"].status, outcomes["verify"].refused) == ("skipped", "no operator for LSTM")
    assert (outcomes["report"].status, outcomes["report"].refused) == ("skipped", "no operator for LSTM")
    assert bench.read(outcomes["race"]) == "go"
    assert ("started", "verify") not in notes.events


CRASH = "import ctypes; ctypes.string_at(0)"


def test_a_tolerant_node_may_crash_and_the_build_goes_on_with_the_reason(bench: Bench) -> None:
    nodes = [
        code("tvm", CRASH, tolerant=True, failure=ExitCode.COMPILE),
        text_node("after", engine="tvm"),
        text_node("other", "fine"),
    ]
    outcomes, notes = run(bench, nodes)
    assert outcomes["tvm"].status == "crashed"
    assert outcomes["tvm"].refused.startswith("the child process was killed by signal 11, SIGSEGV")
    assert outcomes["after"].refused == outcomes["tvm"].refused
    assert outcomes["other"].status == "ran"
    assert not [event for event, _ in notes.events if event == "failed"]
    assert run(bench, nodes)[0]["tvm"].status == "crashed"  # it is not cached: the next build tries again


def test_a_missing_tool_costs_a_tolerant_node_alone(bench: Bench) -> None:
    missing = "from toolchain.errors import *; raise ToolchainError('no nvcc', hint='install it', code=ExitCode({}))"
    nodes = [code("cuda", missing.format(40), tolerant=True, failure=ExitCode.COMPILE)]
    assert run(bench, nodes)[0]["cuda"].refused == "no nvcc: install it"


def test_another_failure_of_a_tolerant_node_still_fails_the_build(bench: Bench) -> None:
    bad = "from toolchain.errors import *; raise ToolchainError('bad data', code=ExitCode.USER_CODE)"
    with pytest.raises(ToolchainError, match="bad data"):
        run(Bench(bench.cache, bench.root, WorkerPool(), bench.trail), [code("x", bad, tolerant=True)])


def test_a_failure_ends_what_is_running_and_starts_nothing_more(bench: Bench, tmp_path: Path) -> None:
    sleeper = (
        "import os, subprocess, time\nfrom pathlib import Path\nfrom helpers.calls import note\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"note(Path({str(tmp_path / 'pids')!r}), [os.getpid(), child.pid])\n"
        "time.sleep(300)"
    )
    wait = (
        "import time\nfrom pathlib import Path\n"
        f"while not Path({str(tmp_path / 'pids')!r}).exists(): time.sleep(0.01)\nraise ValueError('broken')"
    )
    bench.pool = WorkerPool()
    notes = Notes()
    nodes = [code("sleeper", sleeper), code("broken", wait), text_node("later", "x", trail=bench.trail)]
    with pytest.raises(ToolchainError, match="broken") as caught:
        execute(nodes, bench.runner(), 2, notes)
    assert caught.value.where == "broken"
    assert running(read_pids(tmp_path / "pids")) == []
    assert list((bench.cache.folder / "tmp").iterdir()) == []
    assert bench.runs == 0
    assert [e for e in notes.events if e[0] == "failed"] == [("failed", "broken")]


def test_an_early_end_leaves_no_process_of_its_own(bench: Bench) -> None:
    before = set(descendants(os.getpid()))
    bench.pool = WorkerPool()
    with pytest.raises(ToolchainError):
        run(bench, [code("x", "raise ValueError('broken')")])
    wait_until(lambda: set(descendants(os.getpid())) <= before, "its processes end")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([text_node("b", x="a"), text_node("a", "a")], "b takes an input from a"),
        ([text_node("b", x="nobody")], "b takes an input from nobody"),
        ([text_node("a", "1"), text_node("a", "2")], "two nodes are called a"),
        ([Node("m", stages.ALONE, stages.Text()), text_node("b", x="m")], "b takes an input from m"),
    ],
)
def test_a_plan_that_could_never_end_is_refused(bench: Bench, nodes: list[Node], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        execute(nodes, bench.runner(), 2, Silent())


# ---- forecast ----


def test_a_forecast_agrees_with_what_then_runs(bench: Bench, repo: Path) -> None:
    def plan(word: str) -> list[Node]:
        return [
            bench.model(),
            text_node("a", word),
            text_node("b", x="a"),
            text_node("c", x="model"),
            code("refuses", "refused = 'cannot'"),
            text_node("d", x="refuses"),
            text_node("e", y="c"),
        ]

    def compare(word: str) -> dict[str, tuple[str, str]]:
        forecasts = forecast(plan(word), bench.runner())
        outcomes, _ = run(bench, plan(word))
        pairs = {f.node.id: (f.state, outcomes[f.node.id].status) for f in forecasts}
        possible = {"run": {"ran"}, "cached": {"cached", "skipped"}, "depends": {"ran", "cached", "skipped"}}
        assert all(status in possible[state] for state, status in pairs.values())
        return pairs

    assert set(compare("one").values()) == {("run", "ran"), ("depends", "ran"), ("depends", "skipped")}
    assert set(compare("one").values()) == {("cached", "cached"), ("cached", "skipped")}
    changed = compare("two")
    assert {id for id, (state, _) in changed.items() if state != "cached"} == {"a", "b"}
    (repo / "helper.py").write_text("def scale(value):\n    return value + value\n")
    cut_off = compare("two")
    assert cut_off["model"] == ("run", "ran")
    assert cut_off["c"] == cut_off["e"] == ("depends", "cached")


def test_a_forecast_gives_reasons(bench: Bench) -> None:
    run(bench, [text_node("a", "one"), text_node("b", x="a"), code("refuses", "refused = 'cannot'")])
    nodes = [
        text_node("a", "two"),
        text_node("b", x="a"),
        code("refuses", "refused = 'cannot'"),
        text_node("d", x="refuses"),
    ]
    assert [(f.node.id, f.state, f.reasons) for f in forecast(nodes, bench.runner())] == [
        ("a", "run", ("option words: ['one'] -> ['two']",)),
        ("b", "depends", ("a would run",)),
        ("refuses", "cached", ("refused: cannot",)),
        ("d", "cached", ("skipped: cannot",)),
    ]


def test_a_forecast_runs_nothing_and_writes_nothing(bench: Bench) -> None:
    nodes = [text_node("a", "one", trail=bench.trail), text_node("b", x="a", trail=bench.trail)]
    forecast(nodes, bench.runner())
    assert bench.runs == 0
    assert bench.cache.size() == {"bytes": 0, "artifacts": 0, "records": 0}


def test_a_stage_is_reported_as_running_only_when_the_cache_does_not_hold_it(bench: Bench) -> None:
    assert run(bench, [text_node("first", "one")])[1].run == ["first"]
    notes = run(bench, [text_node("first", "one"), text_node("second", x="first")])[1]
    assert notes.run == ["second"]
    assert [id for event, id in notes.events if event == "started"] == ["first", "second"]
