"""Builds the edge runtime, a shared library and ``bundle-run``, for this machine or another: always the same bytes.

Paths do not get into the files: the compiler runs inside a folder of its own with relative file names, there is no
build ID, and nothing but what is used is kept.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError

EDGE = Path(__file__).resolve().parent
LIBRARY_NAME = "libtoolchain_runtime.so"
PROGRAM_NAME = "bundle-run"
RUNTIME_SOURCES = (
    "buckets", "bundle", "contract", "engine_aot", "engine_vm", "error", "files", "hash", "hash_fast", "host",
    "host_riscv", "interface", "json", "json_tree", "layout", "library", "manifest", "numpy", "release", "run",
    "selftest", "tvm_functions", "tvm_load", "tvm_values", "values",
)  # fmt: skip
PROGRAM_SOURCES = ("cli_bench", "cli_files", "cli_json", "main")
WASM = "wasm32"
HEADERS = ("toolchain_model.h", "toolchain_runtime.h")
#: Architecture (as ``platform.machine()`` has it) -> zig's processor and the end of its triple for each C library.
_ZIG = {
    "x86_64": ("x86_64", "gnu", "musl", ()),
    "aarch64": ("aarch64", "gnu", "musl", ()),
    # Hard float and NEON: what every armv7 board with a vector unit runs.
    "armv7l": ("arm", "gnueabihf", "musleabihf", ("-mcpu=cortex_a7",)),
    "riscv64": ("riscv64", "gnu", "musl", ()),
}
ARCHS = (*_ZIG, WASM)
_FLAGS = (
    "-std=c11", "-D_GNU_SOURCE", "-Os", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections",
    "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-math-errno", "-fno-ident",
    "-ffile-prefix-map=.=edge", "-w", "-Iinclude", "-Isrc",
)  # fmt: skip
_LINK_FLAGS = ("-s", "-Wl,--gc-sections", "-Wl,--build-id=none")
_LIBRARIES = ("-Wl,--as-needed", "-lm", "-ldl", "-pthread")
# Of a WebAssembly module: what whoever embeds it needs beside the functions of toolchain_runtime.h.  zig puts the stack
# below all data, so that running over its end is a trap.
_WASM_EXPORTS = ("malloc", "free", "toolchain_model")
_WASM_LINK_FLAGS = ("-Wl,-z,stack-size=1048576",)
_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class RunnerFiles:
    """What :func:`build_runner` made: the shared library (None with a static C library), the program, their bytes."""

    library: Path | None
    program: Path
    headers: tuple[Path, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """File name -> size in bytes, without the headers."""
        return {path.name: path.stat().st_size for path in (self.library, self.program) if path is not None}


@dataclass(frozen=True, slots=True)
class StaticModel:
    """A model to link into the program.

    Attributes:
        objects: object files and archives.
        runtime: folder made by :func:`compile_static`, so that the runtime need not be compiled again; None: it is.
        bundle_json: the content of its bundle's ``bundle.json``.
        selftest: the content of its bundle's ``selftest.npz``; empty: the program has no self-test.
    """

    objects: tuple[Path, ...]
    bundle_json: bytes
    selftest: bytes = b""
    runtime: Path | None = None


def compile_static(arch: str, out: Path) -> None:
    """Compiles the runtime for static executables into objects in the folder ``out``; see :class:`StaticModel`.

    Raises:
        ToolchainError: COMPILE, MISSING_TOOL.
    """
    command = compiler_command(arch, static_libc(arch), "zig")
    runtime, program = _parts(arch)
    with tempfile.TemporaryDirectory(prefix="edge-") as name:
        folder = Path(name)
        _copy_sources(folder)
        _compile_all(command, [*runtime, *program], ["-DTC_STATIC_MODEL"], folder)
        out.mkdir(parents=True, exist_ok=True)
        for source in (*runtime, *program):
            _place(folder / f"{source}.o", out / f"{source}.o")


def static_libc(arch: str) -> str:
    """The C library of static executables: ``"musl"``, or ``"wasi"`` for WebAssembly modules."""
    return "wasi" if arch == WASM else "musl"


def _parts(arch: str) -> tuple[list[str], list[str]]:
    """Names of the sources of the runtime, and of the program."""
    if arch != WASM:
        return list(RUNTIME_SOURCES), list(PROGRAM_SOURCES)
    runtime = [name for name in RUNTIME_SOURCES if name != "engine_vm" and not name.startswith("tvm_")]
    return [f"{name}_wasm" if name == "host" else name for name in runtime], [*PROGRAM_SOURCES, "module"]


def compiler_command(arch: str, libc: str, compiler: str) -> list[str]:
    """The command that compiles for ``arch``.

    Args:
        arch: one of :data:`ARCHS`.
        libc: ``"glibc"`` or ``"glibc:2.28"`` (the oldest that it must run on), ``"musl"``, or ``"wasi"`` for wasm32.
        compiler: ``"zig"`` (the package ziglang), ``"cc"`` (for this machine), or a C compiler driver on PATH.

    Raises:
        ToolchainError: COMPILE, no such architecture or C library; MISSING_TOOL, the compiler is not installed.
    """
    name, _, oldest = libc.partition(":")
    if arch not in ARCHS:
        raise _error(f"got the architecture {arch!r}; the edge runtime is built for {', '.join(ARCHS)}")
    if arch == WASM and (libc != "wasi" or compiler not in ("zig", "zig-cc")):
        raise _error(f"for {arch} it is built by zig with the C library wasi, got {compiler!r} and {libc!r}")
    if arch != WASM and (name not in ("glibc", "musl") or (name == "musl" and oldest)):
        raise _error(f"got the C library {libc!r}; allowed: glibc, glibc:VERSION, musl")
    if compiler in ("zig", "zig-cc"):
        if importlib.util.find_spec("ziglang") is None:
            raise _missing("the Python package ziglang is not installed", "pip install 'ziglang>=0.13,<0.17'")
        zig = [sys.executable, "-m", "ziglang", "cc", "-target"]
        if arch == WASM:
            return [*zig, "wasm32-wasi", "-mcpu=generic+simd128", "-DTC_NO_THREADS", "-fno-sanitize=undefined"]
        processor, gnu, musl, flags = _ZIG[arch]
        triple = f"{processor}-linux-{gnu if name == 'glibc' else musl}" + (f".{oldest}" if oldest else "")
        # zig's driver turns the undefined-behaviour sanitizer on unless it is told otherwise.
        return [*zig, triple, *flags, "-fno-sanitize=undefined"]
    if shutil.which(compiler) is None:
        raise _missing(f"the C compiler {compiler!r} is not on PATH", "apt-get install gcc, or take the compiler 'zig'")
    if compiler in ("cc", "gcc") and platform.machine() != arch:
        raise _error(f"{compiler!r} compiles for this machine ({platform.machine()}), not for {arch}")
    return [compiler]


def build_runner(arch: str, libc: str, compiler: str, out: Path, model: StaticModel | None = None) -> RunnerFiles:
    """Build the runtime into the folder ``out``.

    With ``libc="musl"`` the program is static, and there is no library: a static program cannot open another one.
    With a ``model`` the program is the static form: it holds the model, takes no bundle and opens no library.

    Args:
        arch: one of :data:`ARCHS`.
        libc: see :func:`compiler_command`.
        compiler: see :func:`compiler_command`.
        out: is made; files of the same names are replaced.
        model: to be linked into the program.

    Raises:
        ToolchainError: COMPILE, with the compiler's words; MISSING_TOOL.
    """
    command = compiler_command(arch, libc, compiler)
    static = libc in ("musl", "wasi")
    sources = _parts(arch)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edge-") as name:
        folder = Path(name)
        _copy_sources(folder)
        runtime, program = ([f"{source}.o" for source in part] for part in sources)
        defines = ["-DTC_STATIC_MODEL"] if model is not None else []
        if model is not None and model.runtime is not None:
            for source in (*runtime, *program):
                shutil.copyfile(model.runtime / source, folder / source)
        else:
            _compile_all(command, [*sources[0], *sources[1]], defines, folder)
        extra = _model_objects(command, model, folder) if model is not None else []
        link = [*command, *(_wasm_flags() if arch == WASM else [*_LINK_FLAGS, *(["-static"] if static else [])])]
        libraries = ["-lm"] if arch == WASM else _LIBRARIES
        # The exports of an engine that is linked in stay inside; nothing opens it.
        _call([*link, "-o", PROGRAM_NAME, *program, *runtime, *extra, *libraries], folder)
        names = [PROGRAM_NAME]
        if not static and model is None:
            soname = f"-Wl,-soname,{LIBRARY_NAME}"
            _call([*link, "-shared", soname, "-o", LIBRARY_NAME, *runtime, *_LIBRARIES], folder)
            names.append(LIBRARY_NAME)
        for file in names:
            _place(folder / file, out / file)
    headers = tuple(_place(EDGE / "include" / header, out / header) for header in HEADERS)
    return RunnerFiles(out / LIBRARY_NAME if LIBRARY_NAME in names else None, out / PROGRAM_NAME, headers)


def _wasm_flags() -> list[str]:
    header = (EDGE / "include" / "toolchain_runtime.h").read_text()
    interface = re.findall(r"^TC_API .*?\b(tc_\w+)\(", header, flags=re.MULTILINE)
    interface.remove("tc_open")  # a module cannot load an engine from a file
    exports = (*interface, *_WASM_EXPORTS)
    return ["-s", "-Wl,--gc-sections", *_WASM_LINK_FLAGS, *(f"-Wl,--export={name}" for name in exports)]


def _copy_sources(folder: Path) -> None:
    for part in ("include", "src"):
        shutil.copytree(EDGE / part, folder / part)


def _compile_all(command: list[str], sources: list[str], defines: list[str], folder: Path) -> None:
    def one(source: str) -> None:
        # Without instructions of the processor's own the digest is most of a start's time.
        speed = ["-O2"] if source == "hash" else []
        _call([*command, *_FLAGS, *speed, *defines, "-c", f"src/{source}.c", "-o", f"{source}.o"], folder)

    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(one, sources))


def _model_objects(command: list[str], model: StaticModel, folder: Path) -> list[str]:
    lines = ["#include <stddef.h>"]
    for name, content in (("bundle_json", model.bundle_json), ("selftest", model.selftest)):
        # Signed, as char is on some architectures; an array must have an element.
        numbers = ",".join(str(byte - 256 if byte > 127 else byte) for byte in content) or "0"
        lines.append(f"_Alignas(64) const signed char toolchain_{name}[] = {{{numbers}}};")
        lines.append(f"const size_t toolchain_{name}_bytes = {len(content)};")
    (folder / "content.c").write_text("\n".join(lines) + "\n")
    _call([*command, "-Os", "-w", "-c", "content.c", "-o", "content.o"], folder)
    names = ["content.o"]
    for index, path in enumerate(model.objects):
        name = f"model-{index}{path.suffix}"
        shutil.copyfile(path, folder / name)
        names.append(name)
    return names


def _place(source: Path, destination: Path) -> Path:
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.copy(source, partial)
    os.replace(partial, destination)
    return destination


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    # WebAssembly's linker only warns of a call with other types than the function's, and puts a trap in its place.
    if done.returncode or "signature mismatch" in done.stderr:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ToolchainError(
            f"the edge runtime cannot be built: {' '.join(command[:5])} ... ended with {done.returncode}",
            details=lines[:20],
            code=ExitCode.COMPILE,
        )


def _error(what: str) -> ToolchainError:
    return ToolchainError(what, where="the edge runtime", code=ExitCode.COMPILE)


def _missing(what: str, install: str) -> ToolchainError:
    return ToolchainError(what, where="the edge runtime", hint=install, code=ExitCode.MISSING_TOOL)
