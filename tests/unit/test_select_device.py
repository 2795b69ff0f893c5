"""Choosing and reporting where some engines were measured on a device and others could not be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from toolchain.errors import ExitCode
from toolchain.recipe_parts import Gates
from toolchain.report import build_report, measured_lines, race_cells, to_markdown
from toolchain.select import Contender, Selection, select

PYTHON = "not measured on the device: ONNX Runtime needs Python there"
EMULATED = "checked on an emulated device (QEMU), whose times are none"
VERDICT = {"worst": {"cosine": 1.0}, "problem": "", "evidence": "proxy", "samples": 100, "random": False}
# The order of preference has ONNX Runtime first, so that nothing but the measurement can speak for TVM.
ORDER = (("int8-static", "fp32"), ("onnxruntime", "tvm"))
ORT = Contender("int8-static", "onnxruntime", 1, VERDICT, None, unmeasured=PYTHON)
TVM = Contender("fp32", "tvm", 1, VERDICT, {"median_ms": 9.0, "p95_ms": 9.5, "self_test": {"y": {"cosine": 1.0}}})


def chosen(*contenders: Contender, gates: Gates | None = None) -> Selection:
    return select(contenders, gates or Gates(), *ORDER)


def report(selection: Selection, emulated: str = "") -> dict[str, Any]:
    measurement = {
        "host": {"cpu_model": "Raspberry Pi 5", "cores": 4, "arch": "aarch64", "memory_mb": 8052},
        "device": {"over": "ssh", "emulated": emulated, "governor": "ondemand"},
        "threads": 4,
        "shapes": {"x": [1, 8]},
    }
    return build_report(
        name="n", version="1.0.0", target="cortex-a76", selection=selection, stages={}, measurement=measurement,
        unmeasured="", tools={},
    )  # fmt: skip


def test_an_engine_that_was_not_measured_never_beats_one_that_was() -> None:
    selection = chosen(ORT, TVM)
    assert selection.chosen is TVM
    want = (
        "the only measured engine that holds every gate; not measured there, so not preferred: int8-static/onnxruntime"
    )
    assert selection.reason == want
    assert selection.rows[0].state == "passed"
    assert selection.rows[0].reason == f"holds every gate; {PYTHON}: may be faster or slower"


def test_where_no_measured_engine_holds_the_gates_an_unmeasured_one_is_taken_and_said_to_be() -> None:
    broken = dataclasses.replace(TVM, verdict={**VERDICT, "problem": "its self-test fails on the device: cosine 0.2"})
    selection = chosen(ORT, broken)
    assert selection.chosen is ORT
    assert selection.reason.startswith("not measured on this target")
    assert (selection.rows[1].state, selection.rows[1].reason) == (
        "rejected", "its self-test fails on the device: cosine 0.2",
    )  # fmt: skip


@pytest.mark.parametrize(("unmeasured", "taken"), [("fail", None), ("allow", ORT)])
def test_a_latency_gate_does_not_hold_for_what_was_not_measured_unless_the_recipe_allows_it(
    unmeasured: Any, taken: Contender | None
) -> None:
    selection = chosen(ORT, TVM, gates=Gates(latency_ms=5.0, unmeasured=unmeasured))
    assert selection.chosen is taken
    assert selection.code is (ExitCode.OK if taken else ExitCode.GATE_LATENCY)


def test_the_report_names_the_device_s_processor_and_how_it_was_reached() -> None:
    made = report(chosen(ORT, TVM))
    assert made["measured"]["where"] == "on a device (Raspberry Pi 5) over ssh"
    line = "Measured on device Raspberry Pi 5 (clock governor ondemand), 4 cores, 8052 MiB, over ssh"
    assert f"{line} with 4 threads, x 1x8." in to_markdown(made)
    assert measured_lines(made) == [f"{line}; self-tests run there: fp32/tvm"]


def test_an_emulated_device_gives_no_latency() -> None:
    checked = Contender("fp32", "tvm", 1, VERDICT, {"self_test": {"y": {}}}, unmeasured=EMULATED)
    selection = chosen(ORT, checked)
    assert selection.reason == "not measured on this target: first in the profile's order of preference"
    assert selection.rows[1].reason == f"holds every gate; later in the order of preference; {EMULATED}"
    made = report(selection, "QEMU")
    assert made["measured"]["where"] == "not measured: outputs checked on an emulated device (QEMU) over ssh"
    assert "Not measured: outputs checked on an emulated device, Raspberry Pi 5 in QEMU" in to_markdown(made)
    assert set(race_cells(made["engines"][1])[5:9]) == {"-"}
