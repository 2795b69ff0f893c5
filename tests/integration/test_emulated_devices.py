"""Bundles for other processors, built by ``toolchain build``, run by the programs in them on emulated machines.

WebAssembly modules are run by wasmtime.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from edge_support import native_runner, program
from helpers import wasm
from helpers.emulated import EmulatedMachine
from helpers.emulator_packages import EmulatorError, libraries_folder

from toolchain.bundle.read import open_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime import load

# One worker has the builds of the fixture.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("emulated_devices")]

ROOT = Path(__file__).parents[2]
SMALL, LARGE = EmulatedMachine("cortex-a53"), EmulatedMachine("cortex-a76")
ARM, RISCV = EmulatedMachine("cortex-a7", "arm"), EmulatedMachine("rv64,v=false", "riscv64")
IMAGES = np.random.default_rng(7).random((3, 1, 8, 8)).astype(np.float32)
STATIC = '[runtime]\nengines = ["tvm"]\nform = "static"\n'
# The quantization of the Arm profiles, so that its model is the same one here.
SAME = "[numerics]\nactivation = 's8'\nsymmetric_activation = true\nreduce_range = false\n"
TVM = '[runtime]\nengines = ["tvm"]\n'
OWN = {
    "here": ("x86-64-v3", STATIC + SAME),
    "a53": ("cortex-a53", STATIC),
    "a76": ("cortex-a76", TVM),
    "risc": ("riscv64", STATIC),
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, slots=True)
class Device:
    """A machine with what one target's bundle was exported to."""

    run: Run
    folder: Path

    def call(self, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        static = self.folder / ("model.wasm" if (self.folder / "model.wasm").exists() else "model")
        words = [static, command] if static.exists() else [self.folder / "bundle-run", command, self.folder / "bundle"]
        return self.run([*words, *map(str, arguments)])

    def outputs(self, images: Path) -> np.ndarray:
        done = self.call("run", "--input", f"image={images}")
        assert done.returncode == 0, done.stderr
        logits = json.loads(done.stdout)["logits"]
        return np.reshape(np.array(logits["values"], np.float32), logits["shape"])


def toolchain(*arguments: object, folder: Path) -> None:
    command = [Path(sys.executable).with_name("toolchain"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def in_wasmtime(command: list[Path]) -> subprocess.CompletedProcess[str]:
    # A module opens relative paths: its folders have names of their own.
    program, *arguments = command
    root = next((Path(str(a).partition("=")[2]).parent for a in arguments if "=/" in str(a)), None)
    given = [str(a).replace(f"={root}/", "=") for a in arguments]
    return wasm.run(program, *given, cwd=root)


def native(command: list[Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def with_root(machine: EmulatedMachine, root: Path) -> Run:
    return lambda command: machine.run(["-L", root, *command])


def recipe(folder: Path, precision: str) -> Path:
    (folder / "targets").mkdir(parents=True)
    shutil.copytree(ROOT / "recipes" / "digits", folder / "digits")
    for name, (extends, tables) in OWN.items():
        text = f'schema = 1\nname = "{name}"\nextends = "{extends}"\n{tables}'
        (folder / "targets" / f"{name}.toml").write_text(text)
    names = ["armv7-neon", "wasm32-wasi", *(f"targets/{name}.toml" for name in OWN)]
    text = (ROOT / "recipes" / "digits.toml").read_text()
    first = text.index("targets = [")
    text = text[:first] + f"targets = {json.dumps(names)}" + text[text.index("\n", first) :]
    path = folder / "digits.toml"
    path.write_text(text.replace("[gates]", f'[quantize]\nprecisions = ["{precision}"]\n\n[gates]'))
    return path


@pytest.fixture(scope="module", params=["fp32", "int8-static"])
def devices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Device]:
    try:
        root, arm_root = LARGE.sysroot(), libraries_folder("armhf")
    except EmulatorError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp(request.param)
    recipe(folder, request.param)
    release, cache = folder / "artifacts/digits/1.0.0", tmp_path_factory.getbasetemp() / "devices-cache"
    toolchain("build", "digits.toml", "--no-measure", "--cache", cache, folder=folder)
    runs: dict[str, Run] = {
        "here": native,
        "a53": SMALL.run,
        "a76": with_root(LARGE, root),
        "armv7-neon": with_root(ARM, arm_root),
        "risc": RISCV.run,
        "wasm32-wasi": in_wasmtime,
    }
    for name in runs:
        toolchain("export", "edge", f"{release}@{name}", folder / "devices" / name, folder=folder)
    np.save(folder / "x.npy", IMAGES)
    return {name: Device(run, folder / "devices" / name) for name, run in runs.items()}


def release_of(devices: Mapping[str, Device]) -> Path:
    return devices["here"].folder.parents[1] / "artifacts/digits/1.0.0"


def images_of(devices: Mapping[str, Device]) -> Path:
    return devices["here"].folder.parents[1] / "x.npy"


@pytest.mark.parametrize("name", ["a53", "a76", "armv7-neon", "risc", "wasm32-wasi"])
def test_a_bundle_gives_on_its_device_what_it_gives_here(devices: Mapping[str, Device], name: str) -> None:
    images = images_of(devices)
    want, got = devices["here"].outputs(images), devices[name].outputs(images)
    # Integers are computed exactly: what differs is less than a step of int8 (0.05) by far.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    tested = devices[name].call("self-test")
    assert (tested.returncode, json.loads(tested.stdout)["passed"]) == (0, True), tested.stderr


def test_a_bundle_is_refused_where_an_instruction_is_missing(devices: Mapping[str, Device]) -> None:
    done = Device(with_root(SMALL, SMALL.sysroot()), devices["a76"].folder).call("self-test")
    assert done.returncode == ExitCode.INCOMPATIBLE_HOST
    assert "asimddp" in done.stderr
    assert "which this machine (cortex-a53) lacks" in done.stderr


def test_an_executable_asks_for_no_library_and_for_its_processor(devices: Mapping[str, Device]) -> None:
    (bundle,) = [b for b in open_release(release_of(devices)).bundles if b.target == "a53"]
    assert bundle.manifest.engine.form == "static"
    assert bundle.manifest.requirements["libc"] is None
    assert not [name for name in bundle.files if name.startswith("runtime/")]
    assert (devices["a53"].folder / "model").stat().st_size < 500_000
    done = devices["a53"].call("run", "--input", f"pixels={images_of(devices)}")
    assert done.returncode == ExitCode.BAD_INPUT


def test_a_module_holds_its_model_and_asks_for_an_engine_with_vectors(devices: Mapping[str, Device]) -> None:
    (bundle,) = [b for b in open_release(release_of(devices)).bundles if b.target == "wasm32-wasi"]
    needs = bundle.manifest.requirements
    assert (needs["os"], needs["arch"], needs["libc"]) == ("wasi", "wasm32", None)
    assert "simd128" in needs["cpu_features"]
    module = devices["wasm32-wasi"].folder / "model.wasm"
    assert module.stat().st_size < 450_000
    assert "wasmtime model.wasm info" in (module.parent / "README.md").read_text()
    with pytest.raises(ToolchainError, match="needs operating system wasi, this machine runs linux"):
        load(release_of(devices), target="wasm32-wasi")


def test_what_opens_bundles_says_that_an_executable_is_run_by_itself(devices: Mapping[str, Device]) -> None:
    with pytest.raises(ToolchainError) as caught:
        load(release_of(devices), target="here")
    assert caught.value.code == ExitCode.INCOMPATIBLE_HOST
    assert "one executable with its own runtime inside, model" in caught.value.what
    done = program(native_runner(), "self-test", f"{release_of(devices)}@here")
    assert done.returncode == ExitCode.MISSING_TOOL
    assert "its engine is an executable, 'model'" in done.stderr
