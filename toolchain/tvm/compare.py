"""A compiled library against ONNX Runtime on random inputs: does it compute what the model says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from toolchain.graph.numeric import WITHOUT_SPINNING
from toolchain.native_engine import NativeEngine
from toolchain.specs import InputSpec, Signature
from toolchain.tvm.library import load_tvm, one_line

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Allowed difference: ``absolute + relative * (largest reference value)``."""

    relative: float
    absolute: float


SINGLE = Tolerance(1e-3, 1e-4)
"""Both runtimes reorder sums."""

HALF = Tolerance(3e-2, 1e-2)
"""ONNX Runtime's CPU computes float16 in float32, where TVM accumulates in float16."""

INT8 = Tolerance(3e-1, 1e-2)
"""Each quantized operator may round to the neighbouring one of 256 steps, and the next one starts from that.

ONNX Runtime with and without its optimizations differs by 0.7 % of the largest value on resnet18, by 19 % on MiniLM:
this comparison finds code that is wrong; whether an int8 engine is good enough is for the accuracy gates.
"""


def tolerance_of(precision: str) -> Tolerance:
    """What is allowed for a candidate of ``precision``."""
    if precision.startswith("int8"):
        return INT8
    return HALF if precision == "fp16" else SINGLE


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        max_abs_error: largest absolute difference of the floating-point outputs.
        problem: what is wrong, in one line; "" when all outputs agree.
        skipped: why nothing could be compared; "" otherwise.
        ran: whether the library gave outputs at all.
    """

    max_abs_error: float
    problem: str = ""
    skipped: str = ""
    ran: bool = True


def random_inputs(signature: Signature, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs of the contract's dtypes and ranges.

    Without a declared range, floats are standard normal and integers 0 or 1: small enough for any mask, table
    of tokens or class index.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    return {spec.name: _random(generator, spec, spec.concrete(sizes)) for spec in signature.inputs}


def _random(generator: np.random.Generator, spec: InputSpec, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        if spec.low is None or spec.high is None:
            return generator.standard_normal(shape).astype(dtype)
        return generator.uniform(spec.low, spec.high, shape).astype(dtype)
    low, high = (0 if spec.low is None else int(spec.low)), (1 if spec.high is None else int(spec.high))
    return generator.integers(low, high, shape, endpoint=True).astype(dtype)


class Reference:
    """ONNX Runtime on the CPU, on the model as it came."""

    def __init__(self, model: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(*WITHOUT_SPINNING)
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))


class Runnable(Protocol):
    """A linked library opened in this process, on the CPU."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in order."""
        ...


def open_library(path: Path, form: str) -> Runnable:
    """Opens a library of the form ``"aot"`` or ``"vm"``."""
    return NativeEngine(path) if form == "aot" else Library(path)


class Library:
    """A library for TVM's virtual machine, opened in this process, on the CPU."""

    def __init__(self, path: Path) -> None:
        tvm = load_tvm()
        module = tvm.runtime.load_module(str(path))
        self._main = tvm.runtime.vm.VirtualMachine(module, tvm.cpu())["main"]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in order."""
        tvm = load_tvm()
        result = self._main(*[tvm.runtime.tensor(array) for array in inputs])
        return [tensor.numpy() for tensor in ([result] if hasattr(result, "numpy") else result)]


def compare(
    library: Runnable, reference: Reference, signature: Signature, sizes: Mapping[str, int], tolerance: Tolerance
) -> Comparison:
    """Runs both once, at ``sizes``."""
    inputs = random_inputs(signature, sizes)
    try:
        expected = reference.run(inputs)
    except Exception as error:
        return Comparison(0.0, skipped=f"ONNX Runtime does not run on random inputs: {one_line(error)}")
    try:
        got = library.run([inputs[name] for name in signature.names])
    except Exception as error:
        return Comparison(0.0, f"does not run: {one_line(error)}", ran=False)
    if len(got) != len(expected):
        return Comparison(0.0, f"gives {len(got)} outputs instead of {len(expected)}")
    worst = 0.0
    for (name, want), have in zip(expected.items(), got, strict=True):
        error_size, problem = _difference(have, want, tolerance)
        worst = max(worst, error_size)
        if problem:
            return Comparison(worst, f"output {name!r}: {problem}")
    return Comparison(worst)


def _difference(have: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> tuple[float, str]:
    """The largest absolute difference and what is wrong, if anything."""
    import numpy as np

    if have.shape != want.shape:
        return 0.0, f"shape {have.shape} instead of {want.shape}"
    if have.dtype != want.dtype:
        return 0.0, f"dtype {have.dtype} instead of {want.dtype}"
    if want.size == 0:
        return 0.0, ""
    if want.dtype.kind != "f":
        wrong = int(np.count_nonzero(have != want))
        return 0.0, f"{wrong} of {want.size} values differ" if wrong else ""
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    if not np.array_equal(np.isfinite(have) | same, np.isfinite(want) | same):
        return 0.0, "NaN or infinity in other places"
    finite = np.isfinite(want) & np.isfinite(have)
    if not finite.any():
        return 0.0, "" if same.all() else "infinities differ"
    error = float(np.abs(have[finite].astype(np.float64) - want[finite].astype(np.float64)).max())
    allowed = tolerance.absolute + tolerance.relative * float(np.abs(want[finite]).max())
    return error, f"differs by up to {error:.3g}, allowed {allowed:.3g}" if error > allowed else ""


def compare_all(
    library: Runnable,
    reference: Reference,
    signature: Signature,
    sizes: Sequence[Mapping[str, int]],
    tolerance: Tolerance,
) -> Comparison:
    """The first problem over several sizes, or the largest error; skipped only if every size was."""
    results: list[Comparison] = []
    for each in sizes:
        result = compare(library, reference, signature, each, tolerance)
        if result.problem:
            at = ", ".join(f"{name} {size}" for name, size in each.items())
            return Comparison(result.max_abs_error, result.problem + (f" (at {at})" if at else ""), ran=result.ran)
        results.append(result)
    skipped = "" if any(not r.skipped for r in results) else results[0].skipped
    return Comparison(max(r.max_abs_error for r in results), skipped=skipped)


def rounded(value: float) -> float:
    """Three significant digits: enough for a report, and the same for the same library on most processors."""
    return float(f"{value:.3g}")
