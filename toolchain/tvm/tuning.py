"""What a tuning run does in worker children: the whole model with given records, and one loop nest with one choice.

Functions take and return JSON, so that a crash or a hang of what they compile and run ends a child alone; each
sets an alarm that ends it when it takes too long.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.tvm.choices import Choices, by_rule, candidates, share_of
from toolchain.tvm.library import Refusal, load_tvm, one_line
from toolchain.tvm.machine import Machine
from toolchain.tvm.nests import Choice, Nest
from toolchain.tvm.records import from_json

if TYPE_CHECKING:
    import numpy as np

_TOLERANCE = 1e-3
"""Allowed difference between two choices, relative to the largest value: sums in another order, Winograd."""


def whole(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles the model as a build would.

    Args:
        request: ``machine``, ``linker`` (see :func:`_machine`), ``model`` (folder of an ``onnx`` artifact), ``sizes``
            (of the named dimensions), ``records`` (as of :func:`toolchain.tvm.records.to_json`), ``folder`` for the
            libraries, ``seconds``, ``threads``, ``candidates`` (how many per loop nest).

    Returns:
        ``{"libraries": [{"file", "sizes"}], "nests": [...]}``: each loop nest with its ``nest``, ``data`` (sizes to
        measure at), ``rule``, ``share`` (estimated, of all of them), ``candidates``; or ``{"refused": why}``.
    """
    from toolchain.tvm.pipeline import Notes, compile_module
    from toolchain.tvm.sizes import bucket_variants, fix_sizes

    prepare(request)
    model, signature = _load(Path(request["model"]))
    machine = _machine(request)
    fixed: list[tuple[dict[str, int], Any]] = [({}, model)]
    libraries = []
    try:
        try:
            made = [compile_module(_imported(model), machine, Notes())]
        except Refusal as refusal:
            if not signature.used_dims:
                raise
            machine.choices.asked.clear()
            fixed = [(s, fix_sizes(model, s)) for s in bucket_variants(signature, str(refusal))]
            made = [compile_module(_imported(variant), machine, Notes()) for _, variant in fixed]
    except Refusal as refusal:
        return {"refused": str(refusal)}
    for number, ((sizes, _), executable) in enumerate(zip(fixed, made, strict=True)):
        path = Path(request["folder"]) / f"model-{number}.so"
        _link(request, executable, path)
        libraries.append({"file": str(path), "sizes": {**request["sizes"], **sizes}})
    return {"libraries": libraries, "nests": _survey(machine, request)}


def _imported(model: Any) -> Any:
    from toolchain.tvm.importer import check_operators, import_model

    check_operators(model)
    return import_model(model)


def _load(folder: Path) -> tuple[Any, Any]:
    import onnx

    from toolchain.specs import Signature
    from toolchain.tvm.sizes import conform_inputs

    signature = Signature.from_contract(json.loads((folder / "contract.json").read_text()))
    model = onnx.load(folder / "model.onnx")
    conform_inputs(model, signature)
    return model, signature


def _survey(machine: Machine, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = machine.choices.asked
    work = {nest: a.count * share_of(nest, machine, _concrete(a.shape, request["sizes"])) for nest, a in asked.items()}
    total = sum(work.values()) or 1.0
    return [
        {
            "nest": str(nest),
            "data": _concrete(asked[nest].shape, request["sizes"]),
            "rule": str(by_rule(nest, machine)),
            "share": work[nest] / total,
            "candidates": [str(choice) for choice in candidates(nest, machine, request["candidates"])],
        }
        for nest in sorted(asked, key=lambda nest: (-work[nest], str(nest)))
    ]


def _concrete(shape: Sequence[Any], sizes: Mapping[str, int]) -> list[int]:
    """Sizes with those of the named dimensions put in."""
    tvm = load_tvm()
    import tvm_ffi
    from tvm import tirx

    def known(variable: Any) -> Any:
        return tirx.const(sizes.get(str(variable.name), 1), str(variable.ty.dtype))

    analyzer = tvm.sym.Analyzer()
    return [
        size if isinstance(size, int) else int(analyzer.simplify(tvm_ffi.structural_map(size, (tirx.Var, known))))
        for size in shape
    ]


def compare_models(request: dict[str, Any]) -> dict[str, Any]:
    """Runs two sets of libraries in turns.

    Args:
        request: ``first`` and ``second``, each ``libraries`` of :func:`whole`; ``model``; ``measure`` in seconds;
            ``seconds`` and ``threads`` as there.

    Returns:
        ``{"ratio", "first_ms", "second_ms"}`` over all of them, the ratio of second to first.

    Raises:
        ToolchainError: COMPILE: they compute different values.
    """
    from toolchain.tvm.compare import random_inputs
    from toolchain.tvm.race import race

    prepare(request)
    _, signature = _load(Path(request["model"]))
    times = [0.0, 0.0]
    ratio = 0.0
    for first, second in zip(request["first"], request["second"], strict=True):
        inputs = random_inputs(signature, first["sizes"])
        arrays = [inputs[name] for name in signature.names]
        mains = [_open(Path(library["file"]), arrays) for library in (first, second)]
        for one, other in zip(*(_arrays(main()) for main in mains), strict=True):
            _check_same(one, other)
        result = race(mains[0], mains[1], request["measure"], request["threads"])
        ratio += result.ratio * result.first
        times = [times[0] + result.first, times[1] + result.second]
    return {"ratio": ratio / times[0], "first_ms": times[0] * 1e3, "second_ms": times[1] * 1e3}


def trial(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles a loop nest with two choices and runs them in turns.

    Args:
        request: ``machine`` and ``linker``, ``nest``, ``data``, ``choices`` (two, as text), ``folder`` for libraries
            (kept from trial to trial), ``measure`` (seconds), ``seconds``, ``threads``.

    Returns:
        ``{"ratio", "first_ms", "second_ms"}``, the ratio of the second to the first.

    Raises:
        ToolchainError: COMPILE: they compute different values.
    """
    from toolchain.tvm.race import race

    prepare(request)
    nest = Nest.parse(request["nest"])
    assert nest is not None
    shape = _input_shape(nest, request["data"])
    data = _values(shape, nest.dtype, 0)
    mains = []
    for text in request["choices"]:
        path = Path(request["folder"]) / f"{text.replace(' ', '-')}.so"
        if not path.exists():
            choice = Choice.parse(text)
            assert choice is not None
            _compile_nest(request, nest, choice, path)
        mains.append(_open(path, [data]))
    _check_same(*(main().numpy() for main in mains))
    result = race(mains[0], mains[1], request["measure"], request["threads"])
    return {"ratio": result.ratio, "first_ms": result.first * 1e3, "second_ms": result.second * 1e3}


def _compile_nest(request: Mapping[str, Any], nest: Nest, choice: Choice, path: Path) -> None:
    from toolchain.tvm.pipeline import Notes, compile_module

    machine = _machine({**request, "records": {str(nest): str(choice)}})
    partial = path.with_name(path.name + ".partial")
    try:
        executable = compile_module(_nest_module(nest, machine), machine, Notes())
    except Refusal as refusal:
        raise ToolchainError(str(refusal), code=ExitCode.COMPILE) from refusal
    _link(request, executable, partial)
    os.replace(partial, path)


def _nest_module(nest: Nest, machine: Machine) -> Any:
    """A module of this loop nest alone, its data in the layout that it reads."""
    load_tvm()
    from tvm import relax, tirx

    from toolchain.tvm.graph.blocked_float import Convolutions
    from toolchain.tvm.graph.rewrite import Graph

    sizes = [tirx.Var(f"n{axis}", "int64") if size is None else size for axis, size in enumerate(nest.data)]
    weights = _values(nest.weights, nest.dtype, 1, nest.depth)
    x = relax.Var("x", relax.TensorType(_input_shape(nest, sizes), nest.dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            if nest.conv is None:
                made = builder.emit(relax.op.matmul(x, relax.const(weights, nest.dtype)))
            else:
                image = x if nest.plain else relax.Var("image", relax.TensorType(sizes, nest.dtype))
                nests = Convolutions(machine, lambda _graph, _value, _lanes: x, lambda _value: not nest.plain)
                made = nests.emit(Graph(builder), image, nest.conv, weights)
            output = builder.emit_output(made)
        builder.emit_func_output(output)
    return builder.get()


def _input_shape(nest: Nest, data: Sequence[Any]) -> list[Any]:
    if nest.conv is None or nest.plain:
        return list(data)
    n, channels, height, width = data
    return [n, -(-channels // nest.lanes), height, width, nest.lanes]


def _values(shape: Sequence[int], dtype: str, seed: int, depth: int = 1) -> np.ndarray:
    import numpy as np

    values: np.ndarray = np.random.default_rng(seed).standard_normal(shape) / depth**0.5
    return values.astype(dtype)


def _arrays(result: Any) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in ([result] if hasattr(result, "numpy") else result)]


def _check_same(first: np.ndarray, second: np.ndarray) -> None:
    import numpy as np

    difference = float(np.abs(first.astype("float64") - second.astype("float64")).max(initial=0.0))
    allowed = _TOLERANCE * float(np.abs(first).max(initial=1.0)) * (1 if first.dtype == np.float32 else 30)
    if not difference <= allowed:
        what = f"computes other values: they differ by up to {difference:.3g}, allowed {allowed:.3g}"
        raise ToolchainError(what, code=ExitCode.COMPILE)


def prepare(request: Mapping[str, Any]) -> None:
    """The time limit, and TVM's threads, which are started at the first run."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    os.environ["TVM_NUM_THREADS"] = str(request["threads"] or len(os.sched_getaffinity(0)))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def _machine(request: Mapping[str, Any]) -> Machine:
    return Machine(**request["machine"], choices=Choices(from_json(request["records"])))


def _link(request: Mapping[str, Any], executable: Any, path: Path) -> None:
    from toolchain.tvm.link import Linker, link_executable

    linker = Linker(request["linker"], request["machine"]["arch"], "")
    link_executable(executable, linker, path)


def _open(path: Path, arrays: Sequence[np.ndarray]) -> Any:
    """A call of the library at ``path`` on ``arrays``."""
    tvm = load_tvm()
    machine = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    main, values = machine["main"], [tvm.runtime.tensor(array) for array in arrays]
    try:
        main(*values)
    except Exception as error:
        raise ToolchainError(f"does not run: {one_line(error)}", code=ExitCode.MEASURE) from error
    return lambda: main(*values)
