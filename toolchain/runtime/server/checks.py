"""Checks a request against a model's contract before it is queued: quick where it fits, clear where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from toolchain.errors import ToolchainError, did_you_mean
from toolchain.runtime.buckets import choose
from toolchain.runtime.contract import Contract, InputSpec, range_text, shape_text
from toolchain.runtime.server.api import InferRequest, ServeError, Status
from toolchain.runtime.server.datatypes import NAMES

if TYPE_CHECKING:
    from toolchain.runtime.server.slots import Shapes

_REMEMBERED = 256


class Fit(NamedTuple):
    """What is known of inputs of given shapes: their rows, which others they may be merged with, and their bytes.

    ``sizes`` are those of the contract's symbols.
    """

    rows: int
    group: Shapes
    nbytes: int
    sizes: Mapping[str, int]


class RequestCheck:
    """The checks of one model version.

    Attributes:
        batch_axes: the batch axis of each input, in the contract's order; empty where requests can't be merged.
        output_axes: the same of each output.
        max_rows: most rows of one run.
    """

    def __init__(self, name: str, contract: Contract, variants: Sequence[Mapping[str, int]]) -> None:
        self.name = name
        self.contract = contract
        self._variants = variants if any(variants) else ()
        self._inputs = [(spec.name, np.dtype(spec.dtype)) for spec in contract.inputs]
        self._outputs = {spec.name: index for index, spec in enumerate(contract.outputs)}
        # Values are looked at in every request, shapes once.
        self._ranged = [(i, s) for i, s in enumerate(contract.inputs) if (s.low, s.high) != (None, None)]
        self._fits: dict[Shapes, Fit] = {}
        symbol = _batch_symbol(contract)
        self.batch_axes = tuple(spec.shape.index(symbol) for spec in contract.inputs) if symbol else ()
        self.output_axes = tuple(spec.shape.index(symbol) for spec in contract.outputs) if symbol else ()
        self.max_rows = contract.dims[symbol].max if symbol else 1

    def check(self, request: InferRequest) -> tuple[list[np.ndarray], Fit]:
        """The inputs in the contract's order, and what is known of their shapes.

        Raises:
            ServeError: INVALID, naming every mistake.
        """
        given = request.inputs
        arrays = []
        if len(given) == len(self._inputs) and not request.bf16:
            for name, dtype in self._inputs:
                array = given.get(name)
                if array is None or array.dtype != dtype:
                    break
                arrays.append(array)
        if len(arrays) != len(self._inputs):
            raise self._invalid(self._explain(request))
        shapes = tuple([array.shape for array in arrays])
        fit = self._fits.get(shapes)
        if fit is None:
            fit = self._fit(request, arrays, shapes)
        if self._ranged:
            problems = [spec.range_problem(arrays[index]) for index, spec in self._ranged]
            if any(problems):
                raise self._invalid(problems)
        return arrays, fit

    def outputs(self, asked: Sequence[str]) -> list[tuple[int, str]]:
        """Position and name of the outputs that a request asks for, in its order; all of them for none.

        Raises:
            ServeError: INVALID, an unknown output.
        """
        chosen = []
        for name in asked or self._outputs:
            if name not in self._outputs:
                meant = did_you_mean(name, self._outputs)
                raise self._invalid([f"unknown output {name!r}{meant}; the model has {', '.join(self._outputs)}"])
            chosen.append((self._outputs[name], name))
        return chosen

    def _fit(self, request: InferRequest, arrays: list[np.ndarray], shapes: Shapes) -> Fit:
        problems = self._explain(request)
        if problems:
            raise self._invalid(problems)
        sizes = self.contract.sizes_of(dict(zip(self.contract.input_names, arrays, strict=True)))
        if self._variants:
            try:
                choose(self.contract, self._variants, sizes)
            except ToolchainError as error:
                raise self._invalid([error.what, error.hint, *error.details]) from None
        rows = shapes[0][self.batch_axes[0]] if self.batch_axes else 1
        group = shapes
        if self.batch_axes:
            pairs = zip(shapes, self.batch_axes, strict=True)
            group = tuple((*shape[:axis], -1, *shape[axis + 1 :]) for shape, axis in pairs)
        fit = Fit(rows, group, sum(array.nbytes for array in arrays), sizes)
        if len(self._fits) >= _REMEMBERED:
            self._fits.clear()
        self._fits[shapes] = fit
        return fit

    def _explain(self, request: InferRequest) -> list[str]:
        """Everything that is wrong with the inputs."""
        names = self.contract.input_names
        problems = [f"unknown input {n!r}{did_you_mean(n, names)}" for n in request.inputs if n not in names]
        problems += [f"input {n!r} is missing" for n in names if n not in request.inputs]
        seen: dict[str, tuple[int, str]] = {}
        for spec in self.contract.inputs:
            if spec.name not in request.inputs:
                continue
            array = request.inputs[spec.name]
            got = "BF16" if spec.name in request.bf16 else NAMES.get(array.dtype, str(array.dtype))
            wanted = NAMES[np.dtype(spec.dtype)]
            if got != wanted:
                problems.append(f"input {spec.name!r} has datatype {got}, the model takes {wanted}")
            elif array.ndim != len(spec.shape):
                shapes = f"{shape_text(array.shape)}, the model takes {shape_text(spec.shape)}"
                problems.append(f"input {spec.name!r} has shape {shapes}")
            else:
                problems += self._size_problems(spec, array.shape, seen)
        return problems

    def _size_problems(self, spec: InputSpec, shape: tuple[int, ...], seen: dict[str, tuple[int, str]]) -> list[str]:
        problems = []
        for size, got in zip(spec.shape, shape, strict=True):
            place = f"input {spec.name!r} has shape {shape_text(shape)}, the model takes {shape_text(spec.shape)}"
            if isinstance(size, str):
                dim = self.contract.dims[size]
                if got < dim.min or (dim.max is not None and got > dim.max):
                    problems.append(f"{place} with a size of {size} {range_text(dim)}")
                first = seen.setdefault(size, (got, spec.name))
                if first[0] != got:
                    problems.append(f"{size} is {got} in input {spec.name!r} and {first[0]} in input {first[1]!r}")
            elif size != got:
                problems.append(place)
                break
        return problems

    def _invalid(self, problems: Sequence[str]) -> ServeError:
        return ServeError(Status.INVALID, f"model {self.name!r}: {'; '.join(filter(None, problems))}")


def _batch_symbol(contract: Contract) -> str:
    """The dimension along which requests can be merged: one that every input and every output has."""
    shapes = [spec.shape for spec in contract.inputs] + [spec.shape for spec in contract.outputs]
    for symbol, dim in contract.dims.items():
        if dim.batch and all(symbol in shape for shape in shapes):
            return symbol
    return ""
