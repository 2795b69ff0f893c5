"""link_static: an engine ahead of time and the edge runtime as one static executable, ``model``.

For wasm32 it is a WebAssembly module, ``model.wasm``.

What it holds of its bundle is what it must know on the device: names, requirements, contract and self-test.  How the
engine was chosen is known only later, and is in the ``bundle.json`` beside it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.stage import StageContext, StageDef, StageResult

_TIMEOUT_S = 900


def program_name(arch: str) -> str:
    """Name of the executable's file."""
    return "model.wasm" if arch == "wasm32" else "model"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the link_static stage.

    Attributes:
        arch: of the target, e.g. ``"aarch64"``.
        name: of the release.
        version: of the release.
        description: of the release.
        target: name of the target.
        profile: the target profile as JSON.
        requirements: what the machine must have, as ``TargetProfile.requirements()`` gives it.
        runs: what runs the executable here: ``"native"``, QEMU's program on PATH, or ``""``: nothing does.
        cpu: the processor that QEMU is to be.
    """

    arch: str
    name: str
    version: str
    description: str
    target: str
    profile: Mapping[str, Any]
    requirements: Mapping[str, Any]
    runs: str = ""
    cpu: str = ""


def run(ctx: StageContext) -> StageResult:
    """Inputs ``engine``, ``objects`` (of compile_tvm), ``runtime``, ``verdict``, ``selftest``; output ``engine``.

    The output holds ``model`` or ``model.wasm``, engine.json of the form ``"static"`` and contract.json.  Where this
    machine can run the executable, it must pass its own self-test.

    Raises:
        ToolchainError: COMPILE (also of one that fails its self-test) or MISSING_TOOL.
    """
    from toolchain.bundle.manifest import BundleManifest, RuntimeNeed, TargetInfo, Tolerance, parse_engine
    from toolchain.runtime.edge.build import StaticModel, build_runner, static_libc

    options: Options = ctx.options
    contract = json.loads((ctx.inputs["engine"] / "contract.json").read_text())
    engine = json.loads((ctx.inputs["engine"] / "engine.json").read_text())
    program = program_name(options.arch)
    engine |= {"form": "static", "variants": [{"file": program, "sizes": {}}]}
    verdict = json.loads((ctx.inputs["verdict"] / "verdict.json").read_text()) if "verdict" in ctx.inputs else {}
    manifest = BundleManifest(
        name=options.name,
        version=options.version,
        description=options.description,
        target=TargetInfo(options.target, options.profile),
        requirements=options.requirements,
        engine=parse_engine(engine, "engine.json"),
        runtime=RuntimeNeed("", ""),
        contract=contract,
        selftest=Tolerance.around(verdict.get("worst") or {}),
    )
    recorded = (ctx.inputs["selftest"] / "selftest.npz").read_bytes() if "selftest" in ctx.inputs else b""
    objects = tuple(sorted(ctx.inputs["objects"].glob("*.o")))
    output = ctx.output("engine")
    parts = ctx.out / "parts"
    model = StaticModel(objects, manifest.to_bytes(), recorded, ctx.inputs["runtime"])
    built = build_runner(options.arch, static_libc(options.arch), "zig", parts, model)
    checked = _self_test(built.program, options) if options.runs and recorded else "not run"
    shutil.move(built.program, output / program)
    shutil.rmtree(parts)
    shutil.copyfile(ctx.inputs["engine"] / "contract.json", output / "contract.json")
    (output / "engine.json").write_text(json.dumps(engine, sort_keys=True, indent=1) + "\n")
    return StageResult({"form": "static", "bytes": (output / program).stat().st_size, "checked": checked})


def _self_test(program: Path, options: Options) -> str:
    """How the executable was run; its libraries, its link and its start are nothing that the engine's check covers."""
    native = options.runs == "native"
    command = [] if native else [options.runs, *(("-cpu", options.cpu) if options.cpu else ())]
    done = subprocess.run(
        [*command, str(program), "self-test"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    how = "native" if native else f"emulated by {options.runs}" + (f" as {options.cpu}" if options.cpu else "")
    if done.returncode:
        raise ToolchainError(
            f"the executable fails its self-test ({how}): it ended with {done.returncode}",
            where=options.target,
            details=(done.stderr or done.stdout).strip().splitlines()[-5:],
            code=ExitCode.COMPILE,
        )
    return how


def programs(options: Options) -> tuple[str, ...]:
    """The programs on PATH whose versions can change the result."""
    return () if options.runs in ("", "native") else (options.runs,)


STAGE = StageDef(
    name="link_static",
    version=2,
    run="toolchain.stages.link_static:run",
    options=Options,
    tools=("ziglang",),
    worker="graph",
    programs=programs,
)
