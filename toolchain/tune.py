"""recipe -> tuning records: which targets can be tuned here, their models, the search, and the file.

The search itself is :mod:`toolchain.search`; nothing here is needed to build.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import digest_json
from toolchain.build import chosen_targets, open_cache
from toolchain.cache import Cache
from toolchain.errors import ExitCode, ToolchainError
from toolchain.execute import Listener, Silent, execute
from toolchain.host import Host, detect_host
from toolchain.keys import installed_version, own_version
from toolchain.plan import Plan, TargetPlan, make_plan
from toolchain.plan_engine import Entry
from toolchain.recipe import load_recipe
from toolchain.runner import Node, Runner
from toolchain.search import Search, Settings, TargetResult, Task
from toolchain.target import load_target
from toolchain.trials import Progress, Workers
from toolchain.tvm.machine import Machine
from toolchain.tvm.records import Records, load_records, save_records


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a tuning run found.

    Attributes:
        file: the file of records, written.
        targets: what was found for each target.
        refused: target -> why it can't be tuned here.
    """

    file: Path
    targets: tuple[TargetResult, ...]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Machine-readable."""
        return {
            "file": str(self.file),
            "targets": {result.target: result.to_json() for result in self.targets},
            "refused": dict(self.refused),
        }


def tune(
    recipe: Path | str,
    *,
    targets: Sequence[str] = (),
    output: Path | None = None,
    cache: Path | None = None,
    settings: Settings | None = None,
    restart: bool = False,
    listener: Listener | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TuneResult:
    """Search for better choices than the rules', within the budget of ``settings``, and write those that pay.

    Args:
        recipe: path of the recipe.
        targets: names of the recipe's targets; all that can be tuned here if empty.
        output: file of records; the recipe's if not given.
        cache: folder of the stage cache; the user's if not given.
        settings: budget and how to measure.
        restart: forget what earlier runs found.
        listener: gets the events of the stages that make the model.
        say: gets a line for each step of the search.

    Raises:
        ToolchainError: INCOMPATIBLE_HOST: no target, or one that was asked for, can't be tuned here; or anything
            that stops the stages which make the model.
    """
    settings = settings or Settings()
    started = time.monotonic()
    loaded, host = load_recipe(Path(recipe).absolute()), detect_host()
    profiles = [load_target(t, loaded.folder) for t in loaded.targets]
    plan = make_plan(loaded, chosen_targets(loaded, profiles, targets), host, False, {})
    refused = {t.profile.name: reason for t in plan.targets if (reason := _why_not(t, host))}
    tunable = [t for t in plan.targets if t.profile.name not in refused]
    if not tunable or (targets and refused):
        raise _refusal(refused)
    for name, reason in refused.items():
        say(f"  refused  {name}: {reason}")
    file = output or loaded.records_path
    saved: dict[str, Records] = dict(load_records(file)) if file.exists() else {}
    store = open_cache(cache)
    runner = Runner(store, loaded.root.absolute(), loaded.name)
    results = []
    with store.in_use(), store.scratch() as scratch:
        try:
            for number, target in enumerate(tunable):
                left = settings.budget - (time.monotonic() - started)
                share = Settings(left / (len(tunable) - number), settings.threads, settings.trial)
                task = _task(plan, target, _model(plan, target, runner, listener or Silent()), scratch)
                progress = Progress(_progress_file(store, host, task, settings), restart)
                search = Search(task, share, Workers(runner.pool, scratch), progress, say)
                result = search.run(saved.get(task.target, {}))
                saved[task.target] = result.records
                save_records(file, saved)
                results.append(result)
        finally:
            runner.pool.close()
            store.save_digests()
    return TuneResult(file, tuple(results), refused)


def _why_not(target: TargetPlan, host: Host) -> str:
    """Why a target can't be tuned here; "" if it can."""
    if target.profile.kind != "cpu":
        return "only CPU targets are tuned"
    entry = next((e for e in target.entries if e.id == "fp32/tvm"), None)
    if entry is None:
        return "it has no fp32 engine of TVM"
    if entry.refused:
        return entry.refused
    return "" if target.profile.runs_natively_on(host) else target.unmeasured


def _refusal(refused: Mapping[str, str]) -> ToolchainError:
    return ToolchainError(
        "tuning measures, and these targets can't be measured on this machine",
        where="targets",
        details=[f"{name}: {reason}" for name, reason in refused.items()],
        hint="tune on a machine of the target's own kind and commit the file; builds anywhere use it",
        code=ExitCode.INCOMPATIBLE_HOST,
    )


def _entry(target: TargetPlan) -> Entry:
    return next(e for e in target.entries if e.id == "fp32/tvm")


def _model(plan: Plan, target: TargetPlan, runner: Runner, listener: Listener) -> Path:
    """The folder of the target's fp32 model, made by the stages of a build."""
    nodes = {node.id: node for node in plan.nodes}
    source, output = nodes[_entry(target).compile].inputs["onnx"]
    wanted: list[Node] = []

    def add(name: str) -> None:
        for before, _ in nodes[name].inputs.values():
            add(before)
        if nodes[name] not in wanted:
            wanted.append(nodes[name])

    add(source)
    outcome = execute(wanted, runner, 1, listener)[source]
    return runner.cache.path(outcome.outputs[output])


def _task(plan: Plan, target: TargetPlan, model: Path, scratch: Path) -> Task:
    recipe, profile = plan.recipe, target.profile
    options = next(node.options for node in plan.nodes if node.id == _entry(target).compile)
    # What both have by the same name, so that a build's machine and this one never differ.
    names = [f.name for f in dataclasses.fields(Machine) if hasattr(options, f.name)]
    machine = {name: getattr(options, name) for name in names}
    sizes = {name: recipe.measure.shapes.get(name, dim.example or dim.min) for name, dim in recipe.model.dims.items()}
    sizes |= {n: d.min for n, d in recipe.model.dims.items() if d.batch and n not in recipe.measure.shapes}
    return Task(profile.name, machine, options.linker, model, sizes, scratch / profile.name)


def _progress_file(store: Cache, host: Host, task: Task, settings: Settings) -> Path:
    """Where earlier measurements hold: the same compiler, machine and threads."""
    versions = [own_version(), installed_version("apache-tvm")]
    key = digest_json([versions, host.cpu_model, task.machine, settings.threads])
    return store.folder / "tune" / f"{key.removeprefix('sha256:')[:32]}.json"
