"""Every family of schedules, compiled for every CPU profile and run on a machine of that kind, against ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import schedule_models
from helpers.emulated import ILLEGAL_INSTRUCTION, EmulatedMachine
from qdq_support import as_defined
from schedule_models import Case

from toolchain.host import detect_host
from toolchain.target import TargetProfile, list_targets, load_target
from toolchain.tvm.compare import SINGLE
from toolchain.tvm.importer import import_model
from toolchain.tvm.link import Linker, link_executable
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes, compile_module

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tests" / "helpers" / "run_libraries.py"
CPUS = {name: name for name in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")}
"""QEMU's CPU for each profile that this machine isn't."""

Outputs = dict[str, list[list[np.ndarray]]]


@cache
def cases() -> Mapping[str, Case]:
    return schedule_models.cases()


@cache
def expected(name: str) -> list[list[np.ndarray]]:
    case = cases()[name]
    return [as_defined(case.model, feeds) for feeds in case.feeds]


def machine_of(profile: TargetProfile) -> Machine:
    cpu = profile.cpu
    return Machine(profile.tvm_target(), profile.kind, profile.arch, cpu.vector_bits, cpu.registers, cpu.l1d_kib)


def build(profile: TargetProfile, names: Iterable[str], folder: Path) -> None:
    """Libraries and their inputs; every loop nest has a schedule, and the rules of its family are among them."""
    linker = Linker("cc" if profile.arch == detect_host().arch else profile.tvm.linker, profile.arch, "")
    machine = machine_of(profile)
    for name in names:
        case, notes = cases()[name], Notes()
        executable = compile_module(import_model(case.model), machine, notes)
        assert notes.unscheduled == [], name
        assert case.rules <= set(notes.rules.values()), (name, notes.rules)
        link_executable(executable, linker, folder / f"{name}.so")
        order = [value.name for value in case.model.graph.input]
        feeds = {f"{i}/{order.index(n)}": v for i, each in enumerate(case.feeds) for n, v in each.items()}
        np.savez(folder / f"{name}.npz", **feeds)  # type: ignore[arg-type]


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
                network = 0.02 * size
                kind = cases()[name].kind
                allowed = {"float": SINGLE.absolute + SINGLE.relative * size, "steps": 1.0, "network": network}[kind]
                # Not "error > allowed": that lets NaN through.
                if not error <= allowed:
                    wrong[name] = f"differs by {error:.3g}, allowed {allowed:.3g}"
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", CPUS)
def test_every_schedule_gives_the_values_of_onnx_runtime_on_an_emulated_cpu(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    build(load_target(name), cases(), tmp_path)
    built = time.monotonic()
    done = EmulatedMachine(CPUS[name]).python([RUNNER, tmp_path], path=[ROOT])
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])
    print(f"{name}: {len(cases())} models, built in {built - start:.1f} s, run in {time.monotonic() - built:.1f} s")
    assert differences(outputs(cases(), tmp_path)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_every_schedule_gives_the_values_of_onnx_runtime_on_this_machine(name: str, tmp_path: Path) -> None:
    profile = load_target(name)
    if not profile.runs_natively_on(detect_host()):
        pytest.skip(f"this machine is no {name}")
    build(profile, cases(), tmp_path)
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, RUNNER, tmp_path], env=env, check=True, capture_output=True)
    assert differences(outputs(cases(), tmp_path)) == {}


def test_every_profile_of_a_cpu_is_run() -> None:
    profiles = [load_target(name) for name in list_targets() if name != "host"]
    assert {p.name for p in profiles if p.kind == "cpu" and p.arch == "aarch64"} == set(CPUS)


def test_a_dot_product_built_for_a_cpu_without_it_is_found(tmp_path: Path) -> None:
    """Code for a Cortex-A76 on a Cortex-A53: what a wrong choice of instruction would look like."""
    names = ["dense int8"]
    a53 = load_target("cortex-a53")
    wrong = a53.model_copy(update={"tvm": load_target("cortex-a76").tvm})
    build(wrong, names, tmp_path)
    on_a53 = EmulatedMachine("cortex-a53").python([RUNNER, tmp_path], path=[ROOT])
    assert on_a53.returncode == ILLEGAL_INSTRUCTION
    assert on_a53.stdout.splitlines() == names
    assert EmulatedMachine("cortex-a76").python([RUNNER, tmp_path], path=[ROOT]).returncode == 0
    assert differences(outputs(names, tmp_path)) == {}


def test_wrong_values_are_found(tmp_path: Path) -> None:
    right = expected("softmax")
    assert differences({"softmax": right}) == {}
    assert set(differences({"softmax": [[right[0][0] + np.float32(0.01)]]})) == {"softmax"}
    assert set(differences({"softmax": [[np.full_like(right[0][0], np.nan)]]})) == {"softmax"}
