"""Executes a plan: independent stages side by side, measurements alone, everything ended on Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from toolchain.artifact import Artifact
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runner import Lookup, Node, Outcome, Runner


class Listener(Protocol):
    """Receives the events of a build; called from several threads.

    ``started`` comes first, for every stage; ``running`` only for one whose result the cache does not hold.
    """

    def started(self, node: Node) -> None: ...

    def running(self, node: Node) -> None: ...

    def finished(self, node: Node, outcome: Outcome) -> None: ...

    def failed(self, node: Node, what: str) -> None: ...


class Silent:
    """A listener that ignores everything."""

    def started(self, node: Node) -> None: ...

    def running(self, node: Node) -> None: ...

    def finished(self, node: Node, outcome: Outcome) -> None: ...

    def failed(self, node: Node, what: str) -> None: ...


def execute(nodes: Sequence[Node], runner: Runner, jobs: int, listener: Listener) -> dict[str, Outcome]:
    """Run all nodes, each after those it takes inputs from.

    Args:
        nodes: in an order in which every node comes after its inputs.
        runner: runs one node; its pool is closed when one fails.
        jobs: how many stages may run at once; exclusive ones run alone, last.
        listener: told of every start and end.

    Raises:
        ToolchainError: a stage failed; nothing that was running is left behind.
        ValueError: the plan is no plan: a node takes inputs from one that comes later or does not exist.
    """
    _check_order(nodes)
    outcomes: dict[str, Outcome] = {}
    for exclusive in (False, True):
        chosen = [n for n in nodes if n.stage.exclusive is exclusive]
        _execute(chosen, runner, 1 if exclusive else jobs, listener, outcomes)
    return outcomes


def _check_order(nodes: Sequence[Node]) -> None:
    # Otherwise the loop below would wait for ever.
    for exclusive in (False, True):
        known = {n.id for n in nodes if exclusive and not n.stage.exclusive}
        for node in (n for n in nodes if n.stage.exclusive is exclusive):
            for source, _ in node.inputs.values():
                if source not in known:
                    raise ValueError(f"{node.id} takes an input from {source}, which does not run before it")
            if node.id in known:
                raise ValueError(f"two nodes are called {node.id}")
            known.add(node.id)


def _execute(
    nodes: Iterable[Node], runner: Runner, jobs: int, listener: Listener, outcomes: dict[str, Outcome]
) -> None:
    waiting = list(nodes)
    running: dict[Future[Outcome], Node] = {}
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            while waiting or running:
                for node in [n for n in waiting if all(source in outcomes for source, _ in n.inputs.values())]:
                    waiting.remove(node)
                    running[pool.submit(_run, node, runner, outcomes, listener)] = node
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    node = running.pop(future)
                    outcomes[node.id] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.pool.close()
            raise


def _run(node: Node, runner: Runner, outcomes: Mapping[str, Outcome], listener: Listener) -> Outcome:
    inputs, missing = gather(node, outcomes)
    if missing:
        outcome = Outcome(node, "skipped", {}, {}, missing)
        listener.finished(node, outcome)
        return outcome
    listener.started(node)
    try:
        outcome = runner.run(node, inputs, listener.running)
    except ToolchainError as error:
        crashed = error.code is node.failure or error.code is ExitCode.MISSING_TOOL
        if not (node.tolerant and crashed):
            # What ends because something else failed has not failed.
            if error.code is not ExitCode.INTERRUPTED:
                listener.failed(node, error.what)
            raise
        outcome = Outcome(node, "crashed", {}, {}, ": ".join(filter(None, [error.what, error.hint])))
    listener.finished(node, outcome)
    return outcome


def gather(node: Node, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Artifact], str]:
    """The artifacts that ``node`` takes, and why it must be skipped if a needed one does not exist."""
    inputs: dict[str, Artifact] = {}
    for name, (source, output) in node.inputs.items():
        artifact = outcomes[source].outputs.get(output)
        if artifact is not None:
            inputs[name] = artifact
        elif name not in node.optional:
            return {}, outcomes[source].refused or f"{source} made no {output}"
    return inputs, ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a build would do with a node: ``"cached"``, ``"run"`` or ``"depends"`` (on a stage that would run,
    whose result may turn out to be the same).  ``outcome``: what is known to come out, if the state is ``"cached"``.
    """

    node: Node
    state: str
    reasons: tuple[str, ...] = ()
    outcome: Outcome | None = None


def forecast(nodes: Sequence[Node], runner: Runner) -> list[Forecast]:
    """Look every node up in the cache, without running any."""
    outcomes: dict[str, Outcome] = {}
    result: list[Forecast] = []
    for node in nodes:
        unknown = sorted({source for source, _ in node.inputs.values() if source not in outcomes})
        if unknown:
            result.append(Forecast(node, "depends", tuple(f"{source} would run" for source in unknown)))
            continue
        inputs, missing = gather(node, outcomes)
        if missing:
            outcomes[node.id] = Outcome(node, "skipped", {}, {}, missing)
            result.append(Forecast(node, "cached", (f"skipped: {missing}",), outcomes[node.id]))
            continue
        found: Lookup = runner.look_up(node, inputs)
        if found.record is None:
            result.append(Forecast(node, "run", found.reasons))
        else:
            record = found.record
            outcomes[node.id] = Outcome(node, "cached", record.outputs, record.facts, record.refused)
            note = (f"refused: {record.refused}",) if record.refused else ()
            result.append(Forecast(node, "cached", note, outcomes[node.id]))
    return result
