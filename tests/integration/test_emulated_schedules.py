"""Every family of schedules, compiled for every CPU profile and run on a machine of that kind, against ONNX Runtime."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import schedule_models
import schedule_models_int8
from helpers.emulated import I8MM_CPU, ILLEGAL_INSTRUCTION, EmulatedMachine
from qdq_support import as_defined
from schedule_models import Case

from toolchain.host import detect_host
from toolchain.target import TargetProfile, list_targets, load_target
from toolchain.tvm.compare import HALF, SINGLE
from toolchain.tvm.importer import import_model
from toolchain.tvm.link import Linker, link_executable
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes, compile_module

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tests" / "helpers" / "run_libraries.py"
PROFILES = [load_target(name) for name in list_targets() if name != "host"]
CPUS = {p.name: p.execute.qemu_cpu for p in PROFILES if p.kind == "cpu" and p.arch == "aarch64"}
"""QEMU's CPU for each Arm profile."""

Outputs = dict[str, list[list[np.ndarray]]]


@cache
def cases() -> Mapping[str, Case]:
    floats = {build.__name__: schedule_models.float_case(build) for build in schedule_models.FLOAT}
    return floats | schedule_models_int8.cases() | half_cases() | random_cases()


@cache
def families() -> list[str]:
    return [name for name in cases() if name not in half_cases() | random_cases()]


@cache
def half_cases() -> Mapping[str, Case]:
    return {f"half {build.__name__}": schedule_models.half_case(build) for build in schedule_models.FLOAT}


@cache
def random_cases() -> Mapping[str, Case]:
    convolutions = {f"convolution {seed}": schedule_models_int8.random_convolution(seed) for seed in range(14)}
    return convolutions | {f"product {seed}": schedule_models_int8.random_product(seed) for seed in range(8)}


@cache
def expected(name: str) -> list[list[np.ndarray]]:
    case = cases()[name]
    return [as_defined(case.model, feeds) for feeds in case.feeds]


def machine_of(profile: TargetProfile) -> Machine:
    cpu = profile.cpu
    return Machine(profile.tvm_target(), profile.kind, profile.arch, cpu.vector_bits, cpu.registers, cpu.l1d_kib)


def build(profile: TargetProfile, names: Iterable[str], folder: Path) -> None:
    """Libraries and their inputs for :data:`RUNNER`."""
    for name in names:
        build_case(profile, cases()[name], folder / f"{name}.so")


def build_case(profile: TargetProfile, case: Case, library: Path) -> None:
    """One of them; every loop nest has a schedule, and the rules of its family are among them."""
    linker = Linker("cc" if profile.arch == detect_host().arch else profile.tvm.linker, profile.arch, "")
    notes = Notes()
    executable = compile_module(import_model(case.model), machine_of(profile), notes)
    assert notes.unscheduled == [], library.stem
    assert case.rules <= set(notes.rules.values()), (library.stem, notes.rules)
    link_executable(executable, linker, library)
    order = [value.name for value in case.model.graph.input]
    feeds = {f"{i}/{order.index(n)}": v for i, each in enumerate(case.feeds) for n, v in each.items()}
    np.savez(library.with_suffix(".npz"), **feeds)  # type: ignore[arg-type]


def outputs(names: Iterable[str], folder: Path) -> Outputs:
    made: Outputs = {}
    for name in names:
        with np.load(folder / f"{name}.out.npz") as stored:
            indices = sorted({int(key.partition("/")[0]) for key in stored.files})
            made[name] = [[stored[f"{i}/{n}"] for n in range(len(expected(name)[i]))] for i in indices]
    return made


def differences(made: Outputs) -> dict[str, str]:
    """What is wrong, by model."""
    wrong: dict[str, str] = {}
    for name, runs in made.items():
        for have_all, want_all in zip(runs, expected(name), strict=True):
            for have, want in zip(have_all, want_all, strict=True):
                if have.shape != want.shape or have.dtype != want.dtype:
                    wrong[name] = f"{have.dtype} {have.shape} instead of {want.dtype} {want.shape}"
                    continue
                error = float(np.abs(have.astype(np.float64) - want.astype(np.float64)).max())
                size = float(np.abs(want.astype(np.float64)).max())
                allowed = allowed_difference(cases()[name].kind, size)
                # Not "error > allowed": that lets NaN through.
                if not error <= allowed:
                    wrong[name] = f"differs by {error:.3g}, allowed {allowed:.3g}"
    return wrong


def allowed_difference(kind: str, size: float) -> float:
    """For outputs of up to ``size``; see :class:`schedule_models.Case`."""
    if kind in ("float", "half"):
        tolerance = SINGLE if kind == "float" else HALF
        return tolerance.absolute + tolerance.relative * size
    return 1.0 if kind == "steps" else 0.02 * size


def check_emulated(profile: str, names: list[str], folder: Path) -> None:
    start = time.monotonic()
    build(load_target(profile), names, folder)
    built = time.monotonic()
    done = EmulatedMachine(CPUS[profile]).python([RUNNER, folder], path=[ROOT])
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])
    print(f"{profile}: {len(names)} models, built in {built - start:.1f} s, run in {time.monotonic() - built:.1f} s")
    assert differences(outputs(names, folder)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CPUS)
def test_every_schedule_gives_the_values_of_onnx_runtime_on_an_emulated_cpu(name: str, tmp_path: Path) -> None:
    check_emulated(name, families(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a76"])
def test_fp16_gives_the_values_of_onnx_runtime_with_and_without_arithmetic_of_its_own(
    name: str, tmp_path: Path
) -> None:
    check_emulated(name, list(half_cases()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a76", "neoverse-v1"])
def test_8_bit_products_of_any_size_are_within_one_step_of_their_definition(name: str, tmp_path: Path) -> None:
    check_emulated(name, list(random_cases()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_every_schedule_gives_the_values_of_onnx_runtime_on_this_machine(name: str, tmp_path: Path) -> None:
    profile = load_target(name)
    if not profile.runs_natively_on(detect_host()):
        pytest.skip(f"this machine is no {name}")
    build(profile, families(), tmp_path)
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, RUNNER, tmp_path], env=env, check=True, capture_output=True)
    assert differences(outputs(families(), tmp_path)) == {}


@pytest.mark.parametrize("name", CPUS)
def test_the_features_that_a_profile_asks_for_are_those_of_its_cpu(name: str) -> None:
    wanted = set(load_target(name).requirements()["cpu_features"])
    assert wanted <= EmulatedMachine(CPUS[name]).features()


def test_fp16_has_arithmetic_of_its_own_only_where_the_profile_has_it() -> None:
    for name, own in (("cortex-a53", False), ("cortex-a76", True)):
        model = import_model(cases()["half separable"].model)
        executable = compile_module(model, machine_of(load_target(name)), Notes())
        modules = [m for m in [executable.mod, *executable.mod.imports] if "llvm" in m.kind]
        text = "".join(str(module.inspect_source("asm")) for module in modules)
        assert (re.search(r"fmla\tv\d+\.8h", text) is not None) == own


@pytest.mark.parametrize(("lacks", "has"), [("cortex-a53", "cortex-a76"), ("cortex-a76", "neoverse-v1")])
def test_an_instruction_that_the_cpu_lacks_is_found(lacks: str, has: str, tmp_path: Path) -> None:
    """Code for the next better CPU: what a wrong choice of instruction would look like."""
    names = ["dense int8"]
    wrong = load_target(lacks).model_copy(update={"tvm": load_target(has).tvm})
    build(wrong, names, tmp_path)
    stopped = EmulatedMachine(CPUS[lacks]).python([RUNNER, tmp_path], path=[ROOT])
    assert stopped.returncode == ILLEGAL_INSTRUCTION
    assert stopped.stdout.splitlines() == names
    assert EmulatedMachine(CPUS[has]).python([RUNNER, tmp_path], path=[ROOT]).returncode == 0
    assert differences(outputs(names, tmp_path)) == {}


@pytest.mark.slow
def test_i8mm_takes_a_quarter_fewer_instructions_than_dot_products(tmp_path: Path) -> None:
    """Of a whole model with one product, its quantization included."""
    case, counts = schedule_models_int8.large_product(), {}
    machine = EmulatedMachine(I8MM_CPU)
    for name in ("neoverse-n1", "neoverse-v1"):
        folder = tmp_path / name
        folder.mkdir()
        build_case(load_target(name), case, folder / "product.so")
        once, more = (machine.python_instructions([RUNNER, folder, runs], path=[ROOT]) for runs in ("1", "11"))
        counts[name] = (more - once) // 10
    print(f"instructions of a product of 64x256 and 256x256: {counts}")
    assert counts["neoverse-v1"] < 0.75 * counts["neoverse-n1"]


def test_wrong_values_are_found(tmp_path: Path) -> None:
    right = expected("softmax")
    assert differences({"softmax": right}) == {}
    assert set(differences({"softmax": [[right[0][0] + np.float32(0.01)]]})) == {"softmax"}
    assert set(differences({"softmax": [[np.full_like(right[0][0], np.nan)]]})) == {"softmax"}
