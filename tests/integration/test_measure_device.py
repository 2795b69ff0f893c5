"""Engines ahead of time on a device behind a real SSH server: an emulated Cortex-A76 (``helpers/ssh_device.py``)."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edge_samples
from helpers.bundle_samples import MATRIX_CONTRACT, requirements
from helpers.edge_samples import aot_engine, compile_model, selftest_file
from helpers.processes import wait_until
from helpers.ssh_device import ADDRESS, SshDevice

from toolchain.data import Batch, write_batches
from toolchain.errors import ExitCode, ToolchainError
from toolchain.remote.address import parse_address
from toolchain.remote.device import inspect_device
from toolchain.remote.place import Place
from toolchain.remote.ssh import Ssh
from toolchain.runtime.edge.build import build_runner, compiler_command
from toolchain.stage import StageContext, StageResult
from toolchain.stages import measure_device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("device"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

NEEDS = requirements(("asimd", "asimddp"), "aarch64")
WORST = {"cosine": 1.0, "max_abs_error": 0.0}


@pytest.fixture
def device(ssh_device: SshDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    """Said to be a real one, so that its times count."""
    for name, value in ssh_device.environment.items():
        monkeypatch.setenv(name, value)
    ssh_device.become(emulated="")
    ssh_device.use_key("user")
    yield ssh_device
    assert ssh_device.leftovers() == []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The runner, the data, and engines: right, the same but slow, and one that misses its self-test's tolerance."""
    folder = tmp_path_factory.mktemp("inputs")
    build_runner("aarch64", "glibc:2.28", "zig", folder / "runner")
    (folder / "evaluation").mkdir()
    image = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    write_batches(folder / "evaluation", [Batch({"image": image}, {}, 8)])
    (folder / "selftest").mkdir()
    selftest_file(folder / "selftest" / "selftest.npz")
    zig = tuple(compiler_command("aarch64", "glibc:2.28", "zig"))
    for name, options in {"quick": {}, "slow": {"SLOW_MS": 20}}.items():
        made = aot_engine(folder / name, MATRIX_CONTRACT, {"model.so": {}})
        compile_model(made / "model.so", 0, zig, **options)
    return {name: folder / name for name in ("runner", "evaluation", "selftest", "quick", "slow")}


def verdict(folder: Path, worst: Mapping[str, float] = WORST) -> Path:
    folder.mkdir()
    (folder / "verdict.json").write_text(json.dumps({"worst": worst}))
    return folder


def context(inputs: Mapping[str, Path], tmp_path: Path, runs: int = 10, **engines: str) -> StageContext:
    """The stage over engines: precision -> one of ``inputs``."""
    given = {name: inputs[name] for name in ("runner", "evaluation", "selftest")}
    for precision, name in engines.items():
        given[f"{precision}/tvm"] = inputs[name]
        given[f"verdict[{precision}/tvm]"] = verdict(tmp_path / f"verdict-{precision}")
    why = {"fp32/onnxruntime": "not measured on the device: ONNX Runtime needs Python there"}
    options = measure_device.Options("cortex-a76", NEEDS, {"batch": 2}, runs, 2, 30.0, 1, why)
    (tmp_path / "out").mkdir()
    return StageContext(given, options, tmp_path / "out", tmp_path, outside={"address": ADDRESS})


def changed(folder: Path, engine: Path, old: str, new: str) -> Path:
    """A copy of an engine made of changed source."""
    shutil.copytree(engine, folder)
    text = edge_samples.SOURCES.read_text()
    assert old in text
    source = folder.with_suffix(".c")
    source.write_text(text.replace(old, new))
    zig = compiler_command("aarch64", "glibc:2.28", "zig")
    include = f"-I{edge_samples.EDGE / 'include'}"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-s", "-DBATCH=0", include]
    subprocess.run([*zig, *flags, "-o", str(folder / "model.so"), str(source)], check=True)
    return folder


def measured(result: StageResult, tmp_path: Path) -> dict[str, Any]:
    assert json.loads((tmp_path / "out/measurement/measurement.json").read_text()) == result.facts
    return result.facts


def test_engines_are_checked_and_timed_side_by_side(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    facts = measured(measure_device.run(context(inputs, tmp_path, fp32="quick", fp16="slow")), tmp_path)
    quick, slow = facts["engines"]["fp32/tvm"], facts["engines"]["fp16/tvm"]
    assert 0 < quick["min_ms"] <= quick["median_ms"] <= quick["p95_ms"] < 20 <= slow["min_ms"]
    assert quick["runs"] == 10
    assert slow["runs"] < 10, "hopeless ones leave the race early"
    assert quick["load_ms"] > 0
    assert 1 < quick["peak_mb"] < 500
    assert quick["self_test"]["scores"]["max_abs_error"] < 1e-6
    assert facts["shapes"] == {"image": [2, 4]}
    assert facts["host"]["arch"] == "aarch64"
    assert facts["host"]["cpu_model"] == "ARM 0x41/0xd0b"
    assert facts["device"]["emulated"] == ""
    assert "needs Python" in facts["unmeasured"]["fp32/onnxruntime"]
    assert ADDRESS not in json.dumps(facts)


def test_times_of_an_emulated_device_are_left_out_and_said_to_be_none(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    device.become(emulated="QEMU")
    facts = measured(measure_device.run(context(inputs, tmp_path, fp32="quick")), tmp_path)
    assert facts["engines"]["fp32/tvm"].keys() == {"self_test"}
    assert facts["unmeasured"]["fp32/tvm"] == "checked on an emulated device (QEMU), whose times are none"
    assert facts["device"]["emulated"] == "QEMU"


def test_an_engine_whose_outputs_differ_on_the_device_is_rejected_and_the_others_are_measured(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    wrong = changed(tmp_path / "wrong", inputs["quick"], "/ 7 - 0.5f", "/ 7 - 0.6f")
    ctx = context({**inputs, "wrong": wrong}, tmp_path, fp32="quick", fp16="wrong")
    rows = measured(measure_device.run(ctx), tmp_path)["engines"]
    assert rows["fp16/tvm"]["rejected"].startswith("its self-test fails on the device: ")
    assert "median_ms" not in rows["fp16/tvm"]
    assert rows["fp32/tvm"]["median_ms"] > 0


def test_an_engine_that_crashes_on_the_device_is_told_from_a_lost_connection(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    # As an instruction that the processor doesn't have ends it.
    bad = changed(tmp_path / "bad", inputs["quick"], "  (void)threads;\n", "  if (threads) __builtin_trap();\n")
    ctx = context({**inputs, "bad": bad}, tmp_path, fp32="quick", fp16="bad")
    rows = measured(measure_device.run(ctx), tmp_path)["engines"]
    assert rows["fp16/tvm"] == {"error": "on the device: ended by signal SIGTRAP"}
    assert rows["fp32/tvm"]["median_ms"] > 0


def test_an_engine_in_the_form_for_the_virtual_machine_is_not_measured(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "vm"
    shutil.copytree(inputs["quick"], folder)
    engine = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(engine | {"form": "vm"}))
    result = measure_device.run(context({**inputs, "vm": folder}, tmp_path, fp32="vm"))
    assert result.refused == "there is no engine ahead of time to measure on the device"


def test_a_device_that_lacks_a_feature_of_the_profile_is_refused(
    device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path
) -> None:
    device.become("cortex-a53")
    with pytest.raises(ToolchainError, match=r"the device \(ARM 0x41/0xd03\) is no cortex-a76") as caught:
        measure_device.run(context(inputs, tmp_path, fp32="quick"))
    assert caught.value.code is ExitCode.INCOMPATIBLE_HOST
    assert caught.value.details == ("needs CPU feature asimddp, which the device (ARM 0x41/0xd03) lacks",)


def test_a_login_that_is_refused_an_unknown_key_and_a_closed_port_each_have_their_message(
    device: SshDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: str = ADDRESS) -> ToolchainError:
        with pytest.raises(ToolchainError) as caught:
            inspect_device(parse_address(address, "test"))
        assert caught.value.code is ExitCode.DEVICE
        assert caught.value.hint
        return caught.value

    device.use_key("stranger")
    assert "refuses the login" in refused().what
    device.forget_host()
    assert "host key is not known" in refused().what
    device.use_key("user")
    known = device.folder / "known"
    right = known.read_text()
    other = (device.folder / "stranger.pub").read_text()
    known.write_text(f"{right.split()[0]} {other}")
    try:
        assert "host key is not the known one" in refused().what
    finally:
        known.write_text(right)
    # Port 1 of this machine: nothing listens there.
    assert "cannot be reached" in refused("127.0.0.1:1").what
    assert "cannot be reached" in refused("no-such-host.invalid").what
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError, match="'ssh' is not on PATH") as caught:
        inspect_device(parse_address(ADDRESS, "test"))
    assert caught.value.code is ExitCode.MISSING_TOOL


def test_a_device_without_space_or_without_a_folder_for_programs_is_told_apart(
    device: SshDevice, tmp_path: Path
) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho header\necho '/dev/sda1 1000 900 100 90% /'\n")
    (fake / "df").chmod(0o755)
    device.become(PATH=f"{fake}:/usr/bin:/bin")
    with pytest.raises(ToolchainError, match=r"no space left: 50\.0 MB are needed") as caught:
        Place(Ssh(parse_address(ADDRESS, "test")), 50_000_000)
    assert caught.value.code is ExitCode.STORAGE
    assert device.leftovers() == []
    # chmod that does nothing: as on a file system that is mounted without the right to execute.
    (fake / "df").unlink()
    (fake / "chmod").symlink_to("/bin/true")
    with pytest.raises(ToolchainError, match="programs may not run in") as caught:
        Place(Ssh(parse_address(ADDRESS, "test")), 1000)
    assert caught.value.code is ExitCode.STORAGE


def test_a_disk_that_is_full_in_the_middle_of_the_transfer_is_said_so(device: SshDevice, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    # /dev/full answers every write as a full disk does.
    (fake / "tar").write_text("#!/bin/sh\nexec cat > /dev/full\n")
    (fake / "tar").chmod(0o755)
    device.become(PATH=f"{fake}:/usr/bin:/bin")
    (tmp_path / "file").write_bytes(bytes(100_000))
    with (
        Place(Ssh(parse_address(ADDRESS, "test")), 1000) as place,
        pytest.raises(ToolchainError, match="no space left") as caught,
    ):
        place.put({"file": tmp_path / "file"})
    assert caught.value.code is ExitCode.STORAGE


def test_the_folder_is_gone_when_the_connection_that_holds_it_ends(device: SshDevice, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    place = Place(Ssh(parse_address(ADDRESS, "test")), 1000)
    place.put({"a/file": tmp_path / "file"})
    assert place.run("cat a/file", 10).out == "text"
    assert [path.name for path in device.tmp.iterdir()] == [Path(place.folder).name]
    # As after a kill -9 of the build: nothing is said to the device.
    place._holder.kill()
    assert device.leftovers() == []
    place.close()


def test_a_command_that_takes_too_long_is_ended(device: SshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.remote.ssh.CONNECT_SECONDS", 1)
    with pytest.raises(ToolchainError, match=r"did not answer within 0\.5 s") as caught:
        Ssh(parse_address(ADDRESS, "test")).run("sleep 60", 0.5)
    assert caught.value.code is ExitCode.DEVICE


def test_turns_refuse_what_they_do_not_know(device: SshDevice, inputs: Mapping[str, Path], tmp_path: Path) -> None:
    ctx = context(inputs, tmp_path, fp32="quick")
    out = ctx.output("measurement")
    engines = {"fp32/tvm": inputs["quick"]}
    files = measure_device._files(ctx, ctx.options, engines, out)
    with Place(Ssh(parse_address(ADDRESS, "test")), 10_000_000) as place:
        place.put(files, frozenset([measure_device.PROGRAM]))
        talk = place.converse("./bundle-run turns 0 --inputs sample.npz")
        try:
            opened = talk.ask("", 60)
            assert opened is not None
            assert json.loads(opened).keys() == {"load_ms", "first_ms"}
            times = talk.ask("run 3", 60)
            assert times is not None
            assert len(json.loads(times)) == 3
            assert talk.ask("jump 3", 60) is None
            assert "must be lines 'run N' and 'end', got 'jump 3" in talk.last_words
        finally:
            talk.close()


def test_a_device_that_is_lost_in_the_middle_ends_the_measurement_with_one_message(
    ssh_device: SshDevice,
    inputs: Mapping[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = context(inputs, tmp_path, runs=100_000, fp32="slow")
    failures: list[ToolchainError] = []

    def run() -> None:
        try:
            measure_device.run(ctx)
        except ToolchainError as error:
            failures.append(error)

    with SshDevice(tmp_path_factory.mktemp("lost") / "device") as lost:
        lost.become(emulated="")
        for name, value in lost.environment.items():
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: lost.runs("turns"), "the engine is being timed", 30)
        lost.stop()
        thread.join(30)
    assert not thread.is_alive()
    assert [error.code for error in failures] == [ExitCode.DEVICE]
    assert "the connection to the device was lost" in failures[0].what
