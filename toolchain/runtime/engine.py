"""Opens the engine in a folder (``engine.json``, ``contract.json`` and the engine files) and runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.bundle.check import damaged, parse_json
from toolchain.bundle.manifest import EngineInfo, check_schema, parse_engine
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.buckets import choose, cut, fill, run_in_parts
from toolchain.runtime.contract import Contract, parse_contract, shape_text

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

ENGINE_SCHEMA = 1
CPU_PROVIDER = "CPUExecutionProvider"
_REMEMBERED_OUTPUTS = 256


class Runner(Protocol):
    """One opened engine file: takes every input of the contract, at the sizes that it was compiled for."""

    def run(self, inputs: Arrays) -> Arrays: ...


class Engine:
    """An engine ready to run.  Runs may come from several threads.

    Of an engine with several variants (buckets) the first is opened at once, the others when they are first needed;
    :meth:`open_all` opens them all.
    """

    def __init__(self, folder: Path, info: EngineInfo, contract: Contract, opener: Callable[[Path], Runner]) -> None:
        self.info = info
        self.contract = contract
        self._folder = folder
        self._opener = opener
        self._sizes = [variant.sizes for variant in info.variants]
        self._runners: list[Runner | None] = [None] * len(info.variants)
        self._takes_any = self._sizes == [{}]
        self._lock = threading.Lock()
        self._checked: set[tuple[Any, ...]] = set()
        self._runner(0)

    def open_all(self) -> None:
        """Open every variant now, so that no later run pays for it."""
        for index in range(len(self._runners)):
            self._runner(index)

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the model.

        Args:
            inputs: name -> array, of exactly the contract's dtypes, and shapes within its ranges.

        Returns:
            name -> array, in the order of the contract.

        Raises:
            ToolchainError: BAD_INPUT, the inputs do not fit the contract or the engine refuses them.
        """
        arrays, sizes = self.contract.check(inputs)
        return self._run(arrays, sizes)

    def run_checked(self, arrays: Arrays, sizes: Mapping[str, int]) -> Arrays:
        """Run inputs that fit the contract, as :meth:`Contract.check` gives them; for whoever checked them already.

        Raises:
            ToolchainError: BAD_INPUT, the engine refuses them.
        """
        return self._run(arrays, sizes)

    def _run(self, arrays: Arrays, sizes: Mapping[str, int]) -> Arrays:
        if self._takes_any:
            outputs = self._runner(0).run(arrays)
            self._check_outputs(outputs)
            return outputs
        choice = choose(self.contract, self._sizes, sizes)
        fixed = self._sizes[choice.variant]
        if choice.split:
            symbol, step = choice.split, fixed[choice.split]
            return run_in_parts(
                self.contract,
                arrays,
                symbol,
                sizes[symbol],
                step,
                lambda part: self._run(part, self.contract.sizes_of(part)),
            )
        filled = any(sizes.get(symbol, size) != size for symbol, size in fixed.items())
        if filled:
            arrays = fill(self.contract, arrays, sizes, fixed)
        outputs = self._runner(choice.variant).run(arrays)
        self._check_outputs(outputs)
        return cut(self.contract, outputs, sizes, fixed) if filled else outputs

    def _runner(self, index: int) -> Runner:
        opened = self._runners[index]
        if opened is not None:
            return opened
        with self._lock:
            runner = self._runners[index]
            if runner is None:
                runner = self._opener(self._folder / self.info.variants[index].file)
                self._runners[index] = runner
            return runner

    def _check_outputs(self, outputs: Arrays) -> None:
        key = tuple([(array.dtype, array.shape) for array in outputs.values()])
        if key in self._checked:
            return
        for spec in self.contract.outputs:
            got = outputs[spec.name]
            fixed = [(want, size) for want, size in zip(spec.shape, got.shape, strict=False) if isinstance(want, int)]
            if got.dtype.name != spec.dtype or got.ndim != len(spec.shape) or any(a != b for a, b in fixed):
                raise damaged(
                    f"the engine gave output {spec.name!r} as {got.dtype.name}{shape_text(got.shape)}, "
                    f"its contract says {spec.dtype}{shape_text(spec.shape)}",
                    self._folder.name,
                )
        if len(self._checked) < _REMEMBERED_OUTPUTS:
            self._checked.add(key)


def open_engine(folder: Path, threads: int = 0, provider: str = CPU_PROVIDER, spinning: bool = True) -> Engine:
    """Open the engine in ``folder``.

    Args:
        folder: holds ``engine.json``, ``contract.json`` and the files that these name.
        threads: threads of one run; 0: every processor that this process may use.
        provider: ONNX Runtime execution provider, e.g. ``"CUDAExecutionProvider"``; the engine never runs on
            another one instead.  A TVM engine runs on the device that ``engine.json`` names.
        spinning: let ONNX Runtime's threads spin while they wait: lower latency, more CPU time, the same outputs.

    Raises:
        ToolchainError: MISSING_TOOL, the runtime is not installed; INCOMPATIBLE_HOST, it lacks the provider, or
            the device is not there; DAMAGED_BUNDLE, the folder's files are not right; USAGE, negative ``threads``.
    """
    if threads < 0:
        raise ToolchainError(f"must be 0 (all) or more, got {threads}", where="threads", code=ExitCode.USAGE)
    engine_json = folder / "engine.json"
    data = _read_json(engine_json)
    check_schema(data.get("schema"), ENGINE_SCHEMA, engine_json)
    info = parse_engine(data, engine_json)
    contract = parse_contract(_read_json(folder / "contract.json"), folder / "contract.json")
    _check_variants(folder, info, contract)
    if info.form == "static":
        raise ToolchainError(
            f"the engine is one executable with its own runtime inside, {info.variants[0].file}",
            where="engine.json",
            hint=f"run it: './{info.variants[0].file} run --input NAME=x.npy'; for Python build the target with "
            'form = "aot" in its profile\'s [runtime] table',
            code=ExitCode.INCOMPATIBLE_HOST,
        )
    if info.form == "aot":
        from toolchain.runtime.aot_engine import aot_opener

        return Engine(folder, info, contract, aot_opener(contract, threads))
    if info.backend == "tvm":
        from toolchain.runtime.tvm_engine import tvm_opener

        return Engine(folder, info, contract, tvm_opener(contract, info.device, threads))
    from toolchain.runtime.onnxruntime_engine import onnxruntime_opener

    return Engine(folder, info, contract, onnxruntime_opener(contract, provider, threads, spinning))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise damaged("is missing", path) from None
    except OSError as error:
        raise ToolchainError(f"cannot be read: {error.strerror}", where=str(path), code=ExitCode.STORAGE) from error


def _check_variants(folder: Path, info: EngineInfo, contract: Contract) -> None:
    for variant in info.variants:
        if not (folder / variant.file).is_file():
            raise damaged(f"names the engine file {variant.file}, which is missing", folder / "engine.json")
        unknown = sorted(variant.sizes.keys() - contract.dims.keys())
        if unknown:
            raise damaged(
                f"{variant.file} has a size for {unknown[0]!r}, no dim of the contract", folder / "engine.json"
            )
