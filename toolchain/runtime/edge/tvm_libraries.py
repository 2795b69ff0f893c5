"""TVM's run-time for devices: the two libraries that engines of its virtual machine need, out of its packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError

LIBRARIES = {"libtvm_ffi.so": "tvm_ffi/lib/libtvm_ffi.so", "libtvm_runtime.so": "tvm/lib/libtvm_runtime.so"}
"""Names in a bundle, and where its packages have them; in the order in which they are loaded."""
_DISTRIBUTIONS = {"libtvm_ffi.so": "apache-tvm-ffi", "libtvm_runtime.so": "apache-tvm"}
_MACHINES = {"x86_64": 62, "aarch64": 183}
"""e_machine of ELF files, for the architectures that have packages of TVM."""


def tvm_libraries(arch: str, packages: Path | None) -> dict[str, Path]:
    """Name in a bundle -> the library, for ``arch``.

    Args:
        arch: e.g. ``"aarch64"``.
        packages: a folder into which ``pip install --target`` put apache-tvm and apache-tvm-ffi of the versions that
            are installed here; None: this machine's own packages are taken, if they are for ``arch``.

    Returns:
        Nothing where no packages are given and this machine's are for another architecture.

    Raises:
        ToolchainError: MISSING_TOOL, the packages lack a library, or are of another version or architecture.
    """
    if packages is None and arch != platform.machine():
        return {}
    return {name: _library(name, arch, packages) for name in LIBRARIES}


def _library(name: str, arch: str, packages: Path | None) -> Path:
    distribution = _DISTRIBUTIONS[name]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(f"{distribution} is not installed", f"pip install {distribution}") from None
    install = (
        f"pip install --no-deps --only-binary=:all: --target FOLDER --platform manylinux_2_28_{arch} "
        f"{distribution}=={version}"
    )
    if packages is None:
        spec = importlib.util.find_spec(LIBRARIES[name].partition("/")[0])
        path = (Path(spec.origin).parents[1] if spec is not None and spec.origin else Path()) / LIBRARIES[name]
    else:
        known = f"{distribution.replace('-', '_')}-{version}.dist-info"
        if not (packages / known).is_dir():
            raise _missing(f"there is no {distribution} {version} in {packages}", install)
        path = packages / LIBRARIES[name]
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(20)
    if head[:4] != b"\x7fELF" or int.from_bytes(head[18:20], "little") != _MACHINES.get(arch):
        raise _missing(f"{path} is no library for {arch}", install)
    return path


def _missing(what: str, install: str) -> ToolchainError:
    return ToolchainError(what, where="target.runtime.tvm_packages", hint=install, code=ExitCode.MISSING_TOOL)
