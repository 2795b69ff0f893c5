"""Static executables are run before they are released: one that fails its own self-test never is."""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from helpers import edge_samples
from helpers.bundle_samples import MATRIX_CONTRACT, requirements
from helpers.edge_samples import selftest_file
from helpers.emulated import EmulatedMachine, EmulatorError
from helpers.emulator_packages import qemu_folder

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.edge.build import compile_static, compiler_command
from toolchain.stage import StageContext, StageResult
from toolchain.stages import link_static

pytestmark = pytest.mark.slow


@functools.cache
def runtime_objects(arch: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="runtime-")
    atexit.register(folder.cleanup)
    compile_static(arch, Path(folder.name))
    return Path(folder.name)


def link(folder: Path, arch: str, runs: str, cpu: str = "", error: float = 0.0, **defines: int) -> StageResult:
    """Runs the stage on an engine made by hand, whose recorded outputs are wrong by ``error``."""
    inputs = {name: folder / name for name in ("engine", "objects", "runtime", "verdict", "selftest")}
    inputs["runtime"] = runtime_objects(arch)
    for path in inputs.values():
        path.mkdir(parents=True, exist_ok=True)
    command = [*compiler_command(arch, "musl", "zig"), "-std=c11", "-D_GNU_SOURCE", "-O1", "-DBATCH=0"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    output = inputs["objects"] / "model.o"
    command += [f"-I{edge_samples.EDGE / 'include'}", "-c", str(edge_samples.SOURCES), "-o", str(output)]
    subprocess.run(command, check=True)
    edge_samples.aot_engine(inputs["engine"], MATRIX_CONTRACT, {"model.so": {}})
    worst = {"cosine": 1.0, "max_abs_error": 1e-6}
    (inputs["verdict"] / "verdict.json").write_text(json.dumps({"worst": worst}))
    selftest_file(inputs["selftest"] / "selftest.npz", error)
    options = link_static.Options(arch, "m", "1.0.0", "", "board", {}, dict(requirements((), arch)), runs, cpu)
    out = folder / "out"
    out.mkdir()
    return link_static.run(StageContext(inputs, options, out, folder))


@pytest.mark.parametrize(("runs", "checked"), [("native", "native"), ("", "not run")])
def test_an_executable_is_run_where_it_can_be(tmp_path: Path, runs: str, checked: str) -> None:
    result = link(tmp_path, platform.machine(), runs)
    assert result.facts["checked"] == checked
    assert os.access(tmp_path / "out" / "engine" / "model", os.X_OK)


@pytest.mark.parametrize(
    ("error", "defines", "expected"),
    [(0.5, {}, "largest error 0.5, allowed"), (0.0, {"FAILS": 1}, "failed on these inputs")],
    ids=["wrong-outputs", "a-kernel-that-fails"],
)
def test_one_that_fails_its_self_test_is_refused(
    tmp_path: Path, error: float, defines: dict[str, int], expected: str
) -> None:
    with pytest.raises(ToolchainError, match=r"fails its self-test \(native\)") as caught:
        link(tmp_path, platform.machine(), "native", error=error, **defines)
    assert caught.value.code == ExitCode.COMPILE
    assert expected in " ".join(caught.value.details)


def test_one_for_another_processor_runs_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        EmulatedMachine("cortex-a53").run(["true"])
        program = qemu_folder() / "qemu-aarch64"
    except EmulatorError as error:
        pytest.skip(str(error))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qemu-aarch64").symlink_to(program)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert shutil.which("qemu-aarch64") == str(tmp_path / "bin" / "qemu-aarch64")
    result = link(tmp_path, "aarch64", "qemu-aarch64", "cortex-a53")
    assert result.facts["checked"] == "emulated by qemu-aarch64 as cortex-a53"
