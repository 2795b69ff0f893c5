"""Engines that were compiled ahead of time: nothing but the library itself is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.bundle.check import damaged
from toolchain.errors import ExitCode, ToolchainError
from toolchain.native_engine import NativeEngine, NativeError
from toolchain.runtime.contract import Contract
from toolchain.runtime.elf_check import check_library

if TYPE_CHECKING:
    import numpy as np


class AotRunner:
    """One opened library."""

    def __init__(self, path: Path, contract: Contract, threads: int) -> None:
        check_library(path)
        try:
            self._engine = NativeEngine(path, threads)
        except NativeError as error:
            raise ToolchainError(
                f"the engine cannot be opened: {error}", where=path.name, code=ExitCode.DAMAGED_BUNDLE
            ) from error
        self._inputs = [tensor.name for tensor in self._engine.inputs]
        self._outputs = [tensor.name for tensor in self._engine.outputs]
        for kind, names, wanted in (
            ("input", self._inputs, contract.input_names),
            ("output", self._outputs, tuple(spec.name for spec in contract.outputs)),
        ):
            if sorted(names) != sorted(wanted):
                raise damaged(f"has the {kind}s {', '.join(names)}, its contract names {', '.join(wanted)}", path.name)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            outputs = self._engine.run([inputs[name] for name in self._inputs])
        except NativeError as error:
            raise ToolchainError(f"the engine's run failed: {error}", code=ExitCode.INTERNAL) from error
        return dict(zip(self._outputs, outputs, strict=True))


def aot_opener(contract: Contract, threads: int) -> Callable[[Path], AotRunner]:
    """What opens the libraries of an engine; ``threads`` 0: one for each processor this process may use."""
    return lambda path: AotRunner(path, contract, threads)
