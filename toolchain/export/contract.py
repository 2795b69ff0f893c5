"""contract.json: what a model takes and gives, and a check of a stored ONNX model against it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import Signature

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Observation = tuple[Mapping[str, int], Mapping[str, tuple[int, ...]]]
"""Sizes of the named dimensions in one run, and the shape of each output in it."""

SCHEMA = 1


def make_contract(path: Path, signature: Signature, preprocessing: str) -> dict[str, Any]:
    """The contract of the stored model, its inputs as declared, its outputs as shape inference knows them.

    An output axis is an int, the name of a declared dimension, or null where it is neither.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    inputs = [spec.to_json() for spec in signature.inputs]
    dims = {dim.name: dim.to_json() for dim in signature.used_dims}
    outputs = [_output(value, dims) for value in model.graph.output]
    return {"schema": SCHEMA, "inputs": inputs, "outputs": outputs, "dims": dims, "preprocessing": preprocessing}


def name_output_axes(model: ir.Model, signature: Signature, observed: Sequence[Observation]) -> bool:
    """Name output axes that shape inference left open after the dimension whose size they had in every run.

    An axis gets a name only when one dimension alone fits, and that dimension was run at several sizes.

    Args:
        model: changed in place.
        signature: the declared dimensions.
        observed: per run, the sizes of the dimensions and the shape of each output.

    Returns:
        Whether anything was named.
    """
    import onnx_ir as ir

    changed = False
    for value in model.graph.outputs:
        name, shapes = value.name or "", [shapes[value.name or ""] for _, shapes in observed]
        axes: list[Any] = list(value.shape) if value.shape is not None else [None] * len(shapes[0])
        for axis, known in enumerate(axes):
            if isinstance(known, int) or (known is not None and str(known) in signature.dims):
                continue
            fitting = [
                dim.name
                for dim in signature.used_dims
                if len({sizes[dim.name] for sizes, _ in observed}) > 1
                and all(shapes[name][axis] == sizes[dim.name] for sizes, shapes in observed)
            ]
            if len(fitting) == 1:
                axes[axis], changed = fitting[0], True
        value.shape = ir.Shape(axes)
    return changed


def differences(path: Path, contract: dict[str, Any]) -> list[str]:
    """How the stored model's inputs and outputs differ from the contract; empty when it keeps it."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found: list[str] = []
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        weights = {tensor.name for tensor in graph.initializer}
        actual = [_output(v, contract["dims"]) for v in values if v.name not in weights]
        expected = contract[kind]
        if [v["name"] for v in actual] != [v["name"] for v in expected]:
            found.append(f"{kind} are {[v['name'] for v in actual]} instead of {[v['name'] for v in expected]}")
            continue
        for got, want in zip(actual, expected, strict=True):
            shape = [_frozen(axis, contract["dims"]) for axis in want["shape"]]
            if got["dtype"] != want["dtype"] or not _same_shape(got["shape"], shape):
                found.append(
                    f"{kind[:-1]} {want['name']!r} is {got['dtype']}{got['shape']} instead of {want['dtype']}{shape}"
                )
    return found


def check_model(path: Path, code: ExitCode) -> None:
    """onnx.checker with full shape inference, by path (so also beyond 2 GB).

    Raises:
        ToolchainError: with ``code`` when the model is not valid.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ToolchainError(
            f"the converted model is not valid ONNX: {' '.join(str(error).split())[:300]}",
            where=path.name,
            hint="this is a fault of the converter: report it with the output of --debug",
            code=code,
            debug=traceback.format_exc(),
        ) from error


def _output(value: onnx.ValueInfoProto, dims: dict[str, Any]) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    shape: list[int | str | None] = []
    for dim in tensor.shape.dim:
        known = dim.dim_param if dim.dim_param in dims else None
        shape.append(dim.dim_value if dim.HasField("dim_value") else known)
    return {"name": value.name, "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), "shape": shape}


def _frozen(axis: int | str | None, dims: dict[str, Any]) -> int | str | None:
    if isinstance(axis, str) and dims[axis]["min"] == dims[axis]["max"]:
        return int(dims[axis]["min"])
    return axis


def _same_shape(got: list[Any], want: list[Any]) -> bool:
    # An unknown axis (None) may become known, never a named or fixed one another.
    return len(got) == len(want) and all(b is None or a == b for a, b in zip(got, want, strict=True))
