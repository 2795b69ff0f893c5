"""The engines that are compared: each is opened on an ONNX folder and gives a function that runs it once.

Inputs are placed in each engine's own tensors before any timing, outputs stay in them: no engine copies to or
from numpy inside the timed call.  ours: aligned memory of numpy's, outputs
in memory of their own; onnxruntime: IO binding, outputs
from its arena; PyTorch: tensors under ``inference_mode``; OpenVINO: an infer request with its inputs set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_models import ROOT, Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

CONTENDERS = ("ours", "onnxruntime", "openvino", "torch", "torch.compile")
INT8 = ("ours", "onnxruntime", "openvino")
"""Those that run a quantized ONNX file; PyTorch runs the original module."""


@dataclass(frozen=True)
class Task:
    """What a contender is to run.

    Attributes:
        folder: with model.onnx and contract.json.
        library: our compiled model.
        inputs: by name, in the order of the contract.
        threads: 1 or more.
    """

    model: Model
    folder: Path
    library: Path
    inputs: Arrays
    threads: int


@dataclass(frozen=True)
class Opened:
    """A loaded engine: ``run`` computes once, ``outputs`` once more and returns numpy arrays."""

    run: Callable[[], Any]
    outputs: Callable[[], list[NDArray[Any]]]


class Unavailable(Exception):  # noqa: N818 - a result that the table shows
    """Why a contender takes no part."""


def open_contender(name: str, task: Task) -> Opened:
    """Load contender ``name``.

    Raises:
        Unavailable: it is not installed, or has nothing for this model.
    """
    openers: dict[str, Callable[[Task], Opened]] = {
        "ours": _ours,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "torch": lambda t: _torch(t, compiled=False),
        "torch.compile": lambda t: _torch(t, compiled=True),
    }
    return openers[name](task)


def _ours(task: Task) -> Opened:
    if not task.library.is_file():
        raise Unavailable("not built")
    from toolchain.native_engine import NativeEngine, NativeError

    try:
        engine = NativeEngine(task.library, task.threads)
    except NativeError:
        return _machine(task)
    order = [task.inputs[tensor.name] for tensor in engine.inputs]
    return Opened(lambda: engine.run(order), lambda: engine.run(order))


def _machine(task: Task) -> Opened:
    """Our engine in the form for TVM's virtual machine, for models that need it."""
    from toolchain.tvm.library import load_tvm

    tvm: Any = load_tvm()
    machine = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(str(task.library)), tvm.cpu())
    main, tensors = machine["main"], [tvm.runtime.tensor(array) for array in task.inputs.values()]

    def outputs() -> list[NDArray[Any]]:
        result = main(*tensors)
        return [tensor.numpy() for tensor in ([result] if hasattr(result, "numpy") else result)]

    return Opened(lambda: main(*tensors), outputs)


def _onnxruntime(task: Task) -> Opened:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = task.threads
    # Its threads spin between the operators of a run, as they do by default, but not on after it: that would
    # take the cores from whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(task.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in task.inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def outputs() -> list[NDArray[Any]]:
        session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    return Opened(lambda: session.run_with_iobinding(binding), outputs)


def _openvino(task: Task) -> Opened:
    if importlib.util.find_spec("openvino") is None:
        raise Unavailable("not installed")
    import numpy as np
    import openvino as ov  # type: ignore[import-untyped, import-not-found, unused-ignore]

    core = ov.Core()
    settings = {
        # Its default on some processors is bf16, which would be another computation.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
        # One CPU time clock covers all of a process, so binding would only fight with the other contenders.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(task.folder / "model.onnx"), "CPU", settings)
    request = compiled.create_infer_request()
    for name, array in task.inputs.items():
        request.set_tensor(name, ov.Tensor(array))

    def outputs() -> list[NDArray[Any]]:
        request.infer()
        return [np.array(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    return Opened(request.infer, outputs)


def _torch(task: Task, compiled: bool) -> Opened:
    import torch

    from toolchain.export.source import ModelOptions, load_source

    torch.set_num_threads(task.threads)
    module: Any = load_source(ModelOptions(task.model.source, task.model.checkpoint), ROOT).module
    # Copies: torch warns of arrays that can't be written to.
    tensors = [torch.from_numpy(array.copy()) for array in task.inputs.values()]
    if compiled:
        module = torch.compile(module)

    def run() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    def outputs() -> list[NDArray[Any]]:
        result = run()
        return [tensor.numpy() for tensor in (result if isinstance(result, tuple) else (result,))]

    return Opened(run, outputs)
