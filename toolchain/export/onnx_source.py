"""An ``.onnx`` file as a model source: its inputs against the recipe's, its opset, its session."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.specs import InputSpec, Signature

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU with all graph optimizations off: the file as it is written.

    Raises:
        ToolchainError: EXPORT when ONNX Runtime refuses the file.
    """
    from toolchain.graph.numeric import session

    try:
        return session(path)
    except Exception as error:
        message = " ".join(str(error).split())
        raise ToolchainError(
            f"ONNX Runtime can't load the file: {message[:300]}",
            where=path.name,
            hint="run onnx.checker.check_model(path, full_check=True) on it",
            code=ExitCode.EXPORT,
            debug=traceback.format_exc(),
        ) from error


def resolve_signature(path: Path, declared: Signature) -> Signature:
    """The declared inputs, compared with the file's; or the file's, when none are declared.

    Raises:
        ToolchainError: BAD_RECIPE when they differ, or a dynamic dimension of the file has no range;
            EXPORT when the file can't be read.
    """
    found = _file_inputs(_load_graph(path))
    if not declared.inputs:
        return Signature.of(_named(found, declared), list(declared.dims.values()))
    by_name = {spec.name: spec for spec in found}
    for spec in declared.inputs:
        if spec.name not in by_name:
            raise _bad(
                f"the file has no input {spec.name!r}{did_you_mean(spec.name, by_name)}",
                f"its inputs: {', '.join(s.describe() for s in found)}",
            )
        _compare(spec, by_name[spec.name])
    if missing := [name for name in by_name if name not in declared.names]:
        raise _bad(f"the file's input {missing[0]!r} is not declared", "declare all inputs, or none")
    return declared


def load_model(path: Path, opset: int) -> tuple[ir.Model, str]:
    """The file's graph, with shapes inferred; brought up to ``opset``, or why it was kept as it is ("": converted).

    A file of a later opset is kept: downgrading is not reliable.
    """
    import onnx
    import onnx_ir as ir

    proto = onnx.load(path, load_external_data=False)
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    kept = ""
    if version > opset:
        kept = f"opset {version} is later than {opset}"
    elif version < opset:
        try:
            converted = onnx.version_converter.convert_version(onnx.load(path), opset)
            onnx.checker.check_model(converted)
            proto = converted
        except Exception as error:
            kept = f"opset {version} can't be converted to {opset}: {' '.join(str(error).split())[:120]}"
    with contextlib.suppress(Exception):
        # Only fills in shapes of inner values; a graph that inference can't follow stays as it is.
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for tensor in proto.graph.initializer:
        tensor.ClearField("doc_string")
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model, kept


def _load_graph(path: Path) -> onnx.GraphProto:
    import onnx

    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise ToolchainError(
            f"can't be read as an ONNX file: {' '.join(str(error).split())[:200]}",
            where=path.name,
            hint="copy or write the file again",
            code=ExitCode.BAD_RECIPE,
            debug=traceback.format_exc(),
        ) from error


def _file_inputs(graph: onnx.GraphProto) -> list[InputSpec]:
    import onnx

    weights = {tensor.name for tensor in graph.initializer}
    found = []
    for value in graph.input:
        if value.name in weights:
            continue
        if not value.type.HasField("tensor_type"):
            raise _bad(f"the file's input {value.name!r} is not a tensor", "")
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        found.append(InputSpec(value.name, dtype, shape))
    return found


def _named(found: list[InputSpec], declared: Signature) -> list[InputSpec]:
    for spec in found:
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in declared.dims:
                named = axis.isidentifier() and not axis.startswith("unk__")
                raise _bad(
                    f"the file's input {spec.describe()} has a dynamic dimension with no range",
                    f"add [model.dims.{axis}] with min and max"
                    if named
                    else "declare [[model.inputs]] with a name for it, and [model.dims.NAME] with min and max",
                )
    return found


def _compare(spec: InputSpec, found: InputSpec) -> None:
    if spec.dtype != found.dtype or len(spec.shape) != len(found.shape):
        raise _bad(f"declared {spec.describe()}; the file takes {found.describe()}", "correct [[model.inputs]]")
    for wanted, axis in zip(spec.shape, found.shape, strict=True):
        # A declared size may fix a dimension that the file leaves open; never the other way round.
        if isinstance(axis, int) and wanted != axis:
            raise _bad(
                f"declared {spec.describe()}; the file takes {found.describe()}",
                f"the file fixes {axis} where {wanted!r} is declared",
            )


def _bad(what: str, hint: str) -> ToolchainError:
    return ToolchainError(what, where="model.inputs", hint=hint, code=ExitCode.BAD_RECIPE)
