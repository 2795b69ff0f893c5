"""CUDA kernels compiled to machine code by nvcc at build time, with or without a GPU in the machine.

Left to itself, TVM 0.27 does that only where NVIDIA's driver is installed.  Elsewhere its code generator finds
no CUDA runtime and stores the CUDA *source* in the library, which would then need a compiler and Python on the
device.  So its CUDA runtime is loaded against an empty stand-in for the driver library (CUDA toolkits ship one
too, as ``lib64/stubs``): nothing of the driver is called for compiling.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.library import load_tvm

_FACTORY = "ffi.Module.create.cuda"
_FLAGS = (
    "-O3",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
)
"""As TVM's own, but without --use_fast_math: a release is held to the original's values."""

_TIMEOUT_S = 600


def prepare(arch: str) -> None:
    """Makes TVM compile CUDA kernels with nvcc for ``arch`` (``"sm_80"``) from now on.

    Raises:
        ToolchainError: MISSING_TOOL: nvcc, a host C compiler or the CUDA runtime library is not installed.
    """
    for tool, install in (
        ("nvcc", "apt-get install nvidia-cuda-toolkit (or put /usr/local/cuda/bin on PATH)"),
        ("cc", "apt-get install gcc"),
    ):
        if shutil.which(tool) is None:
            raise _missing(f"CUDA code needs {tool}, which is not on PATH", install)
    load_tvm()
    import tvm_ffi
    from tvm import backend

    backend.load("cuda")
    if tvm_ffi.get_global_func(_FACTORY, allow_missing=True) is None:
        _load_runtime()

    def compile_kernels(code: str) -> bytes:
        return nvcc(code, arch)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_kernels, override=True)


def nvcc(code: str, arch: str) -> bytes:
    """The cubin of CUDA C++ ``code``; the same bytes in any folder.

    Raises:
        RuntimeError: nvcc failed; its first error is the message.
    """
    with tempfile.TemporaryDirectory(prefix="toolchain-nvcc-") as folder:
        (Path(folder) / "kernels.cu").write_text(code)
        command = ["nvcc", "--cubin", f"-arch={arch}", *_FLAGS, "-o", "kernels.cubin", "kernels.cu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise RuntimeError("nvcc: " + next((line for line in lines if "error" in line.lower()), lines[0]))
        return (Path(folder) / "kernels.cubin").read_bytes()


def _load_runtime() -> None:
    tvm = load_tvm()
    import tvm_ffi

    library = Path(str(tvm.__file__)).parent / "lib" / "libtvm_runtime_cuda.so"
    with tempfile.TemporaryDirectory(prefix="toolchain-cuda-") as folder:
        command = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "-x", "c", os.devnull]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_TIMEOUT_S)
        try:
            ctypes.CDLL(str(Path(folder) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library), mode=os.RTLD_LAZY | ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise _missing(
                f"TVM's CUDA runtime does not load: {error}",
                "install the CUDA 13 runtime and put its lib64 folder on LD_LIBRARY_PATH",
            ) from error
    if tvm_ffi.get_global_func(_FACTORY, allow_missing=True) is None:
        raise _missing("this build of TVM has no CUDA runtime", "pip install apache-tvm==0.27.0.post1")


def _missing(what: str, install: str) -> ToolchainError:
    return ToolchainError(what, where="target.cuda", hint=install, code=ExitCode.MISSING_TOOL)


def kernel_architectures(library: bytes) -> list[int]:
    """Compute capability (e.g. 80) of each cubin inside ``library``: ELF files of machine 190, arch in e_flags."""
    found: list[int] = []
    start = library.find(b"\x7fELF", 1)
    while start >= 0:
        header: Any = library[start : start + 64]
        if len(header) == 64 and int.from_bytes(header[18:20], "little") == 190:
            flags = int.from_bytes(header[48:52], "little")
            # Since CUDA 13 (ELF ABI 8) bits 8 to 15 hold it, before that bits 0 to 7.
            found.append((flags >> 8) & 0xFF if header[8] >= 8 else flags & 0xFF)
        start = library.find(b"\x7fELF", start + 4)
    return found
