"""Which bundle a reference means on which machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bundle_samples import host_with, matrix_engine, requirements, sample_release

from toolchain.bundle.resolve import resolve
from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import CudaDevice

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
ARM = host_with(arch="aarch64", cpu_features=frozenset({"asimd"}), glibc="2.36", cuda=())
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


def test_equally_good_bundles_must_be_named(release: Path) -> None:
    with pytest.raises(ToolchainError, match="equally well: a53, a72") as caught:
        resolve(str(release), ARM)
    assert caught.value.code is ExitCode.USAGE
    assert caught.value.hint == f"name one: {release}@a53"
    assert len(caught.value.details) == len(TARGETS)


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
