"""Sizes as C expressions over a model's dynamic dimensions: plain numbers where nothing is dynamic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.tvm.library import load_tvm

Expression = int | str
"""A size: a number, or C text of type ``int64_t`` over the variables ``d0``, ``d1``, ..."""


class PlanError(Exception):
    """The function does something that a plan of kernel calls can't; the text says what."""


def product(factors: Sequence[Expression]) -> Expression:
    """The product; C text if any factor is."""
    number = 1
    texts = []
    for factor in factors:
        if isinstance(factor, int):
            number *= factor
        else:
            texts.append(factor)
    if not texts:
        return number
    return " * ".join([*texts, *([f"INT64_C({number})"] if number != 1 else [])])


def c_expression(size: Any, dims: Mapping[Any, int]) -> Expression:
    """``size``, an integer expression of TVM's, in C.

    Args:
        size: over the variables in ``dims``.
        dims: variable -> its number.

    Raises:
        PlanError: it holds something else.
    """
    tvm = load_tvm()
    tirx = tvm.tirx
    if isinstance(size, tirx.IntImm):
        return int(size.value)
    if isinstance(size, int):
        return size
    if isinstance(size, tvm.ir.Var):
        if size not in dims:
            raise PlanError(f"{size} is no dimension of an input")
        return f"d{dims[size]}"
    if isinstance(size, tirx.Cast):
        return c_expression(size.value, dims)
    names = {
        tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*",
        tirx.FloorDiv: "tc_floor_div", tirx.FloorMod: "tc_floor_mod", tirx.Min: "tc_min", tirx.Max: "tc_max",
    }  # fmt: skip
    for kind, name in names.items():
        if isinstance(size, kind):
            left, right = (_text(c_expression(part, dims)) for part in (size.a, size.b))
            return f"({left} {name} {right})" if len(name) == 1 else f"{name}({left}, {right})"
    raise PlanError(f"the size {size} is of a kind that has no form in C")


def _text(expression: Expression) -> str:
    return f"INT64_C({expression})" if isinstance(expression, int) else expression
