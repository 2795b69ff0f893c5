"""An engine ahead of time for the edge benchmark, and a static executable of it whose instructions can be counted.

``python edge_build.py ONNX_FOLDER PROFILE FOLDER`` writes FOLDER/model.so and, for ARM, FOLDER/probe, and prints one
line of JSON: bytes of weights and arena, and the least bytes that any arena of this plan needs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cpu_models import ROOT
from cpu_ours import machine_of

HERE = Path(__file__).resolve().parent
PROBE_SOURCES = ("edge_probe.c", "edge_fill.h")


def build(folder: Path, profile_name: str, output: Path) -> dict[str, Any]:
    """Compile ``folder / "model.onnx"`` for a profile into the folder ``output``.

    Raises:
        Refusal: it can't be compiled ahead of time.
    """
    import onnx

    from toolchain.specs import Signature
    from toolchain.target import load_target
    from toolchain.tvm.forms import Interface, build_library
    from toolchain.tvm.importer import import_model
    from toolchain.tvm.link import Linker
    from toolchain.tvm.pipeline import Notes
    from toolchain.tvm.sizes import conform_inputs

    profile = load_target(profile_name)
    model = onnx.load(folder / "model.onnx")
    conform_inputs(model, Signature.from_contract(json.loads((folder / "contract.json").read_text())))
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    linker = Linker(profile.tvm.linker, profile.arch, profile.runtime.abi.min)
    form = build_library(
        import_model(model), machine_of(profile), Notes(), linker, output / "model.so", Interface(*names, {}), "aot"
    )
    if profile.arch != "x86_64":
        _link_probe(form.engine, linker, output)
    return {
        "weight_bytes": form.weight_bytes,
        "arena_bytes": form.arena_bytes,
        "least_arena_bytes": _least(form.engine) if form.engine is not None else 0,
    }


def _least(engine: Any) -> int:
    """Bytes that live at once in the busiest step: no arena is smaller."""
    program, least = engine.program, 0
    for step, call in enumerate(program.calls):
        live = sum(int(buffer.size) for buffer in program.buffers if buffer.first <= step <= buffer.last)
        least = max(least, live + engine.workspaces.get(call.kernel, 0))
    return least


def _link_probe(engine: Any, linker: Any, output: Path) -> None:
    from toolchain.tvm.aot.library import write_objects

    parts = output / "parts"
    parts.mkdir(exist_ok=True)
    objects = write_objects(engine, linker, parts)
    for source in PROBE_SOURCES:
        shutil.copyfile(HERE / source, parts / source)
    linker.compile(PROBE_SOURCES[0], parts)
    linker.link_static(["edge_probe.o", *objects], parts, "probe")
    (parts / "probe").rename(output / "probe")
    shutil.rmtree(parts)


def main() -> None:
    """See the module's docstring."""
    from toolchain.tvm.library import Refusal

    sys.path.insert(0, str(ROOT))
    folder, profile, output = sys.argv[1:]
    try:
        answer = build(Path(folder), profile, Path(output))
    except Refusal as refusal:
        answer = {"refused": str(refusal)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
