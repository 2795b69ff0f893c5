"""Size variants."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import DimSpec, InputSpec, Signature
from toolchain.tvm.library import Refusal
from toolchain.tvm.sizes import bucket_variants, conform_inputs, exact_dims, fix_sizes, variant_name


def signature(
    pad: float | None = 0, batch: tuple[int, ...] = (1, 8), sequence: tuple[int, ...] = (16, 64)
) -> Signature:
    ids = InputSpec("ids", "int64", ("batch", "sequence"), pad)
    scale = InputSpec("scale", "float32", ("batch",))
    dims = [DimSpec("batch", 1, 8, True, batch), DimSpec("sequence", 1, 64, False, sequence)]
    return Signature.of([ids, scale], dims)


def model() -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["b"]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"]),
    ]
    nodes = [
        helper.make_node("Cast", ["ids"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]),
        helper.make_node("Mul", ["t", "scale"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", "b"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_variants_are_all_combinations_of_buckets_in_order() -> None:
    assert [variant_name(sizes) for sizes in bucket_variants(signature(), "why")] == [
        "batch-1_sequence-16", "batch-1_sequence-64", "batch-8_sequence-16", "batch-8_sequence-64"
    ]  # fmt: skip


def test_a_dimension_without_buckets_is_named_with_its_recipe_key() -> None:
    with pytest.raises(Refusal, match=r"'sequence' can't be imported and has no buckets in \[model.dims.sequence\]"):
        bucket_variants(signature(sequence=()), "why")


def test_too_many_combinations_are_refused_with_the_count() -> None:
    with pytest.raises(Refusal, match="3 of 'batch' x 3 of 'sequence' buckets make 9 engines; at most 8"):
        bucket_variants(signature(batch=(1, 2, 4), sequence=(16, 32, 64)), "why")


def test_only_a_dimension_that_cannot_be_filled_needs_exact_sizes() -> None:
    assert exact_dims(signature(pad=0)) == []
    assert exact_dims(signature(pad=None)) == ["sequence"]


def test_inputs_get_the_contract_order_and_dimension_names() -> None:
    graph_model = model()
    conform_inputs(graph_model, signature())
    assert [i.name for i in graph_model.graph.input] == ["ids", "scale"]
    assert [d.dim_param for d in graph_model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "sequence"]


def test_inputs_that_are_not_the_contracts_are_an_error() -> None:
    other = Signature.of([InputSpec("image", "float32", (1,))], [])
    with pytest.raises(ToolchainError, match=r"\['ids', 'scale'\], the contract \['image'\]") as caught:
        conform_inputs(model(), other)
    assert caught.value.code == ExitCode.COMPILE


def test_fixed_sizes_leave_the_dynamic_model_as_it_was() -> None:
    dynamic = model()
    conform_inputs(dynamic, signature())
    before = dynamic.SerializeToString(deterministic=True)
    fixed = fix_sizes(dynamic, {"batch": 8, "sequence": 16})
    assert [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim] == [8, 16]
    assert dynamic.SerializeToString(deterministic=True) == before
