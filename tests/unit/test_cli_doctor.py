"""How `toolchain doctor` judges versions, tools and disks."""

import importlib.metadata
from pathlib import Path

import pytest

from toolchain import doctor
from toolchain.doctor import LOW_DISK, Disk, all_tools, target_state, version_allowed
from toolchain.host import CudaDevice, Host
from toolchain.install import install_command
from toolchain.target import load_target


@pytest.mark.parametrize(
    ("version", "specifier", "allowed"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", "<2.14,>=2.13", False),
        ("2.9", ">=2.13", False),
        ("2.13", ">=2.13.0", True),
        ("0.27.0.post1", "==0.27.0.post1", True),
        ("0.27.0", "==0.27.0.post1", False),
        ("9.9", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, specifier: str, allowed: bool) -> None:
    assert version_allowed(version, specifier) is allowed


def test_an_operator_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="~=1"):
        version_allowed("1.0", "~=1")


def test_all_libraries_of_the_build_extra_are_judged_by_their_metadata() -> None:
    tools = {tool.name: tool for tool in all_tools() if tool.kind == "library"}
    extra = [line.split(";")[0] for line in importlib.metadata.requires("toolchain") or [] if '"build"' in line]
    names = {line.split("=")[0].split("<")[0].split(">")[0].strip() for line in extra}
    assert len(names) >= 9
    assert names <= set(tools)
    for name in names:
        assert tools[name].ok
        assert tools[name].found == importlib.metadata.version(name)
        assert tools[name].purpose
        assert tools[name].install == install_command("build")


def test_every_program_has_a_command_that_installs_it() -> None:
    programs = {tool.name: tool for tool in all_tools() if tool.kind == "program"}
    assert set(programs) == {"cc", "nvcc", "aarch64-linux-gnu-gcc", "qemu-aarch64", "ssh"}
    assert all(tool.install.startswith("apt-get install ") for tool in programs.values())


def test_a_nearly_full_or_read_only_disk_is_a_problem() -> None:
    assert Disk("/c", LOW_DISK, True).problem == ""
    assert Disk("/c", LOW_DISK - 1, True).problem == "nearly full"
    assert Disk("/c", LOW_DISK, False).problem == "cannot be written"


def test_the_disk_of_a_cache_that_does_not_exist_is_that_of_its_parent(tmp_path: Path) -> None:
    disk = doctor._disk(tmp_path / "a" / "b")
    assert disk.writable
    assert disk.free > 0
    assert not (tmp_path / "a").exists()


def test_a_gpu_runs_the_code_of_its_own_generation_and_needs_the_gpu_build_of_onnx_runtime() -> None:
    profile = load_target("cuda-sm80")
    features = frozenset(profile.requirements()["cpu_features"])
    device = CudaDevice("NVIDIA A100", "sm_80")
    host = Host("linux", profile.arch, "Some CPU", features, 8, 64000, "2.36", (device,))
    state = target_state(profile, host)
    assert state.run == ()
    assert any("onnxruntime-gpu" in reason for reason in state.measure)
    assert "sm_90" in target_state(load_target("cuda-sm90"), host).run[0]
