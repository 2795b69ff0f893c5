"""WebAssembly modules with WASI, run by wasmtime: as a command, and as a library whose functions are called."""

from __future__ import annotations

import functools
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import wasmtime

from helpers.edge_samples import DTYPES


def command(arguments: Sequence[str]) -> int:
    """``wasmtime MODULE ARGUMENTS`` with this process's streams, and ``wasmtime --version``: the status."""
    if list(arguments) == ["--version"]:
        print(f"wasmtime {version('wasmtime')}")
        return 0
    store, linker = wasmtime.Store(_engine()), wasmtime.Linker(_engine())
    linker.define_wasi()
    config = wasmtime.WasiConfig()
    config.argv = list(arguments)
    config.inherit_stdin()
    config.inherit_stdout()
    config.inherit_stderr()
    store.set_wasi(config)
    try:
        linker.instantiate(store, _compiled(Path(arguments[0]))).exports(store)["_start"](store)
    except wasmtime.ExitTrap as ended:
        return int(ended.code)
    return 0


def wasmtime_program(folder: Path) -> Path:
    """A program ``wasmtime`` in ``folder``."""
    path = folder / "wasmtime"
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(tests)!r}); from helpers.wasm import command\n"
    path.write_text(f"#!{sys.executable}\n{code}sys.exit(command(sys.argv[1:]))\n")
    path.chmod(0o755)
    return path


def run(module: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``wasmtime --dir . MODULE ARGUMENTS`` in ``cwd``: the module sees the files of that folder alone."""
    store, linker = wasmtime.Store(_engine()), wasmtime.Linker(_engine())
    linker.define_wasi()
    config = wasmtime.WasiConfig()
    config.argv = called = [module.name, *map(str, arguments)]
    if cwd is not None:
        config.preopen_dir(str(cwd), ".")
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        config.stdout_file, config.stderr_file = str(out), str(err)
        store.set_wasi(config)
        code = 0
        try:
            linker.instantiate(store, _compiled(module)).exports(store)["_start"](store)
        except wasmtime.ExitTrap as ended:
            code = ended.code
        return subprocess.CompletedProcess(called, code, out.read_text(), err.read_text())


@functools.cache
def _engine() -> wasmtime.Engine:
    return wasmtime.Engine()


@functools.cache
def _compiled(module: Path) -> wasmtime.Module:
    return wasmtime.Module.from_file(_engine(), str(module))


class Embedded:
    """An instance of a module, by the functions of ``toolchain_runtime.h``; pointers and sizes are of 32 bits."""

    VALUE = "<IIIii4x8q"
    OPTIONS = "<IIIiIIIII"

    def __init__(self, module: Path) -> None:
        self.store = wasmtime.Store(_engine())
        self.store.set_wasi(wasmtime.WasiConfig())
        linker = wasmtime.Linker(_engine())
        linker.define_wasi()
        instance = linker.instantiate(self.store, _compiled(module))
        self.exports = instance.exports(self.store)
        self.bundle = 0

    def call(self, function: str, *arguments: int) -> int:
        return self.exports[function](self.store, *arguments)

    def put(self, data: bytes) -> int:
        address = self.call("malloc", max(1, len(data)))
        self.exports["memory"].write(self.store, data, address)
        return address

    def get(self, address: int, size: int) -> bytes:
        return bytes(self.exports["memory"].read(self.store, address, address + size))

    def text(self, address: int) -> str:
        return self.get(address, 1024).partition(b"\0")[0].decode()

    def open(self, **changes: int) -> tuple[int, str]:
        """The status of opening the module's model, and the reason."""
        why = self.put(bytes(1024))
        given = {"size": 36, "abi": 1, "target": 0, "threads": 0, "flags": 0, "error": why, "bytes": 1024} | changes
        place = self.put(bytes(4))
        status = self.call("tc_open_module", self.put(struct.pack(self.OPTIONS, *given.values(), 0, 0)), place)
        self.bundle = struct.unpack("<I", self.get(place, 4))[0]
        return status, self.text(why)

    def run(self, name: str, array: np.ndarray) -> tuple[int, np.ndarray]:
        """Status and the one output for the one input."""
        value = (self.put(name.encode() + b"\0"), self.put(array.tobytes()), array.nbytes)
        given = self.put(self._value(*value, DTYPES.index(array.dtype.name) + 1, array.shape))
        taken = self.put(self._value(0, 0, 0, 0, ()))
        status = self.call("tc_output_shapes", self.bundle, given, 1, taken, 1)
        if status:
            return status, np.empty(0)
        _, _, size, dtype, rank, *shape = struct.unpack(self.VALUE, self.get(taken, struct.calcsize(self.VALUE)))
        data = self.call("malloc", size)
        self.exports["memory"].write(self.store, struct.pack("<I", data), taken + 4)
        status = self.call("tc_run", self.bundle, given, 1, taken, 1)
        return status, np.frombuffer(self.get(data, size), DTYPES[dtype - 1]).reshape(shape[:rank])

    def last_error(self) -> str:
        text = self.put(bytes(1024))
        self.call("tc_last_error", self.bundle, text, 1024)
        return self.text(text)

    def _value(self, name: int, data: int, size: int, dtype: int, shape: Sequence[int]) -> bytes:
        return struct.pack(self.VALUE, name, data, size, dtype, len(shape), *shape, *[0] * (8 - len(shape)))
