"""Activations between two quantized tensors as tables of 256 bytes: the definition's values, in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from qdq_support import Qdq, as_defined
from test_tvm_int8 import FEATURES, MACHINES, X86, asm_of
from tvm_support import compiled

from toolchain.tvm.machine import Machine

pytestmark = pytest.mark.skipif("avx2" not in FEATURES, reason="these tests run AVX2 code on this machine")
KINDS = {**MACHINES, "vbmi": Machine({**X86, "mcpu": "znver4"}, "cpu", "x86_64", 512, 32)}
NEEDS = {"vnni512": "avx512_vnni", "vnni256": "avx512_vnni", "vbmi": "avx512_vbmi"}
RUNNABLE = [name for name in KINDS if NEEDS.get(name, "avx2") in FEATURES]
INSTRUCTIONS = {"vbmi": ("vpermi2b", "vpermt2b"), "vnni512": ("vpermi2w", "vpermt2w")}


def gelu(q: Qdq, x: str) -> str:
    """By its parts, each of which is quantized."""
    scaled = q.quantized(q.add("Erf", q.add("Div", x, q.constant(np.float32(1.4142135)))), 0.0079, 127)
    scaled = q.quantized(q.add("Add", scaled, q.constant(np.float32(1))), 0.0079, 0)
    return q.add("Mul", q.add("Mul", x, scaled), q.constant(np.float32(0.5)))


def silu(q: Qdq, x: str) -> str:
    return q.add("Mul", x, q.quantized(q.add("Sigmoid", x), 1 / 256, 0))


def hard_swish(q: Qdq, x: str) -> str:
    return q.add("HardSwish", x)


def tanh(q: Qdq, x: str) -> str:
    return q.add("Tanh", x)


def all_codes(
    activation: Callable[[Qdq, str], str], kind: str, columns: int = 37
) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model of (rows, columns) values, of which the input has every code at least once."""
    rows, scale, zero = 256 // columns + 1, 0.047, 11
    q = Qdq([rows, columns], kind)
    low = int(np.iinfo(kind).min)
    codes = np.arange(rows * columns, dtype=np.float32) % 256 + low
    x = ((codes - zero) * np.float32(scale)).reshape(rows, columns)
    made = activation(q, q.quantized("x", scale, zero))
    return q.model(q.add("QuantizeLinear", made, *q.parameters(0.031, 5))), x


@pytest.mark.parametrize("activation", [gelu, silu, tanh, hard_swish])
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_every_code_gives_what_the_operators_give(activation: Callable[[Qdq, str], str], kind: str) -> None:
    for columns in (37, 64):
        model, x = all_codes(activation, kind, columns)
        [want] = as_defined(model, x)
        assert len(np.unique(want)) > 20
        for name in RUNNABLE:
            library, _ = compiled(model, KINDS[name])
            [have] = library.run([x])
            assert np.abs(have.astype(int) - want.astype(int)).max() <= 1, name


def activated_product(kind: str = "uint8") -> onnx.ModelProto:
    q = Qdq([5, 32], kind)
    weights, _ = q.weights(32, 64, axis=1)
    product = q.quantized(q.add("MatMul", q.quantized("x", 0.04, 100), weights), 0.08, 120)
    return q.model(q.add("QuantizeLinear", gelu(q, product), *q.parameters(0.05, 10)))


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_product_looks_its_activation_up_and_computes_no_function(name: str, tmp_path: Path) -> None:
    model = activated_product()
    library, notes = compiled(model, KINDS[name], tmp_path)
    assert any("dense" in kernel and "lookup" in kernel for kernel in notes.rules), "fused behind the product"
    (functions,) = tmp_path.glob("*-fuse.py")
    assert "erf" not in functions.read_text()
    x = np.random.default_rng(3).standard_normal((5, 32)).astype(np.float32) * 3
    [have], [want] = library.run([x]), as_defined(model, x)
    assert np.abs(have.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_whole_vectors_are_looked_up_where_the_target_permutes_registers(name: str) -> None:
    assembly = asm_of(activated_product(), KINDS[name])
    assert any(instruction in assembly for instruction in INSTRUCTIONS[name])


def test_what_is_cheap_to_compute_is_computed() -> None:
    q = Qdq([5, 32])
    x = q.quantized("x", 0.04, 100)
    model = q.model(q.add("QuantizeLinear", q.add("Mul", x, q.constant(np.float32(2))), *q.parameters(0.09, 3)))
    for machine in KINDS.values():
        assert not any("lookup" in kernel for kernel in compiled(model, machine)[1].rules)
