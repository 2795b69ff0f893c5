"""Folding of constants that numpy does not know, and the test of what fits 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolchain.tvm.graph.constants import fold_constants, fold_remaining
from toolchain.tvm.graph.values import constant_of, operator_of
from toolchain.tvm.library import load_tvm
from toolchain.tvm.loops.conv_int8 import FITS, SATURATES, pairs_fit

VALUES = np.array([0.0, 1.0, 2.0], np.float32)


def _module(constant: bool) -> Any:
    """``x + exp(values)``, or ``x + exp(x)``."""
    load_tvm()
    from tvm import relax

    x = relax.Var("x", relax.TensorType((3,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            values = builder.emit(relax.const(VALUES, "float32")) if constant else x
            output = builder.emit_output(relax.op.add(x, builder.emit(relax.op.exp(values))))
        builder.emit_func_output(output)
    return builder.get()


def _bindings(module: Any) -> list[Any]:
    return [binding.value for block in module["main"].body.blocks for binding in block.bindings]


def test_what_numpy_does_not_know_is_folded_by_tvm() -> None:
    tvm = load_tvm()

    with tvm.target.Target("llvm"):
        folded = fold_remaining()(fold_constants()(_module(constant=True)))

    calls = [value for value in _bindings(folded) if operator_of(value)]
    assert [operator_of(call) for call in calls] == ["relax.add"]
    constants = [constant_of(value) for value in (*calls[0].args, *_bindings(folded))]
    found = [value for value in constants if value is not None]
    assert any(np.allclose(value, np.exp(VALUES)) for value in found)


def test_a_module_in_which_every_call_reads_an_input_is_left_as_it_is() -> None:
    tvm = load_tvm()
    module = _module(constant=False)

    with tvm.target.Target("llvm"):
        folded = fold_remaining()(module)

    assert [operator_of(value) for value in _bindings(folded)] == ["relax.exp", "relax.add"]
    tvm.ir.assert_structural_equal(folded, module)


@pytest.mark.parametrize(
    ("pair", "expected"),
    [((64, 64), FITS), ((64, 65), SATURATES), ((127, -128), FITS), ((-64, -64), FITS), ((-64, -65), SATURATES)],
)
def test_a_pair_of_weights_fits_while_255_times_their_sum_fits_16_bits(pair: tuple[int, int], expected: int) -> None:
    packed = np.zeros((2, 3, 4), np.int8)
    packed[1, 2, 2:] = pair

    assert pairs_fit(packed) == expected
    assert pairs_fit(np.roll(packed, 1, axis=-1)) == FITS  # no neighbours: each is alone in its pair
