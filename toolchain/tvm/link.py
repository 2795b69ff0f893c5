"""Linking a compiled executable into one shared library: for this machine or another, always the same bytes.

The objects come from LLVM and don't depend on the folder.  What does is the linker's doing: GNU ld's build ID
(hashed over debug sections that are stripped later), and paths.  So no build ID, nothing but what the code
needs, and the linker runs inside its own folder with fixed, relative file names.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError

WASM = "wasm32"
_COMMON = ("-shared", "-s", "--build-id=none", "--gc-sections")
_LLD_EMULATION = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}
_ZIG_TRIPLE = {
    "x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "armv7l": "arm-linux-gnueabihf",
    "riscv64": "riscv64-linux-gnu", WASM: "wasm32-wasi",
}  # fmt: skip
_ZIG_CPU = {"armv7l": ("-mcpu=cortex_a7",), WASM: ("-mcpu=generic+simd128",)}
"""The least processor of an architecture that code of ours is for; zig's own choice lacks NEON."""
# zig's driver turns the undefined-behaviour sanitizer on unless it is told otherwise.
_C_FLAGS = (
    "-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections",
    "-fno-sanitize=undefined", "-w", "-I.",
)  # fmt: skip
# WebAssembly modules are no libraries that another program loads, and have one thread.
_WASM_C_FLAGS = (*(flag for flag in _C_FLAGS if flag != "-fPIC"), "-DTC_NO_THREADS")
_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Linker:
    """How to link.

    Attributes:
        name: ``"cc"`` (this machine's C compiler), ``"zig"`` (lld from the ziglang package, against stubs
            that name libc and libm without versions), ``"zig-cc"`` (zig's C compiler with the profile's
            glibc), or the name of a C compiler driver on PATH, e.g. ``"aarch64-linux-gnu-gcc"``.
        arch: ``"x86_64"``, ``"aarch64"``, ``"armv7l"``, ``"riscv64"`` or ``"wasm32"``; of these the last three with
            ``"zig-cc"`` or a cross compiler, as their code calls functions of the compiler's run-time.
        libc_min: lowest glibc that the library must load on, e.g. ``"2.28"``; "" for no limit.
    """

    name: str
    arch: str
    libc_min: str

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs on PATH that it calls: a C compiler driver and its linker; none for zig."""
        if self.name.startswith("zig"):
            return ()
        prefix = next((self.name.removesuffix(end) for end in ("gcc", "clang", "cc") if self.name.endswith(end)), "")
        return (self.name, f"{prefix}ld")

    def check(self) -> None:
        """Raises ToolchainError MISSING_TOOL if the linker isn't installed, COMPILE if it can't link for ``arch``."""
        if self.arch not in _ZIG_TRIPLE:
            allowed = ", ".join(_ZIG_TRIPLE)
            raise _error(f"got the architecture {self.arch!r}; this version links for {allowed}", "target.arch")
        if self.name == "zig" and self.arch not in _LLD_EMULATION:
            allowed = f"linker 'zig' links for {', '.join(_LLD_EMULATION)}"
            raise _error(f"{allowed}, not for {self.arch}", hint='set linker = "zig-cc" in the profile\'s [tvm] table')
        if self.name.startswith("zig"):
            if self.name not in ("zig", "zig-cc"):
                raise _error(f"got linker {self.name!r}; allowed: cc, zig, zig-cc, or a C compiler on PATH")
            if importlib.util.find_spec("ziglang") is None:
                raise _missing(
                    f"linker {self.name!r} needs the Python package ziglang, which is not installed",
                    "pip install 'ziglang>=0.13,<0.17'",
                )
            return
        if shutil.which(self.name) is None:
            package = {"cc": "gcc", "gcc": "gcc", "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu"}.get(self.name)
            install = f"apt-get install {package}" if package else f"install {self.name} and put it on PATH"
            raise _missing(f"linker {self.name!r} is not on PATH", install)
        if self.name == "cc" and platform.machine() != self.arch:
            raise _error(f"linker 'cc' links for this machine ({platform.machine()}), not for {self.arch}")

    def compile(self, source: str, folder: Path, *, static: bool = False) -> None:
        """Compiles the C file ``source`` inside ``folder`` to an object beside it.

        Args:
            source: name.
            folder: where it is.
            static: whether it is for :meth:`link_static`: by zig, against the headers of musl.

        Raises:
            ToolchainError: COMPILE with the compiler's message; MISSING_TOOL without zig.
        """
        driver = self._zig_cc() if self.name == "zig" else self._driver()
        if static:
            driver = self._zig_musl()
        flags = _WASM_C_FLAGS if self.arch == WASM else _C_FLAGS
        self._call([*driver, *flags, "-c", source, "-o", source.removesuffix(".c") + ".o"], folder)

    def link(
        self, objects: list[str], folder: Path, exports: str = "", *, threads: bool = False, math: bool = True
    ) -> None:
        """Links ``objects`` (names inside ``folder``) to ``folder / "model.so"``.

        Args:
            objects: names.
            folder: where they are.
            exports: a version script in the folder that says which symbols others may use; "": all.
            threads: whether the objects start threads.
            math: whether the output names libm; a process that loads it for nothing takes 0.3 MB more.

        Raises:
            ToolchainError: COMPILE with the linker's message.
        """
        if self.name == "zig":
            lld = [sys.executable, "-m", "ziglang", "ld.lld", "-m", _LLD_EMULATION[self.arch]]
            script = ["--version-script", exports] if exports else []
            stubs = self._stubs([*lld, "-soname"], "empty.ld", folder, threads=threads, math=math)
            self._call([*lld, *_COMMON, *script, "-o", "model.so", *objects, *stubs], folder)
            return
        if self.arch == WASM:
            # A module without a start function that offers the engine: all that must be there is.
            flags = ["-mexec-model=reactor", "-s", "-Wl,--gc-sections,--export=toolchain_model"]
            self._call([*self._driver(), *flags, "-o", "model.so", *objects, "-lm"], folder)
            return
        flags = ["-shared", "-s", "-Wl,--build-id=none,--gc-sections"]
        flags += [f"-Wl,--version-script={exports}"] if exports else []
        libraries = ["-lm"] if math else []
        if self.name != "zig-cc" and threads:
            # This machine's glibc would bind the library to its own, newer versions of the functions for threads.
            flags += ["-nostdlib", "-Wl,--no-as-needed"]
            bare = [*self._driver(), "-nostdlib", "-Wl,-soname"]
            libraries = self._stubs(bare, "empty.c", folder, threads=threads, math=math)
        self._call([*self._driver(), *flags, "-o", "model.so", *objects, *libraries], folder)

    def link_static(self, objects: list[str], folder: Path, output: str) -> None:
        """Links ``objects`` to the static executable ``folder / output``, with musl as the C library.

        Raises:
            ToolchainError: MISSING_TOOL without the ziglang package; COMPILE with the linker's message.
        """
        self._call([*self._zig_musl(), "-static", "-s", "-Wl,--gc-sections", "-o", output, *objects, "-lm"], folder)

    def _stubs(self, linker: list[str], source: str, folder: Path, *, threads: bool, math: bool) -> list[str]:
        """Empty libraries that stand for libm and libc, so that the output names them, without versions."""
        libraries = {"libc": "libc.so.6"} | ({"libm": "libm.so.6"} if math else {})
        if threads:  # in glibc before 2.34 they are a library of their own
            libraries["libpthread"] = "libpthread.so.0"
        (folder / source).write_text("")
        for library, name in libraries.items():
            *command, soname = linker
            option = [f"{soname},{name}"] if soname.startswith("-Wl") else [soname, name]
            self._call([*command, "-shared", *option, "-o", f"{library}.so", source], folder)
        return [f"{library}.so" for library in libraries]

    def _zig_cc(self) -> list[str]:
        triple = _ZIG_TRIPLE[self.arch] + (f".{self.libc_min}" if self.libc_min and self.arch != WASM else "")
        return [sys.executable, "-m", "ziglang", "cc", "-target", triple, *_ZIG_CPU.get(self.arch, ())]

    def _zig_musl(self) -> list[str]:
        if importlib.util.find_spec("ziglang") is None:
            raise _missing("a static executable needs the Python package ziglang", "pip install 'ziglang>=0.13,<0.17'")
        triple = _ZIG_TRIPLE[self.arch].replace("gnu", "musl")
        return [sys.executable, "-m", "ziglang", "cc", "-target", triple, *_ZIG_CPU.get(self.arch, ())]

    def _driver(self) -> list[str]:
        return self._zig_cc() if self.name == "zig-cc" else [self.name]

    def check_output(self, library: Path) -> None:
        """Raises ToolchainError COMPILE if it is for another machine, or demands a newer glibc than is promised."""
        from toolchain.tvm.elf import glibc_newer_than, read_elf

        if self.arch == WASM:
            return
        info = read_elf(library)
        if info.machine != self.arch:
            raise _error(f"linker {self.name!r} made a library for {info.machine}, not for {self.arch}")
        if self.libc_min and (newer := glibc_newer_than(info, self.libc_min)):
            raise _error(
                f"linker {self.name!r} bound the library to {', '.join(newer)}, but the target promises glibc "
                f"{self.libc_min}",
                hint='set linker = "zig" in the target profile\'s [tvm] table',
            )

    def _call(self, command: list[str], folder: Path) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        # WebAssembly's linker only warns of a call with other types than the function's, and puts a trap in its place.
        if done.returncode or "signature mismatch" in done.stderr:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise ToolchainError(
                f"linker {self.name!r} failed with status {done.returncode} for {self.arch}",
                where="target.tvm.linker",
                details=lines[-5:],
                hint="choose another linker in the target profile's [tvm] table",
                code=ExitCode.COMPILE,
            )


def link_executable(executable: Any, linker: Linker, output: Path) -> None:
    """Writes a compiled TVM executable as the shared library ``output``.

    Raises:
        ToolchainError: MISSING_TOOL or COMPILE: no such linker, it failed, it made a library for another machine,
            or one that demands a newer glibc than the profile promises.
    """
    from toolchain.tvm.blob import write_object

    linker.check()
    # Beside the output, so that a library of any size gets there by a rename.
    with tempfile.TemporaryDirectory(prefix="link-", dir=output.parent) as temporary:
        folder = Path(temporary)

        # Without any compiled function TVM passes options for a C compiler.
        def link(_name: str, files: list[str], options: list[str] | None = None) -> None:
            linker.link([Path(file).name for file in files], folder)

        def pack(module: Any, _system: bool, _prefix: str, _folder: str) -> str:
            write_object(_packed(module), linker.arch, folder / "constants.o")
            return str(folder / "constants.o")

        name = str(folder / "model.so")
        executable.export_library(name, fcompile=link, fpack_imports=pack, workspace_dir=str(folder))
        os.replace(name, output)
    linker.check_output(output)


def _packed(module: Any) -> memoryview:
    """What is no machine code of ``module``, serialized: the virtual machine's program and the constants."""
    import numpy as np
    from tvm_ffi import get_global_func

    return np.from_dlpack(get_global_func("runtime.ModulePackImportsToTensor")(module)).data


def _error(what: str, where: str = "target.tvm.linker", hint: str = "") -> ToolchainError:
    return ToolchainError(what, where=where, hint=hint, code=ExitCode.COMPILE)


def _missing(what: str, install: str) -> ToolchainError:
    return ToolchainError(what, where="target.tvm.linker", hint=install, code=ExitCode.MISSING_TOOL)
