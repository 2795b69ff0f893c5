"""The committed table of LLVM processors and the profiles against the TVM that is installed."""

import pytest

from toolchain.llvm_cpus import DATA_FILE
from toolchain.target import list_targets, load_target

tvm = pytest.importorskip("tvm")


@pytest.mark.slow
def test_the_committed_table_is_that_of_the_installed_tvm() -> None:
    from toolchain.llvm_cpus_generate import generate

    assert generate() == DATA_FILE.read_text(), "run `python -m toolchain.llvm_cpus_generate`"


@pytest.mark.parametrize("name", list_targets())
def test_tvm_takes_the_target_of_a_shipped_profile_without_a_complaint(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = load_target(name)
    target = tvm.target.Target(profile.tvm_target())
    llvm = tvm.target.Target(profile.tvm_target()["host"]) if profile.kind == "cuda" else target
    features = tvm.target.codegen.llvm_get_cpu_features(llvm)
    wanted = {attribute[1:] for attribute in profile.llvm().mattr if attribute.startswith("+")}
    assert wanted <= {str(feature) for feature in features}
    # A name that LLVM does not know is not an error to TVM: it only prints a line.
    assert "not" not in capfd.readouterr().err
