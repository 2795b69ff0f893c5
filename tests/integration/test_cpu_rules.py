"""Convolutions and products of random sizes through the CPU rules, for several vector widths, against ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tvm_support import Graph, compiled, save_unary

from toolchain.host import detect_host
from toolchain.tvm import tiles
from toolchain.tvm.graph import blocked
from toolchain.tvm.loops import winograd
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.machine import Machine
from toolchain.tvm.pipeline import Notes

HOST = detect_host()
# The layouts and tiles of other vector units, as code for the plainest processor of this architecture.
PLAIN = {"kind": "llvm", "mtriple": f"{HOST.arch}-linux-gnu"}
MACHINES = {
    "128 bits, 16 registers": Machine(PLAIN, "cpu", HOST.arch, 128, 16),
    "128 bits, 32 registers": Machine(PLAIN, "cpu", HOST.arch, 128, 32),
    "256 bits, 16 registers": Machine(PLAIN, "cpu", HOST.arch, 256, 16),
    "512 bits, 32 registers": Machine(PLAIN, "cpu", HOST.arch, 512, 32),
}
# A compilation an example: a failing one is reported as it was found, not made smaller.
EXAMPLES = settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def check(graph: Graph, result: str, shape: list[int | str], feeds: list[np.ndarray], machine: Machine) -> Notes:
    """Compiles and compares with ONNX Runtime on each of ``feeds``."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_unary(Path(folder) / "onnx", graph, result, shape, None) / "model.onnx"
        library, notes = compiled(onnx.load(model), machine)
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        for x in feeds:
            (want,) = session.run(None, {"x": x})
            (got,) = library.run([x])
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(want).max())))
    return notes


def images(shape: list[int | str], batches: tuple[int, ...] = (1, 3)) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = batches if "batch" in shape else (int(shape[0]),)
    return [rng.standard_normal([n, *(int(s) for s in shape[1:])]).astype(np.float32) for n in sizes]


convolutions = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 40),
        "filters": st.integers(1, 40),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "pads": st.tuples(*[st.integers(0, 2)] * 4),
        "size": st.tuples(st.integers(8, 20), st.integers(8, 20)),
        "kind": st.sampled_from(["full", "depthwise", "grouped"]),
        "dynamic": st.booleans(),
    }
)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(case=convolutions)
def test_convolutions_of_every_kind_agree(machine: Machine, case: Mapping[str, object]) -> None:
    channels, filters, groups = int(case["channels"]), int(case["filters"]), 1  # type: ignore[call-overload]
    if case["kind"] == "depthwise":
        filters = groups = channels
    elif case["kind"] == "grouped":
        channels, filters, groups = 32, 64, 2
    g = Graph()
    kernel = case["kernel"]
    shared = {
        "strides": [case["stride"]] * 2,
        "dilations": [case["dilation"]] * 2,
        "pads": list(case["pads"]),  # type: ignore[call-overload]
        "group": groups,
    }
    weight = g.weight(filters, channels // groups, *kernel, scale=0.2)  # type: ignore[misc]
    first = g.add("Relu", g.add("Conv", "x", weight, g.weight(filters), **shared))
    # A second one reads blocked, possibly ragged channels; the sum is fused behind it.
    x = g.add("Conv", first, g.weight(filters, filters, 1, 1, scale=0.2), g.weight(filters))
    shape: list[int | str] = ["batch" if case["dynamic"] else 2, channels, *case["size"]]  # type: ignore[misc]
    notes = check(
        g, g.add("Clip", g.add("Add", x, first), g.constant(np.float32(-1)), ""), shape, images(shape), machine
    )
    assert notes.unscheduled == []
    assert "convolution" in notes.rules.values()
    assert ("depthwise" in notes.rules.values()) == (case["kind"] == "depthwise" and channels > 1)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(
    rows=st.sampled_from([1, 2, 7, 19, "batch"]),
    depth=st.integers(1, 70),
    columns=st.integers(1, 70),
    sequence=st.booleans(),
)
def test_products_with_weights_agree(
    machine: Machine, rows: int | str, depth: int, columns: int, sequence: bool
) -> None:
    g = Graph()
    x = g.add("Add", g.add("MatMul", "x", g.weight(depth, columns, scale=0.3)), g.weight(columns))
    x = g.add("Mul", x, g.add("Sigmoid", x))
    shape: list[int | str] = [rows, 5, depth] if sequence else [rows, depth]
    notes = check(g, g.add("Tanh", x), shape, images(shape, (1, 2, 9, 33)), machine)
    assert sorted(set(notes.rules.values()) - {"generic"}) == ["dense"]


@pytest.mark.parametrize("batch", [1, "batch"], ids=["static", "dynamic"])
@pytest.mark.parametrize("size", [(28, 28), (13, 18)], ids=str)
def test_winograd_agrees_with_the_direct_convolution(
    monkeypatch: pytest.MonkeyPatch, batch: int | str, size: tuple[int, int]
) -> None:
    g = Graph()
    x = g.add("Conv", "x", g.weight(64, 32, 3, 3, scale=0.1), g.weight(64), pads=[1, 0, 2, 1])
    y = g.add("Conv", x, g.weight(64, 64, 3, 3, scale=0.1), g.weight(64), pads=[1] * 4)
    result = g.add("Relu", g.add("Add", y, x))
    shape: list[int | str] = [batch, 32, *size]
    monkeypatch.setattr(winograd, "pays", lambda conv, shape, *_: shape[2:] == (3, 3))
    notes = check(g, result, shape, images(shape), MACHINES["512 bits, 32 registers"])
    names = set(notes.rules.values())
    assert {"winograd input", "winograd product", "winograd output"} <= names
    assert "convolution" not in names
    assert "generic" not in {rule for name, rule in notes.rules.items() if "winograd" in name}


def test_winograd_is_taken_where_it_saves_and_not_for_few_tiles_or_channels() -> None:
    machine = MACHINES["512 bits, 32 registers"]
    same = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 1)
    assert winograd.pays(same, (64, 64, 3, 3), (56, 56), machine)
    assert not winograd.pays(same, (512, 512, 3, 3), (7, 7), machine)
    assert not winograd.pays(same, (64, 60, 3, 3), (56, 56), machine)
    assert not winograd.pays(same, (64, 64, 5, 5), (56, 56), machine)
    assert not winograd.pays(Conv2d((2, 2), (1, 1, 1, 1), (1, 1), 1), (64, 64, 3, 3), (28, 28), machine)


@given(
    rows=st.one_of(st.none(), st.integers(1, 400)),
    vectors=st.integers(1, 64),
    registers=st.sampled_from([16, 32]),
    panel=st.integers(0, 1 << 18),
)
def test_a_tile_fits_in_the_registers_and_none_that_fits_is_cheaper(
    rows: int | None, vectors: int, registers: int, panel: int
) -> None:
    room = tiles.Room(registers, 32768, panel)
    tile = tiles.choose_tile(rows, vectors, room)
    assert tile.rows * tile.vectors + tile.vectors + 1 <= registers
    if rows is not None:
        best = tiles.cost(tile, rows, vectors, room)
        for r in range(1, min(rows, 14) + 1):
            for v in range(1, min(vectors, 8) + 1):
                if room.holds(r, v):
                    assert best <= tiles.cost(tiles.Tile(r, v), rows, vectors, room)


def test_values_in_lanes_beyond_the_last_channel_never_become_infinite() -> None:
    """Their weights are zero, and zero times infinity would be NaN: dividing by a constant leaves the layout."""
    g = Graph()
    x = g.add("Conv", "x", g.weight(5, 3, 1, 1), g.weight(5))
    x = g.add("Div", x, g.constant(np.arange(1, 6, dtype=np.float32).reshape(5, 1, 1)))
    x = g.add("Log", g.add("Exp", x))
    shape: list[int | str] = [1, 3, 9, 9]
    check(g, g.add("Conv", x, g.weight(7, 5, 3, 3)), shape, images(shape), MACHINES["512 bits, 32 registers"])
    assert "relax.log" not in blocked.FINITE_UNARY
    assert "relax.divide" not in blocked.FINITE_BINARY


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(
    channels=st.integers(1, 20),
    filters=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    more=st.booleans(),
    dynamic=st.booleans(),
)
def test_transposed_convolutions_agree(
    machine: Machine,
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    more: bool,
    dynamic: bool,
) -> None:
    g = Graph()
    extra = [1 if more and s > 1 else 0 for s in stride]
    kept = [min(pads[i], kernel[i % 2] - 1) for i in range(4)]
    attrs = {"strides": list(stride), "pads": kept, "output_padding": extra}
    weight = g.weight(channels, filters, *kernel, scale=0.3)
    x = g.add("Relu", g.add("ConvTranspose", "x", weight, g.weight(filters), **attrs))
    shape: list[int | str] = ["batch" if dynamic else 2, channels, 7, 9]
    check(g, x, shape, images(shape), machine)


def test_a_transposed_convolution_is_one_of_all_phases() -> None:
    g = Graph()
    x = g.add("ConvTranspose", "x", g.weight(32, 24, 4, 4, scale=0.2), g.weight(24), strides=[2, 2], pads=[1] * 4)
    shape: list[int | str] = [1, 32, 14, 14]
    notes = check(g, g.add("Relu", x), shape, images(shape), MACHINES["256 bits, 16 registers"])
    assert "convolution" in notes.rules.values()


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@EXAMPLES
@given(
    channels=st.integers(1, 20),
    filters=st.integers(1, 20),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 2),
    dynamic=st.booleans(),
)
def test_convolutions_of_lines_agree(
    machine: Machine, channels: int, filters: int, kernel: int, stride: int, dynamic: bool
) -> None:
    g = Graph()
    weight = g.weight(filters, channels, kernel, scale=0.3)
    x = g.add("Relu", g.add("Conv", "x", weight, g.weight(filters), strides=[stride], pads=[kernel // 2, 1]))
    shape: list[int | str] = ["batch" if dynamic else 2, channels, 33]
    notes = check(g, x, shape, images(shape), machine)
    assert "convolution" in notes.rules.values()
