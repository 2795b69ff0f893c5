"""Size variants: one engine for all sizes, or one per combination of buckets, and models with sizes fixed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import Signature
from toolchain.tvm.library import Refusal, one_line

if TYPE_CHECKING:
    import onnx

MAX_VARIANTS = 8
"""Most engines that one candidate may need: each carries all weights."""


def bucket_variants(signature: Signature, why: str) -> list[dict[str, int]]:
    """Every combination of buckets of the dynamic dimensions, the largest last.

    Args:
        signature: the contract's inputs and dimensions.
        why: why the dynamic model did not do, for the message.

    Raises:
        Refusal: a dynamic dimension has no buckets, or there are more than :data:`MAX_VARIANTS` combinations.
    """
    dims = signature.used_dims
    for dim in dims:
        if not dim.buckets:
            raise Refusal(
                f"dynamic dimension {dim.name!r} can't be imported and has no buckets in "
                f"[model.dims.{dim.name}] ({why})"
            )
    count = 1
    for dim in dims:
        count *= len(set(dim.buckets))
    if count > MAX_VARIANTS:
        listed = " x ".join(f"{len(set(d.buckets))} of {d.name!r}" for d in dims)
        raise Refusal(f"{listed} buckets make {count} engines; at most {MAX_VARIANTS} are allowed ({why})")
    combinations = itertools.product(*(sorted(set(d.buckets)) for d in dims))
    return [dict(zip((d.name for d in dims), sizes, strict=True)) for sizes in combinations]


def exact_dims(signature: Signature) -> list[str]:
    """Bucketed dimensions that can't be filled up, so an input must have exactly a bucket's size.

    A dimension can be filled when its rows are independent or when each input that bears it has a pad value.
    """
    return [
        dim.name
        for dim in signature.used_dims
        if not dim.batch and any(dim.name in spec.shape and spec.pad is None for spec in signature.inputs)
    ]


def variant_name(sizes: Mapping[str, int]) -> str:
    """E.g. ``"batch-8_sequence-64"``; an empty string for the dynamic engine."""
    return "_".join(f"{name}-{size}" for name, size in sizes.items())


def conform_inputs(model: onnx.ModelProto, signature: Signature) -> None:
    """Gives the graph's inputs the contract's order and dimension names, in place.

    Raises:
        ToolchainError: the graph's inputs are not those of the contract.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    graph_inputs = {i.name: i for i in model.graph.input if i.name not in initializers}
    if set(graph_inputs) != set(signature.names):
        raise ToolchainError(
            f"the graph has the inputs {sorted(graph_inputs)}, the contract {sorted(signature.names)}",
            where="model.onnx",
            code=ExitCode.COMPILE,
        )
    ordered = [graph_inputs[name] for name in signature.names]
    for info, spec in zip(ordered, signature.inputs, strict=True):
        dims = info.type.tensor_type.shape.dim
        if len(dims) != len(spec.shape):
            raise ToolchainError(
                f"input {spec.name!r} has {len(dims)} axes in the graph, {len(spec.shape)} in the contract",
                where="model.onnx",
                code=ExitCode.COMPILE,
            )
        for dim, axis in zip(dims, spec.shape, strict=True):
            if isinstance(axis, int):
                dim.dim_value = axis
            else:
                dim.dim_param = axis
    copies = [type(info).FromString(info.SerializeToString()) for info in ordered]
    del model.graph.input[:]
    model.graph.input.extend(copies)


def fix_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy of ``model`` with the named dimensions fixed and what then is constant folded.

    Raises:
        Refusal: the sizes don't fit the graph.
    """
    import onnx
    import onnxslim
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    try:
        for name, size in sizes.items():
            make_dim_param_fixed(fixed.graph, name, size)
        # Shapes noted for the dynamic graph would contradict or hide the fixed ones.
        del fixed.graph.value_info[:]
        slim: onnx.ModelProto = onnxslim.slim(fixed)
    except Exception as error:
        raise Refusal(f"the sizes {variant_name(sizes)} can't be fixed: {one_line(error)}") from error
    names = [i.name for i in model.graph.input]
    if [i.name for i in slim.graph.input] != names:
        raise Refusal(f"with the sizes {variant_name(sizes)} fixed, inputs of the graph drop out")
    return slim
