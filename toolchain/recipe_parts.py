"""The tables of a recipe; :mod:`toolchain.recipe` puts them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from toolchain.config_errors import refuse
from toolchain.config_types import (
    FUNCTION_PATTERN,
    Count,
    Distinct,
    Flag,
    FunctionRef,
    NonEmpty,
    NotNegative,
    Number,
    Positive,
    PrecisionName,
    RelativePath,
    Section,
    Share,
    split_function,
)

METRICS = ("top1", "topk", "mae", "cosine", "f1")
DType = Literal["float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


def source_kind(source: str) -> Literal["function", "exported_program", "onnx"] | None:
    """What a model source is: a function giving a module, a ``.pt2`` file, an ``.onnx`` file, or neither."""
    if split_function(source):
        return "function"
    if ":" in source:
        return None
    return "exported_program" if source.endswith(".pt2") else "onnx" if source.endswith(".onnx") else None


def _source(value: str) -> str:
    if source_kind(value) is None:
        raise refuse("'file.py:function' returning an nn.Module, an .onnx file or a .pt2 file")
    return value


def _axis(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise refuse("a size of at least 1, or the name of a dimension under [model.dims]")


def _metric_kind(value: str) -> str:
    if value not in METRICS and split_function(value) is None:
        raise refuse(f"{', '.join(repr(name) for name in METRICS)} or 'file.py:function'", METRICS)
    return value


Axis = Annotated[
    int | str,
    BeforeValidator(_axis),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "minLength": 1}]}),
]
ModelSource = Annotated[str, AfterValidator(_source)]
MetricKind = Annotated[
    str,
    AfterValidator(_metric_kind),
    WithJsonSchema({"anyOf": [{"enum": list(METRICS)}, {"type": "string", "pattern": f"^{FUNCTION_PATTERN}$"}]}),
]


class ImageValues(Section):
    """How ``toolchain run`` makes an input of an image file: (pixel * scale - mean) / std."""

    scale: Number | None = Field(None, description="factor of the pixels 0..255; 1/255 for floats, else 1 if absent")
    mean: tuple[Number, ...] = Field((), description="subtracted after scaling: one value, or one for each channel")
    std: tuple[Number, ...] = Field((), description="divided by at last: one value, or one for each channel")
    invert: Flag = Field(False, description="whether pixels are inverted first: 255 - pixel")


class Input(Section):
    """One model input."""

    name: NonEmpty = Field(description="name of the input, as the bundle's user will give it")
    dtype: DType = Field(description="element type, e.g. 'float32'")
    shape: tuple[Axis, ...] = Field(description="a list of sizes and names of dimensions, e.g. ['batch', 1, 8, 8]")
    pad: Number | None = Field(None, description="value to fill up to a bucket with; without it, it is not filled up")
    low: Number | None = Field(
        None, description="lowest value of random inputs; whole numbers need it and are held to it"
    )
    high: Number | None = Field(None, description="highest value of random inputs, inclusive; it binds whole numbers")
    image: ImageValues | None = Field(None, description="how an image file becomes this input")


class Dim(Section):
    """A named dynamic dimension."""

    min: Positive = Field(1, description="smallest size")
    max: Positive = Field(description="largest size, a whole number of at least 1")
    batch: Flag = Field(False, description="whether rows are independent of each other: may be padded and split")
    buckets: Annotated[tuple[Positive, ...], Distinct] = Field(
        (), description="sizes that engines with fixed shapes are compiled for"
    )
    example: Positive | None = Field(None, description="size used in the example inputs of the export")


class Model(Section):
    """Where the model comes from and what goes in and out."""

    source: ModelSource = Field(description="'file.py:function', an .onnx file or a .pt2 file")
    checkpoint: RelativePath | None = Field(None, description="weights: .safetensors, or a state dict of torch.save")
    example_inputs: FunctionRef | None = Field(None, description="'file.py:function' giving a tuple or dict of tensors")
    opset: Literal[18] = Field(18, description="ONNX operator set: 18")
    inputs: tuple[Input, ...] = Field((), description="the model's inputs, in order")
    outputs: Annotated[tuple[NonEmpty, ...], Distinct] = Field((), description="names of the outputs, in order")
    dims: Mapping[str, Dim] = Field(default_factory=dict, description="dynamic dimensions by name")
    labels: Mapping[str, RelativePath] = Field(
        default_factory=dict, description="output -> text file with the name of each class, one a line"
    )
    preprocessing: str = Field("", description="how to make inputs from raw data, in words; goes into the contract")


class Data(Section):
    """The functions that yield data, and how many samples to take."""

    calibration: FunctionRef | None = Field(None, description="'file.py:function' yielding calibration batches")
    evaluation: FunctionRef | None = Field(None, description="'file.py:function' yielding evaluation batches")
    calibration_limit: Positive | None = Field(None, description="most calibration samples to use")
    evaluation_limit: Positive | None = Field(None, description="most evaluation samples to use")


class Metric(Section):
    """How accuracy is measured on the evaluation data."""

    kind: MetricKind = Field(description="'top1', 'topk', 'mae', 'cosine', 'f1' or 'file.py:function'")
    k: Positive | None = Field(None, description="for 'topk': among how many the label must be")
    output: NonEmpty | None = Field(None, description="which output is scored; the first if not given")
    higher_is_better: Flag | None = Field(None, description="for 'file.py:function' only; true if not given")


class Quantize(Section):
    """Which precisions are tried, and how."""

    precisions: Annotated[tuple[PrecisionName, ...], Distinct, Field(min_length=1)] | None = Field(
        None, description="precisions to try; those of the target if not given"
    )
    method: Literal["minmax", "percentile", "entropy"] = Field("minmax", description="how value ranges are calibrated")
    percentile: Annotated[float, Field(strict=True, gt=50, le=100)] | None = Field(
        None, description="for method 'percentile'; 99.99 if not given"
    )
    exclude: Annotated[tuple[NonEmpty, ...], Distinct] = Field((), description="names of nodes that stay float")
    max_float_layers: Count | None = Field(None, description="for 'int8-mixed': most layers that may stay float")
    require: PrecisionName | None = Field(None, description="a precision that must be the one chosen")


class Measure(Section):
    """How latency and memory are measured."""

    shapes: Mapping[str, Positive] = Field(default_factory=dict, description="size of each dynamic dimension")
    runs: Positive = Field(50, description="timed runs")
    warmup: Count = Field(5, description="runs before the timed ones")
    max_seconds: Annotated[float, Field(strict=True, gt=0)] = Field(20.0, description="time after which timing stops")
    threads: Count = Field(0, description="threads of the engine; 0 for all cores")


class Tvm(Section):
    """Settings of TVM's engines."""

    records: RelativePath | None = Field(
        None, description="file of tuning records; if not given, the one beside the recipe that ends in .tune.toml"
    )


class GateLimits(Section):
    """Limits that fail a build; one that is not given is not checked."""

    cosine: Annotated[float, Field(strict=True, ge=-1, le=1)] | None = Field(
        None, description="lowest cosine similarity of each output to the original's"
    )
    max_abs_error: NotNegative | None = Field(None, description="largest absolute error against the original")
    max_rel_error: NotNegative | None = Field(None, description="largest relative error against the original")
    agreement: Share | None = Field(None, description="lowest share of rows whose largest output is the original's")
    accuracy_drop: NotNegative | None = Field(None, description="largest absolute loss of the metric")
    min_accuracy: Number | None = Field(None, description="worst value of the metric itself")
    latency_ms: NotNegative | None = Field(None, description="largest median latency in milliseconds")
    latency_p95_ms: NotNegative | None = Field(None, description="largest 95th percentile of latency in milliseconds")
    memory_mb: NotNegative | None = Field(None, description="largest peak memory in megabytes")
    size_mb: NotNegative | None = Field(None, description="largest size of the engine's files in megabytes")


class TargetGates(GateLimits):
    """Limits of one target, in place of the general ones."""

    unmeasured: Literal["fail", "allow"] | None = Field(None, description="'fail' or 'allow'")


class Gates(GateLimits):
    """All limits.  ``targets`` holds the overrides by target name."""

    unmeasured: Literal["fail", "allow"] = Field(
        "fail", description="what becomes of a limit whose figure cannot be measured for the target"
    )
    targets: Mapping[str, TargetGates] = Field(default_factory=dict, description="overrides by target name")
