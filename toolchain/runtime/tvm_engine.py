"""Engines that TVM compiled: Relax virtual machine libraries, run with TVM's runtime alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bundle.check import damaged
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract, bad_input
from toolchain.runtime.elf_check import check_library
from toolchain.runtime.onnxruntime_engine import first_line
from toolchain.runtime.tvm_functions import register

if TYPE_CHECKING:
    import numpy as np

ENTRY = "main"
_RUNTIME_ONLY = "TVM_USE_RUNTIME_LIB"
_NUM_THREADS = "TVM_NUM_THREADS"
_BIND_THREADS = "TVM_BIND_THREADS"
#: TVM's threading::ThreadGroup::kBig: use the fastest cores.
_BIG_CORES = 1
_ALIGNMENT = 64


class TvmRunner:
    """One compiled library in a virtual machine.  A virtual machine keeps state: one run at a time."""

    def __init__(self, path: Path, contract: Contract, device: Any, threads: int) -> None:
        self._contract = contract
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._threads = threads
        self._lock = threading.Lock()
        check_library(path)
        try:
            machine = open_machine(path, device)
            self._main = machine[ENTRY]
            parameters = _parameters(machine)
        except Exception as error:
            raise ToolchainError(
                f"TVM cannot load it: {first_line(error)}", where=path.name, code=ExitCode.DAMAGED_BUNDLE
            ) from error
        self._machine = machine
        self._order = _input_order(parameters, contract, path.name)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            set_threads(self._threads)
            try:
                values = self._main(*(self._tensor(inputs[name]) for name in self._order))
                arrays = [_array(value) for value in _flat(values)]
            except Exception as error:
                raise bad_input(f"the engine failed on these inputs: {first_line(error)}") from error
        names = [spec.name for spec in self._contract.outputs]
        if len(arrays) != len(names):
            raise damaged(f"the engine gave {len(arrays)} outputs, its contract names {len(names)}", "engine")
        return dict(zip(names, arrays, strict=True))

    def _tensor(self, array: np.ndarray) -> Any:
        """A copy of ``array`` on the device, aligned as compiled code relies on and numpy does not promise."""
        import tvm

        if self._on_cpu and array.size and array.dtype.kind in "fiu":
            return tvm.runtime.from_dlpack(aligned_copy(array))
        return tvm.runtime.tensor(array, self._device)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A contiguous copy whose first element lies at a multiple of 64 bytes.

    With it a tensor is handed over in a tenth of the time that TVM takes to allocate and fill one of its own.
    """
    import numpy as np

    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def _array(value: Any) -> np.ndarray:
    """A tensor's values in memory of their own."""
    import numpy as np

    if value.device.type == "cpu" and str(value.dtype) != "bool" and 0 not in value.shape:
        return np.array(np.from_dlpack(value))
    return value.numpy()  # type: ignore[no-any-return]


def tvm_opener(contract: Contract, device: str, threads: int) -> Callable[[Path], TvmRunner]:
    """What opens the libraries of an engine for device ``cpu`` or ``cuda``.

    Raises:
        ToolchainError: MISSING_TOOL, TVM is not installed; INCOMPATIBLE_HOST, there is no such device.
    """
    tvm = import_tvm_runtime(threads)
    place = tvm.cuda(0) if device == "cuda" else tvm.cpu(0)
    if not place.exist:
        raise ToolchainError(
            "the engine needs a CUDA device, TVM finds none on this machine", code=ExitCode.INCOMPATIBLE_HOST
        )
    return lambda path: TvmRunner(path, contract, place, threads)


def import_tvm_runtime(threads: int = 0) -> Any:
    """Import TVM, without its compiler library (259 MB) and without torch, if it is not imported yet.

    TVM sizes the thread pool of a thread when that thread first runs something, from an environment variable; so
    the variable is set here, to the largest count that may be asked for.

    Raises:
        ToolchainError: MISSING_TOOL.
    """
    count = max(threads, len(os.sched_getaffinity(0)), int(os.environ.get(_NUM_THREADS) or 0))
    os.environ[_NUM_THREADS] = str(count)
    # A worker bound to one core waits for it while another core is idle: with a second busy process on the machine
    # single runs took a hundred times the median.
    os.environ.setdefault(_BIND_THREADS, "0")
    if "tvm" in sys.modules:
        return sys.modules["tvm"]
    with _runtime_library_only(), _without_torch():
        try:
            import tvm
            import tvm.runtime.vm
        except ImportError as error:
            raise ToolchainError(
                f"the engine needs TVM's runtime, which cannot be imported: {first_line(error)}",
                hint="pip install apache-tvm",
                code=ExitCode.MISSING_TOOL,
            ) from error
    register()
    return tvm


@contextmanager
def _runtime_library_only() -> Iterator[None]:
    before = os.environ.get(_RUNTIME_ONLY)
    os.environ[_RUNTIME_ONLY] = "1"
    try:
        yield
    finally:
        # Not for processes that are started later: they may want to compile.
        if before is None:
            del os.environ[_RUNTIME_ONLY]
        else:
            os.environ[_RUNTIME_ONLY] = before


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tvm_ffi from importing torch, which takes 2 s and is not used here; torch can be imported afterwards."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get("torch", ...) is None:
            del sys.modules["torch"]


def open_machine(path: Path, device: Any) -> Any:
    """A virtual machine over the library at ``path``, on a TVM device."""
    import tvm
    from tvm.runtime import vm

    return vm.VirtualMachine(tvm.runtime.load_module(str(path)), device)


_configured = threading.local()


def set_threads(threads: int) -> None:
    """Let TVM use this many threads (0: all processors) for what the calling thread runs.

    TVM keeps a thread pool for each calling thread.

    Raises:
        ToolchainError: USAGE, the pool of this thread exists already and is smaller.
    """
    import tvm

    count = threads or len(os.sched_getaffinity(0))
    if getattr(_configured, "count", 0) == count:
        return
    tvm.get_global_func("runtime.config_threadpool")(_BIG_CORES, count)
    got = int(tvm.get_global_func("runtime.NumThreads")())
    if got != count:
        raise ToolchainError(
            f"TVM was started with at most {got} threads in this process, got {count}",
            where="threads",
            hint=f"set {_NUM_THREADS}={count} before the process starts",
            code=ExitCode.USAGE,
        )
    _configured.count = count


def _parameters(machine: Any) -> list[str]:
    arity = int(machine._get_function_arity(ENTRY))
    return [str(machine._get_function_param_name(ENTRY, index)) for index in range(arity)]


def _input_order(parameters: list[str], contract: Contract, where: str) -> list[str]:
    """Which input each parameter takes: by name, or by position where TVM had to change a name."""
    if set(parameters) <= contract.names:
        return parameters
    if len(parameters) != len(contract.inputs):
        raise damaged(f"takes {len(parameters)} inputs, its contract names {len(contract.inputs)}", where)
    return list(contract.input_names)


def _flat(values: Any) -> list[Any]:
    return [values] if hasattr(values, "numpy") else list(values)
