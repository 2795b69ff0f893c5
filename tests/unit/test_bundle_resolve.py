"""Which bundle a reference means on which machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.bundle_samples import host_with, matrix_engine, requirements, sample_release

from toolchain.bundle.resolve import resolve
from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import CudaDevice
from toolchain.llvm_cpus import compiled_features
from toolchain.target import load_target

V3 = ("avx2", "fma")
V4 = (*V3, "avx512f", "avx512_vnni")
TARGETS = {
    "v3": requirements(V3, "x86_64"),
    "v4": requirements(V4, "x86_64"),
    "a53": requirements(("asimd",), "aarch64"),
    "a72": requirements(("asimd",), "aarch64"),
    "sm80": requirements(V3, "x86_64", "sm_80"),
    "sm86": requirements(V3, "x86_64", "sm_86"),
}
X86_V3 = host_with(arch="x86_64", cpu_features=frozenset(V3), glibc="2.36", cuda=())
X86_V4 = host_with(arch="x86_64", cpu_features=frozenset(V4), glibc="2.36", cuda=())
OLD = host_with(arch="x86_64", cpu_features=frozenset({"sse2"}), glibc="2.36", cuda=())
A100 = host_with(arch="x86_64", cpu_features=frozenset(V4), glibc="2.36", cuda=(CudaDevice("A100", "sm_80"),))
A40 = host_with(arch="x86_64", cpu_features=frozenset(V4), glibc="2.36", cuda=(CudaDevice("A40", "sm_86"),))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolve")
    return sample_release(folder / "r@home", matrix_engine(folder / "engine"), TARGETS)


@pytest.mark.parametrize(("host", "target"), [(X86_V3, "v3"), (X86_V4, "v4"), (A100, "sm80"), (A40, "sm86")])
def test_the_most_specific_bundle_that_runs_is_chosen(release: Path, host: object, target: str) -> None:
    assert resolve(str(release), host).target == target  # type: ignore[arg-type]


def test_a_named_target_is_taken_whatever_the_machine(release: Path) -> None:
    assert resolve(f"{release}@a53", X86_V3).target == "a53"


def cpuinfo(*parts: str, features: str = "fp asimd", implementer: str = "0x41") -> str:
    """/proc/cpuinfo of an ARM machine with a core for each of ``parts``."""
    core = "processor\t: {}\nFeatures\t: {}\nCPU implementer\t: {}\nCPU part\t: {}\n"
    return "\n".join(core.format(i, features, implementer, part) for i, part in enumerate(parts))


DOT_PRODUCT = "fp asimd asimddp asimdhp asimdrdm atomics fphp lrcpc"
ARM_TARGETS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")


@pytest.fixture(scope="module")
def arm_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release for the shipped ARM targets, with the needs that their profiles have."""
    folder = tmp_path_factory.mktemp("arm")
    needs = {name: load_target(name).requirements() for name in ARM_TARGETS}
    return sample_release(folder / "r", matrix_engine(folder / "engine"), needs)


@pytest.mark.parametrize(
    ("machine", "target"),
    [
        (cpuinfo("0xd03", "0xd03"), "cortex-a53"),
        (cpuinfo("0xd08", "0xd08"), "cortex-a72"),
        # Four small cores and two big ones.
        (cpuinfo("0xd03", "0xd03", "0xd03", "0xd03", "0xd08", "0xd08"), "cortex-a72"),
        (cpuinfo("0xd0b", features=DOT_PRODUCT), "cortex-a76"),
        (cpuinfo("0xd0c", features=DOT_PRODUCT), "neoverse-n1"),
        # Its own bundle, though others need more of what it has.
        (cpuinfo("0xd08", features=DOT_PRODUCT), "cortex-a72"),
    ],
)
def test_the_bundle_made_for_the_very_processor_is_chosen(
    arm_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: str,
    target: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(machine)
    monkeypatch.setenv("TOOLCHAIN_HOST_CPUINFO", str(tmp_path / "cpuinfo"))
    assert resolve(str(arm_release)).target == target
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("machine", "target", "other"),
    [
        (cpuinfo("0xd09"), "cortex-a53", "cortex-a72"),
        (cpuinfo("0xd41", features=DOT_PRODUCT), "cortex-a76", "neoverse-n1"),
        (cpuinfo("0x999", features=DOT_PRODUCT, implementer="0x51"), "cortex-a76", "neoverse-n1"),
    ],
)
def test_on_another_processor_the_most_capable_bundle_is_chosen_and_those_as_good_are_named(
    arm_release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: str,
    target: str,
    other: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(machine)
    monkeypatch.setenv("TOOLCHAIN_HOST_CPUINFO", str(tmp_path / "cpuinfo"))
    assert resolve(str(arm_release)).target == target
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.splitlines() == [
        f"note: {arm_release}@{target} is used; as good for this machine, as far as is known: {other}"
    ]


def test_a_gpu_comes_before_the_processors_own_bundle(tmp_path: Path) -> None:
    targets = {"znver4": requirements(V4, "x86_64"), "sm80": requirements(V3, "x86_64", "sm_80")}
    release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"), targets)
    features = A100.cpu_features | compiled_features("x86_64", "znver4")
    host = replace(A100, cpu_features=features, cpu_vendor="AuthenticAMD", cpu_ids=((25, 0x11),))
    assert resolve(str(release), host).target == "sm80"
    assert resolve(str(release), replace(host, cuda=())).target == "znver4"


def test_when_nothing_runs_each_target_says_why(release: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        resolve(str(release), OLD)
    assert caught.value.code is ExitCode.INCOMPATIBLE_HOST
    lines = dict(line.split(": ", 1) for line in caught.value.details)
    assert set(lines) == set(TARGETS)
    assert "avx2, fma" in lines["v3"]
    assert "aarch64" in lines["a53"]
    assert "sm_80" in lines["sm80"]


def test_an_unknown_target_lists_those_there_are(release: Path) -> None:
    with pytest.raises(ToolchainError, match=r"'v33' \(did you mean 'v3'\?\); it has a53, a72") as caught:
        resolve(f"{release}@v33", X86_V3)
    assert caught.value.code is ExitCode.USAGE


def test_a_single_bundle_needs_no_name_even_for_another_machine(tmp_path: Path) -> None:
    release = sample_release(tmp_path / "r", matrix_engine(tmp_path / "e"), {"a53": TARGETS["a53"]})
    assert resolve(str(release), X86_V3).target == "a53"
