"""Triton's ModelConfig of a bundle, made with the classes of Triton's own schema (``model_config.proto``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.source import DATATYPES, Source, open_dims
from toolchain.runtime.contract import Contract

if TYPE_CHECKING:
    import numpy as np

PYTHON, ONNXRUNTIME = "python", "onnxruntime"
_TENSORRT = "TensorrtExecutionProvider"


@dataclass(frozen=True, slots=True)
class Serving:
    """How Triton is to serve the model, in the words of our server's settings.

    Attributes:
        instances: engines at the same time.
        threads: of one engine; 0: all processors, divided by the instances.
        max_batch_size: rows merged into one run, as measured; 1: batches do not pay, or nobody measured.
        queue_delay_us: how long a batch that is not full waits.
        queue_size: requests that may wait.
        timeout_ms: in the queue; 0: no limit.
        priorities: levels; 1: none.
        default_priority: of requests that name none; 0: the middle level.
    """

    instances: int = 1
    threads: int = 0
    max_batch_size: int = 1
    queue_delay_us: int = 0
    queue_size: int = 0
    timeout_ms: float = 0
    priorities: int = 1
    default_priority: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the configuration says besides the contract.

    Attributes:
        backend: of Triton: ``"python"`` or ``"onnxruntime"``.
        file: ``default_model_filename``.
        response_cache: whether Triton may answer equal requests from its cache.
        warmup: input -> recorded array, run before the model is ready.
        labels: output -> file of labels.
    """

    backend: str
    file: str
    serving: Serving = Serving()
    response_cache: bool = False
    warmup: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


def largest_batch(contract: Contract) -> int:
    """Triton's ``max_batch_size``: rows of one request or run; 0 where Triton must not know of batches.

    It may know where the first axis of every input and output is the same dimension of independent rows, from 1 to a
    bound, and something is left of each shape without it.
    """
    shapes = [*(spec.shape for spec in contract.inputs), *(spec.shape for spec in contract.outputs)]
    first = shapes[0][0] if shapes[0] else None
    if not isinstance(first, str) or any(len(shape) < 2 or shape[0] != first for shape in shapes):
        return 0
    dim = contract.dims[first]
    if not dim.batch or dim.min > 1 or any(shape.count(first) > 1 for shape in shapes):
        return 0
    return dim.max or 0


def config_text(source: Source, plan: Plan) -> str:
    """The content of ``config.pbtxt``.

    Raises:
        ToolchainError: MISSING_TOOL, protobuf is not installed.
    """
    from google.protobuf import text_format

    config = model_config(source, plan)
    note = "".join(f"# {key}: {value}\n" for key, value in source.facts().items())
    return f"{note}{text_format.MessageToString(config)}"


def model_config(source: Source, plan: Plan) -> Any:
    """The ``ModelConfig`` message; with ``max_batch_size`` above 0, shapes are without the batch axis."""
    pb = _classes()
    most = largest_batch(source.contract)
    config = pb.ModelConfig(
        name=source.name,
        backend=plan.backend,
        max_batch_size=most,
        default_model_filename=plan.file,
        input=[_tensor(pb.ModelInput, spec, most) for spec in source.contract.inputs],
        output=[
            _tensor(pb.ModelOutput, spec, most, label_filename=plan.labels.get(spec.name, ""))
            for spec in source.contract.outputs
        ],
    )
    config.version_policy.latest.num_versions = 1
    on_gpu = source.engine.device == "cuda"
    kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(kind=kind, count=plan.serving.instances)
    _set_parameters(config, source, plan)
    if most and plan.serving.max_batch_size > 1:
        _set_batching(pb, config.dynamic_batching, plan.serving, most)
    if plan.response_cache:
        config.response_cache.enable = True
    if source.manifest.runtime.provider == _TENSORRT and plan.backend == ONNXRUNTIME:
        config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    if plan.warmup:
        _set_warmup(pb, config, source.contract, plan.warmup, most)
    return config


def _classes() -> Any:
    try:
        from toolchain.runtime.server.proto import model_config_pb2
    except ImportError as error:
        raise ToolchainError(
            f"writing Triton's configuration needs protobuf, which cannot be imported: {error}",
            hint='pip install "protobuf>=6.31.1,<8"',
            code=ExitCode.MISSING_TOOL,
        ) from error
    return model_config_pb2


def _tensor(kind: Any, spec: Any, most: int, **more: str) -> Any:
    dims = open_dims(spec.shape[1:] if most else spec.shape)
    tensor = kind(name=spec.name, data_type=_data_type(spec.dtype), dims=dims or [1], **more)
    if not dims:
        # A scalar: Triton knows none, so it says one element and gives it another shape for the model.
        tensor.reshape.SetInParent()
    return tensor


def _data_type(dtype: str) -> str:
    """A name in ``DataType`` of model_config.proto."""
    return f"TYPE_{DATATYPES[dtype]}"


def _set_parameters(config: Any, source: Source, plan: Plan) -> None:
    """What the backend reads (threads), and what tells an operator which bundle it is."""
    for key, value in {"release_version": source.manifest.version, **source.facts()}.items():
        config.parameters[key].string_value = value
    threads = str(plan.serving.threads)
    if plan.backend == PYTHON:
        config.parameters["threads"].string_value = threads
    elif plan.serving.threads:
        config.parameters["intra_op_thread_count"].string_value = threads


def _set_batching(pb: Any, batching: Any, serving: Serving, most: int) -> None:
    batching.preferred_batch_size.append(min(serving.max_batch_size, most))
    batching.max_queue_delay_microseconds = serving.queue_delay_us
    if serving.priorities > 1:
        batching.priority_levels = serving.priorities
        batching.default_priority_level = serving.default_priority or (serving.priorities + 1) // 2
    policy = batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = int(serving.timeout_ms * 1000)
    policy.allow_timeout_override = True
    policy.max_queue_size = serving.queue_size


def _set_warmup(pb: Any, config: Any, contract: Contract, arrays: Mapping[str, np.ndarray], most: int) -> None:
    """One recorded request; its raw tensors lie in files below ``warmup/``."""
    warmup = config.model_warmup.add(name="recorded", batch_size=1 if most else 0)
    for spec, file in zip(contract.inputs, warmup_files(contract), strict=True):
        shape = arrays[spec.name].shape
        entry = warmup.inputs[spec.name]
        entry.data_type = pb.DataType.Value(_data_type(spec.dtype))
        entry.dims.extend(shape[1:] if most else shape)
        entry.input_data_file = file


def warmup_files(contract: Contract) -> list[str]:
    """A file for each input; not by its name, which may be none of a file."""
    return [f"input-{index}" for index in range(len(contract.inputs))]
