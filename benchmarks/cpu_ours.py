"""Our own engine of one ONNX file, built the way the compile_tvm stage builds it, with what each step costs.

``python cpu_ours.py ONNX_FOLDER PROFILE LIBRARY FORM [DUMP_FOLDER]`` prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu_models import ROOT

Costs = dict[str, float]


class _Clock:
    """CPU seconds of this process and of its finished children (the linker) since the last look."""

    def __init__(self) -> None:
        self.last = self._now()

    @staticmethod
    def _now() -> float:
        child = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + child.ru_utime + child.ru_stime

    def lap(self) -> float:
        now = self._now()
        passed, self.last = now - self.last, now
        return passed


def machine_of(profile: Any) -> Any:
    """The compiler's view of a profile, whatever fields it has in this version."""
    from toolchain.tvm.pipeline import Machine

    known = {"target": profile.tvm_target(), "kind": profile.kind, "arch": profile.arch}
    names = {f.name for f in dataclasses.fields(Machine)} - known.keys()
    return Machine(**known, **{name: getattr(profile.cpu, name) for name in names if hasattr(profile.cpu, name)})


def build(
    folder: Path, profile_name: str, output: Path, form: str = "auto", dump: Path | None = None
) -> dict[str, Any]:
    """Compile ``folder / "model.onnx"`` to ``output``; CPU seconds by step.

    Raises:
        Refusal: with the reason.
    """
    import onnx

    from toolchain.specs import Signature
    from toolchain.target import load_target
    from toolchain.tvm import forms, pipeline
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.library import load_tvm
    from toolchain.tvm.link import Linker
    from toolchain.tvm.sizes import conform_inputs

    profile = load_target(profile_name)
    load_tvm()
    clock, costs = _Clock(), Costs()
    model = onnx.load(folder / "model.onnx")
    conform_inputs(model, Signature.from_contract(json.loads((folder / "contract.json").read_text())))
    module = import_model(model)
    costs["import"] = clock.lap()
    finish = _time_phases(pipeline, forms, clock, costs)
    notes = pipeline.Notes()
    interface = forms.Interface(
        [value.name for value in model.graph.input], [value.name for value in model.graph.output], {}
    )
    linker = Linker(profile.tvm.linker, profile.arch, profile.runtime.abi.min)
    built = forms.build_library(module, machine_of(profile), notes, linker, output, interface, form, dump)
    finish()
    unscheduled = sorted(set(getattr(notes, "unscheduled", ())))
    return {"costs": costs, "unscheduled": unscheduled, "form": built.name}


def _time_phases(pipeline: Any, forms: Any, clock: _Clock, costs: Costs) -> Callable[[], None]:
    """Notes how long each phase takes: the time between its own passes being made and the next one's.

    Returns:
        To be called at the end: what is left is linking.
    """
    current = ["before"]

    def enter(name: str) -> None:
        costs[current[0]] = costs.get(current[0], 0.0) + clock.lap()
        current[0] = name

    def watch(phase: Any, last: bool) -> Any:
        def make(*arguments: Any) -> Any:
            enter(phase.name)
            passes = phase.make(*arguments)
            # There is no phase after the last one to end it: a pass does.
            return [*passes, _call(lambda: enter("codegen"))] if last else passes

        return dataclasses.replace(phase, make=make)

    phases, link = pipeline.PHASES, forms.link_ahead

    def link_ahead(*arguments: Any) -> None:
        enter("link")
        link(*arguments)

    forms.link_ahead = link_ahead
    pipeline.PHASES = tuple(watch(phase, phase.name == "dataflow") for phase in phases)

    def finish() -> None:
        enter("end")
        pipeline.PHASES, forms.link_ahead = phases, link
        costs.pop("before", None)

    return finish


def _call(function: Callable[[], None]) -> Any:
    import tvm

    @tvm.transform.module_pass(opt_level=0, name="benchmark.clock")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        function()
        return module

    return apply


def main() -> None:
    """See the module's docstring."""
    from toolchain.tvm.library import Refusal

    sys.path.insert(0, str(ROOT))
    folder, profile, output, form, *dump = sys.argv[1:]
    try:
        answer = build(Path(folder), profile, Path(output), form, Path(dump[0]) if dump else None)
    except Refusal as refusal:
        answer = {"refused": str(refusal)}
    answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
