"""The polynomials that stand for exp, log, erf, tanh and the logistic function, compiled and run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from toolchain.tvm import transcendental
from toolchain.tvm.library import load_tvm

LENGTH = 1 << 16
NAMES = ("exp", "log", "erf", "tanh", "sigmoid")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    tvm = load_tvm()
    from tvm import te

    def nest(name: str) -> Any:
        x = te.placeholder((LENGTH,), name="x")
        y = te.compute((LENGTH,), lambda i: getattr(te, name)(x[i]), name="y")
        return te.create_prim_func([x, y]).with_attr("global_symbol", name)

    module = tvm.IRModule({name: nest(name) for name in NAMES})
    module = transcendental.vector_functions()(module)
    text = str(module.script())
    assert not any(f"T.{name}(" in text for name in NAMES)
    library = tvm.compile(module, target="llvm")
    return {name: library[name] for name in NAMES}


def run(function: Any, x: np.ndarray) -> np.ndarray:
    tvm = load_tvm()
    padded = np.zeros(LENGTH, np.float32)
    padded[: x.size] = x
    out = tvm.runtime.tensor(np.zeros(LENGTH, np.float32))
    function(tvm.runtime.tensor(padded), out)
    return np.asarray(out.numpy()[: x.size])


def exact(function: Callable[[float], float], x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array([function(float(v)) for v in x])


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


CASES = [
    ("exp", lambda x: math.exp(min(x, 700)), (-87.0, 88.0), 4),
    ("erf", math.erf, (-6.0, 6.0), 8),
    ("tanh", math.tanh, (-12.0, 12.0), 8),
]


@pytest.mark.parametrize(("name", "function", "bounds", "ulps"), CASES, ids=[case[0] for case in CASES])
def test_values_are_within_a_few_units_in_the_last_place(
    compiled: dict[str, Any], name: str, function: Callable[[float], float], bounds: tuple[float, float], ulps: int
) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(*bounds, 30000), rng.standard_normal(30000) * 0.01]).astype(np.float32)
    want = exact(function, x)
    error = np.abs(run(compiled[name], x) - want) / np.spacing(np.abs(want).astype(np.float32))
    assert error.max() <= ulps


def test_logarithms_of_all_sizes_are_within_two_units_in_the_last_place(compiled: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    spread = 2.0 ** rng.uniform(-148, 127.9, 30000)
    x = np.concatenate([spread, rng.uniform(0.5, 2.0, 30000), [1.0, 1.17549435e-38, 1e-45, 3.4e38]]).astype(np.float32)
    want = exact(math.log, x)
    error = np.abs(run(compiled["log"], x) - want) / np.spacing(np.abs(want).astype(np.float32))
    assert error.max() <= 2


def test_logarithms_of_what_has_none(compiled: dict[str, Any]) -> None:
    got = run(compiled["log"], np.array([0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, -1e-45], np.float32))
    np.testing.assert_array_equal(got, [-np.inf, -np.inf, np.nan, np.nan, np.inf, np.nan, np.nan])


def test_the_logistic_function_is_exact_to_two_units_of_one(compiled: dict[str, Any]) -> None:
    x = np.random.default_rng(0).uniform(-40, 40, 60000).astype(np.float32)
    assert np.abs(run(compiled["sigmoid"], x) - exact(logistic, x)).max() <= 2 * np.spacing(np.float32(1))


@pytest.mark.parametrize("name", ["exp", "erf", "tanh", "sigmoid"])
def test_infinities_and_nan_come_out_as_the_function_has_them(compiled: dict[str, Any], name: str) -> None:
    low, high, nan, zero = run(compiled[name], np.array([-np.inf, np.inf, np.nan, 0.0], np.float32))
    limits = {"exp": (0, np.inf, 1), "erf": (-1, 1, 0), "tanh": (-1, 1, 0), "sigmoid": (0, 1, 0.5)}[name]
    assert (low, high, zero) == limits
    assert np.isnan(nan)
