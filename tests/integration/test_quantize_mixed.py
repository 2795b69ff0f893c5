"""The mixed stage: it finds the layers that int8 ruins, keeps as few as it can, and never passes off a failure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantize_models import (
    Arrays,
    cnn,
    dataset,
    floats,
    mlp_with_outlier,
    random_data,
    reference,
    run_onnx,
    run_stage,
    write_onnx,
)

from toolchain.artifact import canonical_json
from toolchain.errors import ExitCode, ToolchainError
from toolchain.quantize.scheme import AccuracyLimits
from toolchain.stages import mixed, quantize
from toolchain.stages.mixed import Options

TOP1 = AccuracyLimits(accuracy_drop=0.02)


def _labelled(folder: Path, model: Path, batches: int, seed: int) -> Path:
    """Random inputs, labelled with what the float model answers: its top-1 is 1."""
    run = run_onnx(model / "model.onnx")
    inputs = [floats(seed + i, 50, 8, scale=1) for i in range(batches)]
    return dataset(folder, (({"x": x}, {"label": run({"x": x})["y"].argmax(1)}) for x in inputs))


@pytest.fixture
def ruined(tmp_path: Path) -> dict[str, Path]:
    """Inputs of the stage for the model with an outlier channel between bias2 and fc3."""
    model = mlp_with_outlier(tmp_path / "model")
    data = _labelled(tmp_path / "evaluation", model, 6, 500)
    calibration = random_data(tmp_path / "calibration", "x", (32, 8), 4)
    return {
        "onnx": model, "calibration": calibration, "evaluation": data,
        "reference": reference(tmp_path / "reference", model, data),
    }  # fmt: skip


def _accuracy(model: Path, data: Path) -> float:
    from toolchain.data import read_batches

    run = run_onnx(model / "model.onnx")
    hits = [run(dict(b.inputs))["y"].argmax(1) == b.labels["label"] for b in read_batches(data)]
    return float(np.concatenate(hits).mean())


def test_the_layers_that_int8_ruins_are_found_and_only_they_stay_float(tmp_path: Path, ruined: dict[str, Path]) -> None:
    plain = {k: ruined[k] for k in ("onnx", "calibration")}
    run_stage(quantize, tmp_path / "static", quantize.Options(), **plain)
    assert _accuracy(tmp_path / "static" / "onnx", ruined["evaluation"]) < 0.6

    result = run_stage(mixed, tmp_path / "out", Options(metric="top1", limits=TOP1), **ruined)
    assert not result.refused
    assert {entry["layer"] for entry in result.facts["kept_float"]} == {"bias2", "fc3"}
    assert _accuracy(tmp_path / "out" / "onnx", ruined["evaluation"]) >= 0.98
    assert result.facts["running_int8_operators"].get("QLinearMatMul", 0) >= 1
    assert {e["layer"] for e in result.facts["sensitivity"][:2]} == {"bias2", "fc3"}
    assert result.facts["sensitivity"][0]["error"] > 5 * result.facts["sensitivity"][2]["error"]
    assert result.facts["everything_int8"]["value"] < 0.6
    assert result.facts["everything_int8"]["original"] == 1.0
    holding = [t for t in result.facts["tries"] if not t["misses"]]
    assert set(holding[-1]["kept"]) == {"bias2", "fc3"}
    reasons = {g["op"]: g["reason"] for g in result.facts["stayed_float"]}
    assert reasons["MatMul"] == "kept in float by the sensitivity search"
    assert result.facts["precision"] == "int8-mixed"
    canonical_json(result.facts)


def test_the_accuracy_in_the_facts_is_that_of_the_model_that_is_written(
    tmp_path: Path, ruined: dict[str, Path]
) -> None:
    facts = run_stage(mixed, tmp_path / "out", Options(metric="top1", limits=TOP1), **ruined).facts
    kept = {entry["layer"] for entry in facts["kept_float"]}
    chosen = next(t for t in facts["tries"] if set(t["kept"]) == kept and not t["misses"])
    assert chosen["value"] == pytest.approx(_accuracy(tmp_path / "out" / "onnx", ruined["evaluation"]))


def test_a_fidelity_gate_alone_drives_the_search(tmp_path: Path, ruined: dict[str, Path]) -> None:
    result = run_stage(mixed, tmp_path / "out", Options(limits=AccuracyLimits(cosine=0.99)), **ruined)
    assert not result.refused
    assert result.facts["everything_int8"]["worst"]["cosine"] < 0.9
    assert {"bias2", "fc3"} <= {entry["layer"] for entry in result.facts["kept_float"]}


def test_it_is_refused_as_not_needed_when_plain_int8_holds(tmp_path: Path) -> None:
    model = cnn(tmp_path / "model")
    data = random_data(tmp_path / "data", "image", (16, 1, 8, 8))
    inputs = {
        "onnx": model,
        "calibration": data,
        "evaluation": data,
        "reference": reference(tmp_path / "r", model, data),
    }
    result = run_stage(mixed, tmp_path / "out", Options(limits=AccuracyLimits(cosine=0.9)), **inputs)
    assert result.refused.startswith("not needed: int8-static holds the gate cosine (cosine 0.99")
    assert not (tmp_path / "out" / "onnx").exists()


def test_a_missed_limit_has_the_digits_that_tell_it_from_what_was_got(tmp_path: Path, ruined: dict[str, Path]) -> None:
    from toolchain.quantize.evaluation import evaluation_of

    worst = {"cosine": 0.99999999712, "max_abs_error": None, "max_rel_error": None, "agreement": None}
    known = evaluation_of({"problem": "", "worst": worst}, AccuracyLimits(cosine=1.0), True)
    assert known is not None
    assert known.misses == ("cosine: 0.9999999971, allowed at least 1",)


def _verdict(folder: Path, cosine: float) -> Path:
    folder.mkdir()
    worst = {"cosine": cosine, "max_abs_error": 0.1, "max_rel_error": 0.1, "agreement": 1.0}
    (folder / "verdict.json").write_bytes(canonical_json({"problem": "", "worst": worst}))
    return folder


def test_a_verdict_on_plain_int8_that_holds_spares_the_whole_search(tmp_path: Path, ruined: dict[str, Path]) -> None:
    inputs = ruined | {"verdict": _verdict(tmp_path / "verdict", 0.995), "calibration": tmp_path / "never-read"}
    result = run_stage(mixed, tmp_path / "out", Options(limits=AccuracyLimits(cosine=0.99)), **inputs)
    assert result.refused.startswith("not needed: int8-static holds the gate cosine (cosine 0.995")
    assert result.facts["everything_int8"]["worst"]["cosine"] == 0.995


def test_a_verdict_on_plain_int8_that_misses_leaves_the_search_as_it_is(
    tmp_path: Path, ruined: dict[str, Path]
) -> None:
    options = Options(limits=AccuracyLimits(cosine=0.99))
    without = run_stage(mixed, tmp_path / "without", options, **ruined)
    verdict = _verdict(tmp_path / "verdict", 0.5)
    assert run_stage(mixed, tmp_path / "with", options, **ruined, verdict=verdict).facts == without.facts


def test_without_any_gate_there_is_nothing_to_search_for(tmp_path: Path, ruined: dict[str, Path]) -> None:
    result = run_stage(mixed, tmp_path / "out", Options(metric="top1"), **ruined)
    assert result.refused == "not needed: the recipe sets no accuracy or fidelity gate"


def test_an_unreachable_gate_is_refused_with_the_figures(tmp_path: Path, ruined: dict[str, Path]) -> None:
    options = Options(metric="top1", limits=AccuracyLimits(max_abs_error=1e-12))
    result = run_stage(mixed, tmp_path / "out", options, **ruined)
    assert result.refused.startswith("no mix holds the gates with any layer left in int8: all int8: ")
    assert "layers float: " in result.refused
    assert "max_abs_error: " in result.refused
    assert not (tmp_path / "out" / "onnx").exists()
    assert len(result.facts["tries"]) >= 2


def test_the_bound_on_float_layers_is_kept(tmp_path: Path, ruined: dict[str, Path]) -> None:
    one = Options(metric="top1", limits=TOP1, max_float_layers=1)
    result = run_stage(mixed, tmp_path / "one", one, **ruined)
    assert "with at most 1 layers in float" in result.refused
    assert all(attempt["layers"] <= 1 for attempt in result.facts["tries"])
    two = Options(metric="top1", limits=TOP1, max_float_layers=2)
    assert not run_stage(mixed, tmp_path / "two", two, **ruined).refused


def test_two_runs_give_the_same_bytes_and_facts(tmp_path: Path, ruined: dict[str, Path]) -> None:
    options = Options(metric="top1", limits=TOP1)
    seen = []
    for folder in ("a", "b/c"):
        facts = run_stage(mixed, tmp_path / folder, options, **ruined).facts
        seen.append((hashlib.sha256((tmp_path / folder / "onnx/model.onnx").read_bytes()).hexdigest(), facts))
    assert seen[0] == seen[1]


def test_an_own_metric_is_loaded_from_the_repository(tmp_path: Path, ruined: dict[str, Path]) -> None:
    from toolchain.stage import StageContext

    (tmp_path / "score.py").write_text(
        "def errors(outputs, labels):\n    return float((outputs['y'].argmax(1) != labels).mean())\n"
    )
    options = Options(metric="score.py:errors", higher_is_better=False, limits=TOP1)
    (tmp_path / "out").mkdir()
    result = mixed.run(StageContext(ruined, options, tmp_path / "out", tmp_path))
    assert result.facts["everything_int8"]["value"] > 0.4
    assert {entry["layer"] for entry in result.facts["kept_float"]} == {"bias2", "fc3"}


def test_evaluation_data_without_labels_is_an_error(tmp_path: Path, ruined: dict[str, Path]) -> None:
    data = random_data(tmp_path / "unlabelled", "x", (16, 8), 6)
    inputs = {**ruined, "evaluation": data, "reference": reference(tmp_path / "r", ruined["onnx"], data)}
    with pytest.raises(ToolchainError, match="no labels") as caught:
        run_stage(mixed, tmp_path / "out", Options(metric="top1", limits=TOP1), **inputs)
    assert caught.value.code == ExitCode.USER_CODE


def test_an_accuracy_limit_without_a_metric_is_an_error_and_no_silent_pass(
    tmp_path: Path, ruined: dict[str, Path]
) -> None:
    with pytest.raises(ToolchainError, match="need a metric") as caught:
        run_stage(mixed, tmp_path / "out", Options(limits=TOP1), **ruined)
    assert caught.value.code == ExitCode.BAD_RECIPE


def _deep(folder: Path, layers: int) -> Path:
    from onnx import helper

    nodes: list[Any] = []
    weights: Arrays = {}
    for i in range(layers):
        weights[f"w{i}"] = floats(i, 16, 16)
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], f"fc{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"h{i + 1}"], f"relu{i}"))
    return write_onnx(folder, nodes, weights, {"h0": ("float32", ["batch", 16])}, {f"h{layers}": ["batch", 16]})


def test_a_deep_model_is_ranked_in_a_bounded_number_of_blocks_that_cover_every_layer(tmp_path: Path) -> None:
    from toolchain.quantize.calibration import calibrate
    from toolchain.quantize.model import load_prepared
    from toolchain.quantize.scheme import Scheme
    from toolchain.quantize.sensitivity import MAX_LAYERS, find_layers

    model = load_prepared(_deep(tmp_path / "deep", 101))
    data = random_data(tmp_path / "d", "h0", (4, 16), 2)
    layers = find_layers(model, calibrate(model, data, Scheme()), Scheme())
    assert len(layers) == MAX_LAYERS
    assert sum(layer.size for layer in layers) == 101
    assert [n for layer in layers for n in layer.nodes] == [n.name for n in model.graph.node]


@pytest.mark.slow
def test_digits_trained_with_scikit_learn_hold_their_accuracy_in_every_precision(tmp_path: Path) -> None:
    from onnx import helper
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    trained = MLPClassifier((32,), random_state=0, max_iter=60, early_stopping=True).fit(images[:1200], labels[:1200])
    weights = {f"w{i}": w.astype(np.float32) for i, w in enumerate(trained.coefs_)}
    weights |= {f"b{i}": b.astype(np.float32) for i, b in enumerate(trained.intercepts_)}
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], "fc0"),
        helper.make_node("Relu", ["h"], ["a"], "relu"),
        helper.make_node("Gemm", ["a", "w1", "b1"], ["y"], "fc1"),
    ]
    model = write_onnx(tmp_path / "m", nodes, weights, {"x": ("float32", ["batch", 64])}, {"y": ["batch", 10]})
    calibration = dataset(tmp_path / "c", [({"x": images[i : i + 100]}, {}) for i in range(0, 1200, 100)])
    held_out = range(1200, len(images), 100)
    parts = [({"x": images[i : i + 100]}, {"label": labels[i : i + 100]}) for i in held_out]
    evaluation = dataset(tmp_path / "e", parts)
    original = _accuracy(model, evaluation)
    assert original > 0.85
    for precision in ("fp16", "int8-static", "int8-dynamic"):
        options = quantize.Options(precision=precision)
        run_stage(quantize, tmp_path / precision, options, onnx=model, calibration=calibration)
        assert _accuracy(tmp_path / precision / "onnx", evaluation) >= original - 0.02
    inputs = {"onnx": model, "calibration": calibration, "evaluation": evaluation}
    inputs["reference"] = reference(tmp_path / "r", model, evaluation)
    result = run_stage(mixed, tmp_path / "out", Options(metric="top1", limits=TOP1), **inputs)
    assert result.refused.startswith("not needed: int8-static holds the gate accuracy_drop (0.")
