"""The official ONNX backend tests shipped in the ``onnx`` package, and one of them run through the TVM path.

All: the node tests, and the operators and layers converted from PyTorch (2001 cases in onnx 1.23).  The inference
core: those whose operators are all in the default domain, serve inference, and take and give numeric tensors
(see :func:`is_core`), each once: not again as the primitive operators that its function body consists of.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

NOT_INFERENCE = frozenset({
    "SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss",  # losses
    "Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",  # random
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SequenceMap", "SplitToSequence", "ConcatFromSequence",   # sequences of tensors
    "Optional", "OptionalGetElement", "OptionalHasElement",
    "StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder",
})  # fmt: skip
"""Operators outside the inference core: training, random numbers, containers, text and image files."""

NUMERIC = frozenset({
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32,
    TensorProto.UINT64,
})  # fmt: skip
"""Element types of the inference core; the others are bfloat16, 8-bit and narrower floats, 4-bit and 2-bit integers,
strings and complex numbers."""


STRUCTURAL: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "CenterCropPad": (1,), "Col2Im": (1, 2), "ConstantOfShape": (0,), "CumProd": (1,),
    "CumSum": (1,), "DFT": (1, 2), "Dropout": (1, 2), "Expand": (1,), "Loop": (0, 1), "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4), "NonMaxSuppression": (2, 3, 4), "OneHot": (1,), "Pad": (1, 3),
    "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "STFT": (1, 3), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (0,)),
    **dict.fromkeys((f"Reduce{r}" for r in (
        "Sum", "Max", "Min", "Mean", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")), (1,)),
}  # fmt: skip
"""Operator -> inputs that say what the result's shape or axes are.  The tests feed them at run time; in an exported
model they are constants, and only then is there something to compile ahead of time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test: the model with inputs and expected outputs in the graph's order."""

    name: str
    model: onnx.ModelProto
    inputs: tuple[Any, ...]
    expected: tuple[Any, ...]
    rtol: float
    atol: float

    @property
    def operator(self) -> str:
        """The operator tested: of the first node, with the domain if it isn't the default one."""
        node = self.model.graph.node[0]
        return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: ``passed``, ``constant``, ``refused``, ``wrong`` or ``crashed``, and why.

    ``constant``: passed with its structural operands (see :data:`STRUCTURAL`) made constants.
    """

    status: str
    reason: str = ""


def load_cases() -> list[Case]:
    """Every case, in the package's order; takes seconds, since most inputs are computed."""
    from onnx.backend.test.loader import load_model_tests

    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in load_model_tests(kind="node"):
            inputs, outputs = (tuple(map(_array, values)) for values in test.data_sets[0])
            cases.append(Case(test.name, test.model, inputs, outputs, test.rtol, test.atol))
        for kind in ("pytorch-converted", "pytorch-operator"):
            cases += [_from_folder(test) for test in sorted(load_model_tests(kind=kind), key=lambda t: t.name)]
    return cases


def _array(value: Any) -> Any:
    """Some cases hold tensors in ONNX's own form."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _from_folder(test: Any) -> Case:
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")

    def tensors(prefix: str) -> tuple[Any, ...]:
        files = sorted((folder / "test_data_set_0").glob(f"{prefix}_*.pb"), key=lambda f: int(f.stem.split("_")[1]))
        return tuple(numpy_helper.to_array(onnx.load_tensor(file)) for file in files)

    return Case(test.name, model, tensors("input"), tensors("output"), test.rtol, test.atol)


def is_core(case: Case) -> bool:
    """Whether a case belongs to the inference core."""
    graph = case.model.graph
    values = [*graph.input, *graph.output]
    numeric = all(v.type.HasField("tensor_type") and v.type.tensor_type.elem_type in NUMERIC for v in values)
    operators = list(_operators(graph))
    default = all(node.domain in ("", "ai.onnx") for node in operators)
    inference = not any(node.op_type in NOT_INFERENCE for node in operators)
    return numeric and default and inference and not _is_expanded(case) and not _is_training(case)


def _is_expanded(case: Case) -> bool:
    return "_expanded" in case.name


def _is_training(case: Case) -> bool:
    return "training" in case.name or "train" in case.name.split("_")


def _operators(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)


def host_machine() -> Any:
    """This machine as the compile pipeline sees it."""
    from toolchain.target import load_target
    from toolchain.tvm.pipeline import Machine

    profile = load_target("host")
    return Machine(profile.tvm_target(), "cpu", profile.arch, profile.cpu.vector_bits, profile.cpu.registers)


def with_constant_operands(case: Case) -> Case | None:
    """The case with its structural operands as initializers; None if no input of the graph is one."""
    structural = {
        node.input[index]
        for node in case.model.graph.node
        for index in STRUCTURAL.get(node.op_type, ())
        if index < len(node.input)
    }
    names = [value.name for value in case.model.graph.input]
    fixed = [
        n
        for n, v in zip(names, case.inputs, strict=False)
        if n in structural and isinstance(v, (np.ndarray, np.generic))
    ]
    if not fixed:
        return None
    values = dict(zip(names, case.inputs, strict=True))
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [value for value in case.model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(values[name]), name) for name in fixed)
    return replace(case, model=model, inputs=tuple(values[value.name] for value in kept))


def run_case(case: Case, machine: Any) -> Outcome:
    """Runs a case as it is and, if it is refused, with constant operands."""
    first = _run(case, machine)
    if first.status != "refused" or (constant := with_constant_operands(case)) is None:
        return first
    second = _run(constant, machine)
    return Outcome("constant") if second.status == "passed" else second


def _run(case: Case, machine: Any) -> Outcome:
    """Imports, compiles, links and runs a case as a build does; never ``crashed`` by itself unless it raises."""
    from toolchain.tvm.compare import open_library
    from toolchain.tvm.forms import Interface, build_library
    from toolchain.tvm.importer import check_operators, import_model
    from toolchain.tvm.library import Refusal, one_line
    from toolchain.tvm.link import Linker
    from toolchain.tvm.pipeline import Notes

    graph = case.model.graph
    weights = {initializer.name for initializer in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in weights]
    interface = Interface(inputs, [value.name for value in graph.output], {})
    linker = Linker("cc", machine.arch, "")
    with tempfile.TemporaryDirectory(prefix="onnx-case-") as temporary:
        library = Path(temporary) / "model.so"
        try:
            check_operators(case.model)
            form = build_library(import_model(case.model), machine, Notes(), linker, library, interface, "auto")
        except Refusal as refusal:
            return Outcome("refused", str(refusal))
        try:
            outputs = open_library(library, form.name).run([np.asarray(v, order="C") for v in case.inputs])
        except Exception as error:
            return Outcome("crashed", f"does not run: {one_line(error)}")
    return _judge(case, outputs)


def _judge(case: Case, outputs: list[np.ndarray]) -> Outcome:
    """With the test runner's own comparison; float16 may differ by two units in the last place, as it lets bfloat16."""
    from onnx.backend.test.runner import Runner

    narrow = any(getattr(value, "dtype", None) == np.float16 for value in case.expected)
    try:
        Runner.assert_similar_outputs(case.expected, outputs, max(case.rtol, 2**-9 if narrow else 0), case.atol)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome("wrong", " ".join(lines)[:160])
    return Outcome("passed")
