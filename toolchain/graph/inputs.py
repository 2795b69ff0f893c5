"""Seeded random inputs for a signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.specs import InputSpec, Signature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def random_inputs(
    signature: Signature, sizes: Mapping[str, int], generator: np.random.Generator, default_high: int | None = None
) -> dict[str, NDArray[Any]]:
    """One array per input: floats standard normal, or uniform within a declared range; integers uniform
    within their range, both ends included; booleans fair coins.

    Args:
        signature: the inputs.
        generator: source of randomness.
        sizes: a size for every named dimension.
        default_high: for integers without a range use 0 to this; None: such an input is an error.

    Raises:
        ToolchainError: BAD_RECIPE for an integer input without ``low`` and ``high``.
    """
    return {spec.name: _random(spec, spec.concrete(sizes), generator, default_high) for spec in signature.inputs}


def describe_random(signature: Signature) -> str:
    """What :func:`random_inputs` fills each input with, for messages: ``"image float32 0 to 1"``."""
    return ", ".join(f"{spec.name} {spec.dtype} {_described(spec)}" for spec in signature.inputs)


def blame_random(error: ToolchainError, signature: Signature) -> ToolchainError:
    """``error``, of a model whose outputs are not finite, told for inputs that random numbers made.

    The model may be sound: the hint names the inputs with their ranges first, not the user's checkpoint.
    """
    error.hint = (
        f"the inputs are random ones, made for lack of real ones: {describe_random(signature)}; if the model expects "
        "other values, give low and high in [[model.inputs]], or model.example_inputs and data.evaluation; if such "
        "values are right, check the checkpoint, and divisions and logarithms in the model"
    )
    return error


def _described(spec: InputSpec) -> str:
    if spec.dtype == "bool":
        return "false or true"
    if spec.low is not None and spec.high is not None:
        return f"{spec.low:g} to {spec.high:g}"
    return "standard normal (about -4 to 4)"


def _random(
    spec: InputSpec, shape: tuple[int, ...], generator: np.random.Generator, default_high: int | None
) -> NDArray[Any]:
    if spec.dtype == "bool":
        return generator.integers(0, 2, shape).astype("bool")
    if spec.dtype.startswith("float"):
        if spec.low is not None and spec.high is not None:
            return generator.uniform(spec.low, spec.high, shape).astype(spec.dtype)
        return generator.standard_normal(shape).astype(spec.dtype)
    low, high = spec.low, spec.high
    if low is None and high is None and default_high is not None:
        low, high = 0, default_high
    if low is None or high is None:
        raise ToolchainError(
            f"is {spec.dtype} and has no range, so no inputs can be made for it",
            where=f"model.inputs {spec.name!r}",
            hint="add low and high (both inclusive), or give data.evaluation and model.example_inputs",
            code=ExitCode.BAD_RECIPE,
        )
    return generator.integers(int(low), int(high) + 1, shape).astype(spec.dtype)
