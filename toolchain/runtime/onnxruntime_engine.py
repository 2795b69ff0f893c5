"""Engines that ONNX Runtime runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bundle.check import damaged
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract, bad_input

if TYPE_CHECKING:
    import numpy as np

# Errors are exceptions here, which say the same; a served model would let its clients fill the log.
_SEVERITY_FATAL = 4


class OnnxRuntimeRunner:
    """One ONNX model in a session; sessions may run in several threads at once."""

    def __init__(self, session: Any, contract: Contract, name: str) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [spec.name for spec in contract.outputs]
        # An optimizer may have dropped an input that nothing uses.
        unknown = [n for n in self._inputs if n not in contract.names]
        missing = [n for n in self._outputs if n not in {o.name for o in session.get_outputs()}]
        if unknown or missing:
            raise damaged(f"inputs or outputs differ from its contract: {', '.join(unknown + missing)}", name)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            # As many as there are in the contract are all of them.
            given = inputs if len(inputs) == len(self._inputs) else {name: inputs[name] for name in self._inputs}
            values = self._session.run(self._outputs, given)
        except Exception as error:
            # ONNX Runtime raises a dozen unrelated classes; all of them are about these inputs.
            raise bad_input(f"the engine failed on these inputs: {first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


def onnxruntime_opener(
    contract: Contract, provider: str, threads: int, spinning: bool = True
) -> Callable[[Path], OnnxRuntimeRunner]:
    """What opens the model files of an engine.

    Raises:
        ToolchainError: MISSING_TOOL, ONNX Runtime is not installed; INCOMPATIBLE_HOST, it lacks ``provider``.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ToolchainError(
            f"the engine needs ONNX Runtime, which cannot be imported: {first_line(error)}",
            hint="pip install onnxruntime",
            code=ExitCode.MISSING_TOOL,
        ) from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise _no_provider(provider, f"the installed ONNX Runtime has {', '.join(available)}")
    return lambda path: OnnxRuntimeRunner(_session(path, provider, threads, spinning), contract, path.name)


def _session(path: Path, provider: str, threads: int, spinning: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.log_severity_level = _SEVERITY_FATAL
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise ToolchainError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load it: {first_line(error)}",
            where=path.name,
            code=ExitCode.DAMAGED_BUNDLE,
        ) from error
    session.disable_fallback()
    used = session.get_providers()
    if not used or used[0] != provider:
        # ONNX Runtime only logs that a provider could not start, and goes on with another.
        raise _no_provider(provider, f"it could not be started, ONNX Runtime chose {', '.join(used)} instead")
    return session


def _no_provider(provider: str, reason: str) -> ToolchainError:
    hint = "pip install onnxruntime-gpu, with the CUDA libraries it names" if provider.startswith("CUDA") else ""
    return ToolchainError(
        f"the engine needs the execution provider {provider}: {reason}", hint=hint, code=ExitCode.INCOMPATIBLE_HOST
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
