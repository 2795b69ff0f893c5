"""What CUDA compilation says when its tools are missing, and how it reads machine code."""

from __future__ import annotations

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.cuda import kernel_architectures, prepare


def test_a_missing_nvcc_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError, match="CUDA code needs nvcc, which is not on PATH") as caught:
        prepare("sm_80")
    assert caught.value.code == ExitCode.MISSING_TOOL
    assert caught.value.hint.startswith("apt-get install nvidia-cuda-toolkit")


def test_a_library_that_holds_cuda_source_has_no_kernel_architecture() -> None:
    assert kernel_architectures(b"\x7fELF" + bytes(200) + b'extern "C" __global__ void kernel() {}') == []
