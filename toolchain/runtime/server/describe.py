"""What a model version says of itself: Open Inference Protocol metadata, and Triton's ModelConfig as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from toolchain.runtime.contract import InputSpec, OutputSpec, Size
from toolchain.runtime.server.api import ModelMetadata, TensorSpec
from toolchain.runtime.server.datatypes import NAMES
from toolchain.runtime.server.traffic import Traffic, version_key
from toolchain.runtime.server.version import ModelVersion


def metadata(traffic: Traffic, version: ModelVersion) -> ModelMetadata:
    """The answer to ``GET /v2/models/NAME``."""
    placed = version.placed
    engine, contract = placed.manifest.engine, placed.contract
    return ModelMetadata(
        name=version.name,
        versions=tuple(sorted(traffic.versions, key=version_key)),
        platform=f"{engine.backend}_{'onnx' if engine.backend == 'onnxruntime' else 'library'}",
        inputs=tuple(TensorSpec(s.name, datatype(s.dtype), _open_shape(s.shape)) for s in contract.inputs),
        outputs=tuple(TensorSpec(s.name, datatype(s.dtype), _open_shape(s.shape), s.labels) for s in contract.outputs),
        properties={
            "digest": placed.digest,
            "target": placed.manifest.target.name,
            "precision": engine.precision,
            "device": engine.device,
            "execution": version.settings.execution,
            "description": placed.manifest.description,
            "preprocessing": contract.preprocessing,
        },
    )


def config(traffic: Traffic, version: ModelVersion) -> dict[str, Any]:
    """Triton's ModelConfig in JSON: shapes without the batch axis where ``max_batch_size`` is above 0."""
    placed, settings = version.placed, version.settings
    engine, contract = placed.manifest.engine, placed.contract
    batched = bool(version.check.batch_axes) and not any((*version.check.batch_axes, *version.check.output_axes))
    # Triton's max_batch_size is what a client may send at once.
    most = (version.check.max_rows or settings.max_batch_size) if batched else 0
    result: dict[str, Any] = {
        "name": version.name,
        "platform": f"{engine.backend}_{'onnx' if engine.backend == 'onnxruntime' else 'library'}",
        "backend": engine.backend,
        "version_policy": {"latest": {"num_versions": len(traffic.versions)}},
        "max_batch_size": most,
        "input": [_input_config(spec, batched=batched) for spec in contract.inputs],
        "output": [_output_config(spec, batched=batched) for spec in contract.outputs],
        "instance_group": [
            {
                "name": f"{version.name}_0",
                "kind": "KIND_GPU" if engine.device == "cuda" else "KIND_CPU",
                "count": settings.instances,
            }
        ],
        "default_model_filename": engine.variants[0].file,
        "parameters": {
            "execution": {"string_value": settings.execution},
            "threads": {"string_value": str(version.threads)},
            "precision": {"string_value": engine.precision},
        },
    }
    if batched and version.max_batch > 1:
        result["dynamic_batching"] = _batching_config(version)
    return result


def _input_config(spec: InputSpec, *, batched: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": config_type(spec.dtype),
        "format": "FORMAT_NCHW" if spec.image is not None and len(spec.shape) - batched == 3 else "FORMAT_NONE",
        "dims": list(_open_shape(spec.shape))[batched:],
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
    }


def _output_config(spec: OutputSpec, *, batched: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": config_type(spec.dtype),
        "dims": list(_open_shape(spec.shape))[batched:],
        "label_filename": f"{spec.name}.txt" if spec.labels else "",
        "is_shape_tensor": False,
    }


def _batching_config(version: ModelVersion) -> dict[str, Any]:
    settings = version.settings
    leveled = settings.priorities > 1
    return {
        "preferred_batch_size": [version.max_batch],
        "max_queue_delay_microseconds": settings.queue_delay_us,
        "preserve_ordering": False,
        "priority_levels": settings.priorities if leveled else 0,
        "default_priority_level": version.batcher.queueing.default_level if leveled else 0,
        "default_queue_policy": {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": int(settings.timeout_ms * 1000),
            "allow_timeout_override": True,
            "max_queue_size": settings.queue_size,
        },
    }


def datatype(dtype: str) -> str:
    """``"float32"`` -> ``"FP32"``."""
    return NAMES[np.dtype(dtype)]


def config_type(dtype: str) -> str:
    """``"float32"`` -> ``"TYPE_FP32"``."""
    return f"TYPE_{datatype(dtype)}"


def _open_shape(shape: tuple[Size, ...]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in shape)
