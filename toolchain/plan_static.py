"""The stages that make a static executable, or a WebAssembly module, of an engine ahead of time."""

from __future__ import annotations

from toolchain.errors import ExitCode
from toolchain.host import incompatibilities
from toolchain.plan_shared import Maker
from toolchain.programs import emulator_program
from toolchain.runtime.edge.build import static_libc
from toolchain.stages import link_static, runner
from toolchain.target import TargetProfile


def add_link(maker: Maker, profile: TargetProfile, compiled: str, checked: str) -> str:
    """Adds the stage that links ``compiled``, judged by ``checked``, to an executable; returns its id.

    All engines of a target share the compiled edge runtime.
    """
    recipe, runtime = maker.recipe, f"runtime@{profile.name}"
    if runtime not in {node.id for node in maker.nodes}:
        made = runner.Options(profile.arch, static_libc(profile.arch), "zig", static=True)
        maker.add(runtime, runner.STAGE, made, {}, failure=ExitCode.COMPILE, target=profile.name)
    options = link_static.Options(
        arch=profile.arch,
        name=recipe.name,
        version=recipe.version,
        description=recipe.description,
        target=profile.name,
        profile=profile.to_json(),
        requirements=profile.requirements(),
        **_runs(maker, profile),
    )
    inputs = {
        "engine": f"{compiled}:engine",
        "objects": f"{compiled}:objects",
        "runtime": f"{runtime}:runner",
        "verdict": f"{checked}:verdict",
        "selftest": "selftest:selftest",
    }
    name = compiled.replace("compile[", "link[")
    optional = frozenset({"verdict", "selftest"})
    return maker.add(
        name, link_static.STAGE, options, inputs, optional=optional, failure=ExitCode.COMPILE, target=profile.name
    )


def _runs(maker: Maker, profile: TargetProfile) -> dict[str, str]:
    """What runs the executable here: this machine, or QEMU where it is on PATH and the profile names its processor."""
    if not incompatibilities(profile.requirements(), maker.host):
        return {"runs": "native"}
    program = emulator_program(profile.arch, profile.execute.qemu_cpu)
    return {"runs": program, "cpu": profile.execute.qemu_cpu} if program else {}
