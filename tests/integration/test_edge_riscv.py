"""RISC-V's extensions with long names: whoever lacks one that the bundle needs is told which."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers import edge_samples
from helpers.bundle_samples import MATRIX_CONTRACT, bundle_spec, requirements
from helpers.edge_samples import selftest_file
from helpers.emulated import RISCV64, EmulatedMachine, EmulatorError

from toolchain.errors import ExitCode
from toolchain.runtime.edge.build import StaticModel, build_runner, compiler_command

pytestmark = pytest.mark.slow

MACHINE = EmulatedMachine(RISCV64, "riscv64")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable that needs the extension zba."""
    folder = tmp_path_factory.mktemp("riscv")
    command = [*compiler_command("riscv64", "musl", "zig"), "-std=c11", "-D_GNU_SOURCE", "-O1", "-DBATCH=2"]
    command += [f"-I{edge_samples.EDGE / 'include'}", "-c", str(edge_samples.SOURCES), "-o", str(folder / "model.o")]
    subprocess.run(command, check=True)
    engine = edge_samples.aot_engine(folder / "engine", MATRIX_CONTRACT, {"model.so": {"batch": 2}})
    (engine / "model.so").write_bytes(b"in the executable")
    manifest = bundle_spec(engine, "board", requirements(("m", "c", "zba"), "riscv64")).manifest
    recorded = selftest_file(folder / "selftest.npz").read_bytes()
    model = StaticModel((folder / "model.o",), manifest.to_bytes(), recorded)
    return build_runner("riscv64", "musl", "zig", folder / "out", model).program


@pytest.mark.parametrize(
    ("harts", "lacks"),
    [
        (["rv64imafdc_zicsr_zba_zbb", "rv64imafdc_zba"], ""),
        (["rv64imafdc_zicsr_zba_zbb", "rv64imafdc_zicsr"], "zba"),
        (["rv64imafdc_zbaa_xzba"], "zba"),
        ([], "zba"),
    ],
    ids=["all-cores", "one-core-lacks", "others-alike", "an-emulators-file"],
)
def test_an_extension_counts_where_every_core_has_it(
    device: Path, tmp_path: Path, harts: list[str], lacks: str
) -> None:
    (tmp_path / "proc").mkdir()
    lines = [f"processor\t: {i}\nisa\t\t: {isa}\nmmu\t\t: sv39\n\n" for i, isa in enumerate(harts)]
    (tmp_path / "proc" / "cpuinfo").write_text("".join(lines) or "vendor_id\t: other\n")
    try:
        done = MACHINE.run(["-L", tmp_path, device, "self-test"])
    except EmulatorError as error:
        pytest.skip(str(error))
    if lacks:
        assert done.returncode == ExitCode.INCOMPATIBLE_HOST
        assert f"needs CPU features {lacks}, which this machine (riscv64) lacks" in done.stderr
    else:
        assert (done.returncode, json.loads(done.stdout or "{}").get("passed")) == (0, True), done.stderr
