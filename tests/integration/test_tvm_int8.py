"""QDQ models as integer arithmetic, each operator within one step of its definition, on every instruction set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from qdq_support import Qdq, as_defined, residual_block
from tvm_support import compiled

from toolchain.host import detect_host
from toolchain.tvm.importer import import_model
from toolchain.tvm.library import Refusal
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes, compile_module

FEATURES = detect_host().cpu_features
pytestmark = pytest.mark.skipif("avx2" not in FEATURES, reason="these tests run AVX2 code on this machine")

X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
V4 = {**X86, "mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}
ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
MACHINES = {
    "vnni512": Machine(V4, "cpu", "x86_64", 512, 32),
    "vnni256": Machine(V4, "cpu", "x86_64", 256, 32),
    "avx2": Machine({**X86, "mcpu": "x86-64-v3"}, "cpu", "x86_64", 256, 16),
    "": Machine(X86, "cpu", "x86_64", 128, 16),
}
RUNNABLE = [name for name in MACHINES if "vnni" not in name or "avx512_vnni" in FEATURES]
FEW = [RUNNABLE[0], ""]
"""For what doesn't depend on the instruction: a machine that has one, and one without."""
A76 = Machine({**ARM, "mcpu": "cortex-a76", "mattr": ["+neon", "+dotprod"]}, "cpu", "aarch64", 128, 32)
I8MM = ["+neon", "+dotprod", "+i8mm"]
V1 = Machine({**ARM, "mcpu": "neoverse-v1", "mattr": I8MM}, "cpu", "aarch64", 128, 32)
A53 = Machine({**ARM, "mcpu": "cortex-a53", "mattr": ["+neon"]}, "cpu", "aarch64", 128, 32)

ARM32 = {"kind": "llvm", "mtriple": "armv7l-linux-gnueabihf", "mfloat-abi": "hard"}
A7 = Machine({**ARM32, "mcpu": "cortex-a7", "mattr": ["+neon"]}, "cpu", "armv7l", 128, 16)


def steps_apart(model: onnx.ModelProto, machine: str, shape: Sequence[int], seed: int = 0) -> int:
    """Most steps between our 8-bit output and the definition's; checks that the values say something."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3
    library, notes = compiled(model, MACHINES[machine])
    assert notes.unscheduled == []
    [have], [want] = library.run([x]), as_defined(model, x)
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    assert want.size < 20 or len(np.unique(want)) > 3
    return int(np.abs(have.astype(int) - want.astype(int)).max())


def asm_of(model: onnx.ModelProto, machine: Machine) -> str:
    executable = compile_module(import_model(model), machine, Notes())
    return "".join(str(m.inspect_source("asm")) for m in [executable.mod, *executable.mod.imports] if "llvm" in m.kind)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[int]]:
    group = draw(st.sampled_from([1, 1, 1, 2, 32]))
    ic = draw(st.sampled_from([1, 3, 4, 5, 16, 35])) if group == 1 else 32
    oc = draw(st.sampled_from([1, 7, 16, 40])) if group == 1 else 32
    kernel = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    size = [draw(st.integers(5, 17)), draw(st.integers(5, 17))]
    shape = [draw(st.integers(1, 2)), ic, *size]
    zero = draw(st.sampled_from([0, 3, 100]))
    q = Qdq(shape, draw(st.sampled_from(["uint8", "uint8", "int8"])), draw(st.integers(0, 99)))
    x = q.quantized("x", 0.04, zero)
    weights, scales = q.weights(oc, ic // group, *kernel, axis=draw(st.sampled_from([0, None])))
    inputs = [x, weights] + ([q.bias(oc, np.float32(0.04) * scales)] if draw(st.booleans()) else [])
    y = q.add(
        "Conv", *inputs, group=group, strides=[draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        pads=[draw(st.integers(0, 2)) for _ in range(4)], dilations=[draw(st.integers(1, 2)), 1],
    )  # fmt: skip
    y = q.add("Relu", y) if draw(st.booleans()) else y
    return q.model(q.add("QuantizeLinear", y, *q.parameters(0.09, draw(st.sampled_from([0, 77]))))), shape


@pytest.mark.parametrize("machine", RUNNABLE)
@given(case=convolutions(), seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_convolutions_are_within_one_step_of_their_definition(
    machine: str, case: tuple[onnx.ModelProto, list[int]], seed: int
) -> None:
    model, shape = case
    assert steps_apart(model, machine, shape, seed) <= 1


@pytest.mark.parametrize("machine", RUNNABLE)
@given(
    rows=st.integers(1, 20), depth=st.sampled_from([1, 3, 8, 30, 64]), columns=st.sampled_from([1, 5, 16, 70]),
    kind=st.sampled_from(["uint8", "int8"]), per_channel=st.booleans(), zero=st.sampled_from([0, 3, 90]),
    gemm=st.booleans(),
)  # fmt: skip
@settings(max_examples=5, deadline=None)
def test_matrix_products_are_within_one_step_of_their_definition(
    machine: str, rows: int, depth: int, columns: int, kind: str, per_channel: bool, zero: int, gemm: bool
) -> None:
    shape = [rows, depth] if gemm else [2, rows, depth]
    q = Qdq(shape, kind, rows)
    x = q.quantized("x", 0.04, zero)
    if gemm:
        weights, scales = q.weights(columns, depth, axis=0 if per_channel else None)
        y = q.add("Gemm", x, weights, q.bias(columns, np.float32(0.04) * scales), transB=1)
    else:
        weights, _ = q.weights(depth, columns, axis=1 if per_channel else None)
        y = q.add("MatMul", x, weights)
    model = q.model(q.add("QuantizeLinear", y, *q.parameters(0.05, 60)))
    assert steps_apart(model, machine, shape) <= 1


@pytest.mark.parametrize("machine", FEW)
@pytest.mark.parametrize("group", [1, 12])
def test_convolutions_of_lines_follow_each_other_in_8_bits(machine: str, group: int, tmp_path: Path) -> None:
    q = Qdq([2, 12, 30])
    first, scales = q.weights(24, 12, 5)
    y = q.quantized(q.add("Relu", q.add("Conv", q.quantized("x"), first, q.bias(24, np.float32(0.05) * scales))))
    second, _ = q.weights(24, 24 // group, 3)
    y = q.add("Conv", y, second, group=group, strides=[2], pads=[1, 2])
    model = q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 50)))
    assert steps_apart(model, machine, [2, 12, 30]) <= 2


@pytest.mark.parametrize("machine", FEW)
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("pads", [[0] * 4, [1, 0, 1, 1]])
def test_average_pooling_is_within_one_step(machine: str, include: int, pads: list[int]) -> None:
    q = Qdq([1, 20, 9, 11])
    y = q.add(
        "AveragePool", q.quantized("x"), kernel_shape=[3, 2], strides=[2, 1], pads=pads, count_include_pad=include
    )
    assert steps_apart(q.model(q.add("QuantizeLinear", y, *q.parameters(0.02, 60))), machine, [1, 20, 9, 11]) <= 1


@pytest.mark.parametrize("machine", FEW)
def test_changes_of_shape_and_other_operators_between_8_bit_values(machine: str) -> None:
    q = Qdq([2, 8, 6, 6])
    y = q.quantized(q.add("Transpose", q.quantized("x"), perm=[0, 2, 3, 1]))
    y = q.quantized(q.add("Slice", y, *(q.constant(np.array([v])) for v in (1, 5, 2))))
    y = q.quantized(q.add("Reshape", y, q.constant(np.array([2, -1]))))
    y = q.quantized(q.add("Sigmoid", q.add("Mul", y, y)), 1 / 255, 0)
    assert steps_apart(q.model(q.add("QuantizeLinear", y, *q.parameters(1 / 200, 7))), machine, [2, 8, 6, 6]) <= 2


@pytest.mark.parametrize("machine", RUNNABLE)
def test_the_largest_values_do_not_saturate(machine: str) -> None:
    """255 * 127 twice is beyond 16 bits."""
    q = Qdq([2, 64])
    x = q.quantized("x", 0.01, 0)
    names = (q.constant(np.full((64, 20), 127, np.int8)), q.constant(np.float32(0.01)), q.constant(np.int8(0)))
    y = q.add("MatMul", x, q.add("DequantizeLinear", *names))
    model = q.model(q.add("QuantizeLinear", y, *q.parameters(1.0, 1)))
    x_value = np.full((2, 64), 9.0, np.float32)
    library, _ = compiled(model, MACHINES[machine])
    assert np.abs(library.run([x_value])[0].astype(int) - as_defined(model, x_value)[0].astype(int)).max() <= 1


@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("machine", RUNNABLE)
def test_a_network_keeps_8_bits_from_its_first_quantization_to_its_last_product(
    machine: str, activation: str, tmp_path: Path
) -> None:
    q, result = residual_block(activation)
    model = q.model(result, "float32")
    library, _ = compiled(model, MACHINES[machine], tmp_path)
    x = np.random.default_rng(1).standard_normal((1, 3, 20, 20)).astype(np.float32)
    [have], [want] = library.run([x]), as_defined(model, x)
    # A step of 0.05 in the mean, times weights of up to 2.5, with some of the 40 channels a step off.
    assert np.abs(have - want).max() <= 0.02 * np.abs(want).max()
    [fused] = tmp_path.glob("*-fuse.py")
    calls = [line for line in fused.read_text().splitlines() if "R.call_tir(" in line]
    floats = [line for line in calls if "out_ty=R.Tensor" in line and 'dtype="float32"' in line]
    assert len(calls) > 5
    assert len(floats) == 1, floats


def small_convolution(activation: str = "uint8", bits: int = 8) -> onnx.ModelProto:
    q = Qdq([1, 16, 8, 8], activation)
    weights, _ = q.weights(32, 16, 3, 3, bits=bits)
    y = q.add("Conv", q.quantized("x"), weights, pads=[1] * 4)
    return q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 5)))


@pytest.mark.parametrize(
    ("machine", "instruction"),
    [
        (MACHINES["vnni512"], "vpdpbusd\t%zmm"), (MACHINES["vnni256"], "vpdpbusd"), (A76, "sdot"), (A53, "smlal"),
    ],
)  # fmt: skip
def test_the_code_has_the_instruction_of_the_profile(machine: Machine, instruction: str) -> None:
    for activation in ("uint8", "int8"):
        text = asm_of(small_convolution(activation), machine)
        assert instruction in text or f"{instruction}\t" in text


@pytest.mark.parametrize(
    ("machine", "instructions"), [(A53, ("smull", "smlal", "sadalp")), (A7, ("vmull.s8", "vmlal.s8", "vpadal.s16"))]
)
def test_without_dot_products_neon_adds_two_products_in_16_bits_unless_both_weights_are_the_lowest(
    machine: Machine, instructions: tuple[str, str, str]
) -> None:
    multiply, both, add = (f"\t{name}\t" for name in instructions)
    for lowest in (-127, -128):
        q = Qdq([4, 16], "int8")
        names = [q.constant(np.full((8, 16), lowest, np.int8)), q.constant(np.float32(7e-4)), q.constant(np.int8(0))]
        y = q.add("Gemm", q.quantized("x"), q.add("DequantizeLinear", *names), transB=1)
        text = asm_of(q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 5))), machine)
        assert multiply in text
        assert add in text
        assert text.count(both) == (text.count(multiply) if lowest == -127 else 0)


def test_sums_of_neon_products_stay_in_registers() -> None:
    """A tile of 7x2 vectors: nothing goes to the stack in the loop that multiplies."""
    q = Qdq([1, 64, 7, 7], "int8")
    weights, _ = q.weights(32, 64, 1, 1)
    y = q.add("Conv", q.quantized("x", 0.04), weights)
    loops = innermost_loops(asm_of(q.model(q.add("QuantizeLinear", y, *q.parameters(0.09, 3))), A53))
    (multiplying,) = (loop for loop in loops if "sadalp" in loop)
    assert multiplying.count("sadalp") % 14 == 0
    assert "[sp" not in multiplying


def innermost_loops(text: str) -> list[str]:
    """Code from each label to the first jump back to it, where no other label is between them."""
    code = re.sub(r"^\.Ltmp\d+:\n", "", text, flags=re.M)
    parts = re.findall(r"^(\.L\w+):(.*?)\n(?=\.L)", code, re.M | re.S)
    return [body.partition(label)[0] for label, body in parts if label in body]


def test_bounds_keep_nan_on_64_bit_arm_by_one_instruction() -> None:
    q = Qdq([1, 16, 9, 9], "int8")
    text = asm_of(q.model(q.add("Relu", "x"), "float32"), A53)
    assert "\tfmax\t" in text
    assert not {"fmaxnm", "fcmgt"} & set(text.split())


def test_matrices_are_multiplied_by_i8mm_only_where_the_profile_has_it() -> None:
    """Pixels two by two, with u8 data as they are; a first layer of few channels and a single row by dot products."""
    texts = {kind: asm_of(small_convolution(kind), V1) for kind in ("uint8", "int8")}
    assert texts["uint8"].count("\tusmmla\t") > 20
    assert texts["int8"].count("\tsmmla\t") > 20
    assert "\tsmmla\t" not in texts["uint8"]
    assert "dot\t" not in texts["uint8"] + texts["int8"]
    assert "mmla" not in asm_of(small_convolution(), A76)
    for rows, instruction in ((1, "usdot"), (8, "usmmla")):
        q = Qdq([rows, 64])
        weights, _ = q.weights(64, 32, axis=1)
        y = q.add("MatMul", q.quantized("x"), weights)
        text = asm_of(q.model(q.add("QuantizeLinear", y, *q.parameters(0.1, 5))), V1)
        assert {name for name in ("usdot", "usmmla") if f"\t{name}\t" in text} == {instruction}


def test_avx2_multiplies_pairs_in_16_bits_only_where_they_fit() -> None:
    full, reduced = (asm_of(small_convolution(bits=bits), MACHINES["avx2"]) for bits in (8, 7))
    assert 0 < reduced.count("vpmaddubsw") < full.count("vpmaddubsw")


@pytest.mark.parametrize("machine", FEW)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 7, 5), (9, 40, 48)])
def test_dynamic_quantization_multiplies_integers(machine: str, rows: int, depth: int, columns: int) -> None:
    q = Qdq([2, rows, depth])
    q.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "scale", "zero"], name="quantize"))
    weights, scales = q.random.integers(-127, 128, (depth, columns)), q.random.uniform(0.001, 0.02, columns)
    total = q.add("Cast", q.add("MatMulInteger", "a", q.constant(weights.astype(np.int8)), "zero"), to=1)
    factor = q.add("Mul", "scale", q.constant(scales.astype(np.float32)))
    model = q.model(q.add("Mul", total, factor), "float32")
    x = np.random.default_rng(0).standard_normal((2, rows, depth)).astype(np.float32)
    library, notes = compiled(model, MACHINES[machine])
    assert "dense int8" in notes.rules.values()
    assert notes.unscheduled == []
    [have], [want] = library.run([x]), as_defined(model, x)
    # The scale is found at run time: a value in the middle between two steps may go either way.
    step = float(np.abs(weights * scales).max()) * 6 / 255
    assert np.abs(have - want).max() <= step


def test_8_bit_weights_under_control_flow_are_refused() -> None:
    q = Qdq([4, 16])
    weights, _ = q.weights(16, 8, axis=1)
    y = q.add("MatMul", q.quantized("x"), weights)
    y = q.add("QuantizeLinear", y, *q.parameters(0.1, 5))
    branches = []
    for name, value in (("then", 1), ("else", 0)):
        nodes = [helper.make_node("Sub", [y, f"one_{name}"], [f"z_{name}"])]
        one = numpy_helper.from_array(np.array(value, np.uint8), f"one_{name}")
        result = helper.make_tensor_value_info(f"z_{name}", TensorProto.UINT8, [4, 8])
        branches.append(helper.make_graph(nodes, name, [], [result], [one]))
    positive = q.add("Greater", q.add("ReduceSum", "x", keepdims=0), q.constant(np.float32(0)))
    z = q.add("If", positive, then_branch=branches[0], else_branch=branches[1])
    with pytest.raises(Refusal, match="8-bit weights in a model with control flow"):
        compile_module(import_model(q.model(z)), MACHINES["avx2"], Notes())


@pytest.mark.parametrize("kind", ["int16", "uint16", "int8", "uint8"])
def test_quantization_rounds_half_to_even_and_saturates(kind: str) -> None:
    q = Qdq([40], kind)
    model = q.model(q.add("QuantizeLinear", "x", *q.parameters(0.5, 3)))
    x = np.concatenate([np.arange(-4.75, 4.75, 0.25), [1e6, -1e6]]).astype(np.float32)
    library, _ = compiled(model, MACHINES["avx2"])
    np.testing.assert_array_equal(library.run([x])[0], as_defined(model, x)[0])


def test_weights_without_quantized_data_are_refused_by_name() -> None:
    q = Qdq([1, 16, 8, 8])
    weights, _ = q.weights(32, 16, 3, 3)
    model = q.model(q.add("Conv", "x", weights), "float32")
    with pytest.raises(Refusal, match=r"operator Conv \(node 'v1'\): its weights are quantized, its data are not"):
        import_model(model)
