"""The quantize stage on small models: what it makes really runs, says what it did, and refuses what is not true."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from quantize_models import cnn, dataset, floats, masked_attention, random_data, run_onnx, run_stage, write_onnx

from toolchain.artifact import canonical_json
from toolchain.errors import ExitCode, ToolchainError
from toolchain.stages import quantize
from toolchain.stages.quantize import Options

IMAGES = (16, 1, 8, 8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return cnn(tmp_path / "model")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return random_data(tmp_path / "images", "image", IMAGES)


def _relative_error(model: Path, quantized: Path, seed: int = 99) -> float:
    feed = {"image": floats(seed, 64, 1, 8, 8, scale=1)}
    wanted = run_onnx(model / "model.onnx")(feed)["logits"]
    got = run_onnx(quantized / "model.onnx")(feed)["logits"]
    assert got.dtype == np.float32
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (Options(precision="fp16"), 0.002),
        (Options(precision="int8-dynamic"), 0.05),
        (Options(), 0.05),
        (Options(activation="s8", symmetric_activation=True), 0.05),
        (Options(per_channel=False), 0.1),
        (Options(reduce_range=True), 0.1),
        (Options(method="percentile"), 0.1),
        (Options(method="entropy"), 0.3),
    ],
    ids=lambda value: f"{value.precision}-{value.activation}-{value.method}" if isinstance(value, Options) else "",
)
def test_every_precision_stays_close_keeps_the_contract_and_gets_smaller(
    tmp_path: Path, model: Path, images: Path, options: Options, limit: float
) -> None:
    result = run_stage(quantize, tmp_path / "out", options, onnx=model, calibration=images)
    made = tmp_path / "out" / "onnx"
    assert not result.refused
    assert filecmp.cmp(model / "contract.json", made / "contract.json", shallow=False)
    assert 0 < _relative_error(model, made) < limit
    assert result.facts["bytes_before"] == (model / "model.onnx").stat().st_size
    assert result.facts["bytes_after"] == (made / "model.onnx").stat().st_size < result.facts["bytes_before"]
    onnx.checker.check_model(str(made / "model.onnx"), full_check=True)
    canonical_json(result.facts)


def test_static_int8_says_what_became_int8_and_that_it_runs_so(tmp_path: Path, model: Path, images: Path) -> None:
    facts = run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=images).facts
    assert facts["quantized"] == {"Conv": 2, "Flatten": 1, "Gemm": 1, "MaxPool": 1}
    assert facts["folded"] == {"Relu": 2}
    assert facts["unquantized"] == {}
    assert facts["running_int8_operators"] == {"QGemm": 1, "QLinearConv": 2}
    assert facts["calibration"] == {"method": "minmax", "samples": 64, "batches": 4}
    assert facts["scheme"] == "u8s8 per channel"


def test_an_excluded_node_stays_float_and_is_listed_with_the_reason(tmp_path: Path, model: Path, images: Path) -> None:
    result = run_stage(quantize, tmp_path / "out", Options(exclude=("conv2",)), onnx=model, calibration=images)
    assert {"op": "Conv", "reason": "excluded by the recipe", "count": 1, "nodes": ["conv2"]} in result.facts[
        "stayed_float"
    ]
    assert result.facts["quantized"]["Conv"] == 1
    assert result.facts["running_int8_operators"] == {"QGemm": 1, "QLinearConv": 1}
    weights = {i.name: i.data_type for i in onnx.load(str(tmp_path / "out/onnx/model.onnx")).graph.initializer}
    assert weights["w2"] == onnx.TensorProto.FLOAT


def test_an_unknown_excluded_node_is_an_error_with_a_suggestion(tmp_path: Path, model: Path, images: Path) -> None:
    with pytest.raises(ToolchainError, match=r"quantize\.exclude") as caught:
        run_stage(quantize, tmp_path / "out", Options(exclude=("conv_2",)), onnx=model, calibration=images)
    assert caught.value.code == ExitCode.QUANTIZE
    assert "did you mean 'conv2'" in caught.value.render()


def test_scores_of_a_final_gemm_stay_float_so_that_they_do_not_tie(tmp_path: Path, model: Path, images: Path) -> None:
    run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=images)
    logits = run_onnx(tmp_path / "out/onnx/model.onnx")({"image": floats(3, 200, 1, 8, 8, scale=1)})["logits"]
    assert len(np.unique(logits)) > 1000  # 256 if they were quantized


def test_empty_calibration_data_is_an_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "dataset.json").write_text('{"batches":0,"samples":0,"sizes":[],"inputs":[],"labels":[]}')
    with pytest.raises(ToolchainError, match="calibration data is empty") as caught:
        run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=tmp_path / "none")
    assert caught.value.code == ExitCode.QUANTIZE


def test_calibration_data_of_another_shape_is_an_error_that_names_the_batch(tmp_path: Path, model: Path) -> None:
    batches = [({"image": np.ones(s, np.float32)}, {}) for s in ((2, 1, 8, 8), (2, 3, 8, 8))]
    with pytest.raises(ToolchainError, match="does not run on calibration batch 1") as caught:
        run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=dataset(tmp_path / "d", batches))
    assert caught.value.code == ExitCode.QUANTIZE


@pytest.mark.parametrize("precision", ["int8-static", "int8-dynamic"])
def test_a_model_with_nothing_to_quantize_is_refused_and_leaves_no_output(tmp_path: Path, precision: str) -> None:
    nodes = [helper.make_node("Tanh", ["x"], ["t"], "tanh"), helper.make_node("Mul", ["t", "t"], ["y"], "square")]
    model = write_onnx(tmp_path / "m", nodes, {}, {"x": ("float32", ["batch", 4])}, {"y": ["batch", 4]})
    data = random_data(tmp_path / "d", "x", (4, 4))
    result = run_stage(quantize, tmp_path / "out", Options(precision=precision), onnx=model, calibration=data)
    assert result.refused.startswith("nothing to quantize")
    assert not (tmp_path / "out" / "onnx").exists()


def test_dynamic_int8_refuses_matmuls_without_constant_weights_and_says_so(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], "product")]
    model = write_onnx(tmp_path / "m", nodes, {}, {"x": ("float32", ["batch", 4, 4])}, {"y": ["batch", 4, 4]})
    result = run_stage(quantize, tmp_path / "out", Options(precision="int8-dynamic"), onnx=model)
    assert "1 MatMul: its weights are not constant" in result.refused


def test_float16_keeps_an_operator_that_makes_the_model_invalid_in_float32_and_names_it(tmp_path: Path) -> None:
    model = masked_attention(tmp_path / "model")
    result = run_stage(quantize, tmp_path / "out", Options(precision="fp16"), onnx=model)
    assert not result.refused
    assert result.facts["kept_float32_ops"] == ["Cast"]
    assert any("1000000000" in message for message in result.facts["clamped_constants"])
    mask = np.ones((2, 1, 6), np.int64)
    mask[:, :, 4:] = 0
    feed = {"x": floats(5, 2, 6, 8, scale=1), "mask": mask}
    wanted, got = (run_onnx(folder / "model.onnx")(feed)["y"] for folder in (model, tmp_path / "out/onnx"))
    np.testing.assert_allclose(got, wanted, atol=0.01)


@pytest.mark.parametrize("make", [cnn, masked_attention])
def test_float16_with_the_weights_apart_is_what_the_converter_makes_of_the_whole_model(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    from toolchain.quantize.float16 import _convert
    from toolchain.quantize.model import load_prepared, unmark

    folder = make(tmp_path / "model")
    result = run_stage(quantize, tmp_path / "out", Options(precision="fp16"), onnx=folder)
    assert not result.refused
    model, facts = load_prepared(folder), result.facts
    blocked = [node.name for node in model.graph.node if node.op_type in facts["kept_float32_ops"]]
    whole, _ = _convert(model, [*facts["kept_float32_nodes"], *blocked])
    unmark(whole)
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == whole.SerializeToString(deterministic=True)


@pytest.mark.filterwarnings("ignore:the float32 number")
def test_float32_values_become_float16_as_the_converter_does_it_and_are_told_of_alike() -> None:
    from onnxconverter_common.float16 import convert_np_to_float16

    from toolchain.quantize.float16 import to_float16, truncations

    generator = np.random.default_rng(3)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-7, -1e-7, 9e-8, -3e-9, 1e-40, 1e4, -1e4, 10001, 65504, -7e9, 3e38]
    for values in (
        np.float32(edges),
        np.float32([0.5, -0.25]),
        np.float32([5e-8]),
        (generator.normal(size=5000) * 10.0 ** generator.integers(-9, 9, 5000)).astype(np.float32),
    ):
        with pytest.warns() if truncations(values) else contextlib.nullcontext([]) as caught:  # type: ignore[attr-defined]
            wanted = convert_np_to_float16(values)
        assert to_float16(values).tobytes() == wanted.tobytes()
        assert truncations(values) == [str(w.message) for w in caught]


def test_nodes_around_values_beyond_the_range_of_float16_stay_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "big"),
        helper.make_node("Mul", ["h", "s"], ["m"], "small"),
        helper.make_node("MatMul", ["m", "v"], ["y"], "last"),
    ]
    weights = {"w": np.full((64, 4), 9000, np.float32), "s": np.array([1e-4], np.float32), "v": floats(1, 4, 4)}
    model = write_onnx(tmp_path / "m", nodes, weights, {"x": ("float32", ["batch", 64])}, {"y": ["batch", 4]})
    feed = {"x": np.full((2, 64), 5, np.float32)}
    data = dataset(tmp_path / "d", [(feed, {})])
    result = run_stage(quantize, tmp_path / "out", Options(precision="fp16"), onnx=model, calibration=data)
    assert result.facts["kept_float32_nodes"] == ["big", "small"]
    made = onnx.load(str(tmp_path / "out/onnx/model.onnx"))
    types = {i.name: i.data_type for i in made.graph.initializer}
    assert types["v"] == onnx.TensorProto.FLOAT16
    assert types["w"] == onnx.TensorProto.FLOAT
    producers = {o: n for n in made.graph.node for o in n.output}
    assert producers[next(n for n in made.graph.node if n.name == "small").input[0]].name == "big"  # no cast between
    wanted, got = (run_onnx(folder / "model.onnx")(feed)["y"] for folder in (model, tmp_path / "out/onnx"))
    np.testing.assert_allclose(got, wanted, rtol=0.01)


def test_values_that_are_not_finite_keep_their_nodes_float_with_that_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fc"),
        helper.make_node("Log", ["h"], ["l"], "log"),
        helper.make_node("Add", ["l", "l"], ["a"], "sum"),
        helper.make_node("Softmax", ["a"], ["y"], "softmax"),
    ]
    weights = {"w": np.eye(4, dtype=np.float32)}
    model = write_onnx(tmp_path / "m", nodes, weights, {"x": ("float32", ["batch", 4])}, {"y": ["batch", 4]})
    data = dataset(tmp_path / "d", [({"x": np.abs(floats(1, 8, 4)) * np.array([0, 1, 1, 1], np.float32)}, {})])
    result = run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=data)
    reasons = {g["op"]: g["reason"] for g in result.facts["stayed_float"]}
    assert reasons["Add"] == "its values on the calibration data are not all finite"
    assert reasons["Log"] == "the operator has no int8 form here"
    assert np.isfinite(run_onnx(tmp_path / "out/onnx/model.onnx")({"x": np.eye(4, dtype=np.float32)})["y"]).all()


def test_an_attention_mask_stays_float_instead_of_rounding_the_scores_away(tmp_path: Path) -> None:
    model = masked_attention(tmp_path / "model")
    mask = np.ones((8, 1, 6), np.int64)
    mask[:, :, 4:] = 0
    feeds = [{"x": floats(i, 8, 6, 8, scale=1), "mask": mask} for i in range(3)]
    data = dataset(tmp_path / "d", [(feed, {}) for feed in feeds[:2]])
    result = run_stage(quantize, tmp_path / "out", Options(), onnx=model, calibration=data)
    reasons = {g["op"]: g["reason"] for g in result.facts["stayed_float"]}
    assert reasons["Add"] == reasons["Softmax"] == "its values on the calibration data reach 1e+09, like a mask's"
    assert result.facts["running_int8_operators"] == {"MatMulIntegerToFloat": 1, "QLinearMatMul": 2}
    wanted, got = (run_onnx(folder / "model.onnx")(feeds[2])["y"] for folder in (model, tmp_path / "out/onnx"))
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_constants_in_nodes_and_nameless_nodes_are_quantized_all_the_same(tmp_path: Path) -> None:
    constant = onnx.numpy_helper.from_array(floats(1, 8, 4), "value")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=constant),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    model = write_onnx(
        tmp_path / "m", nodes, {"v": floats(2, 4, 4)}, {"x": ("float32", ["batch", 8])}, {"y": [None, 4]}
    )
    data = random_data(tmp_path / "d", "x", (4, 8))
    for precision in ("int8-static", "int8-dynamic"):
        options = Options(precision=precision)
        result = run_stage(quantize, tmp_path / precision, options, onnx=model, calibration=data)
        assert result.facts["quantized"] == {"MatMul": 2}


def test_the_same_inputs_give_the_same_bytes_in_another_folder_and_with_another_hash_seed(
    tmp_path: Path, model: Path, images: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import json, hashlib\n"
        "from quantize_models import run_stage; from toolchain.stages import quantize\n"
        "for i, o in enumerate([dict(precision='fp16'), dict(precision='int8-dynamic'), dict(),"
        " dict(method='percentile'), dict(activation='s8', symmetric_activation=True)]):\n"
        "    out = Path(sys.argv[2]) / str(i)\n"
        "    model, data = Path(sys.argv[3]), Path(sys.argv[4])\n"
        "    r = run_stage(quantize, out, quantize.Options(**o), onnx=model, calibration=data)\n"
        "    print(hashlib.sha256((out / 'onnx/model.onnx').read_bytes()).hexdigest(), json.dumps(r.facts))\n"
    )
    seen = []
    for seed, folder in (("1", "a"), ("2", "somewhere/else")):
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / folder), model, images]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.append(done.stdout)
    assert seen[0] == seen[1]
    assert len(set(seen[0].splitlines())) == 5


_MEMORY = """
import resource, sys
from pathlib import Path
from toolchain.quantize.calibration import calibrate
from toolchain.quantize.model import load_prepared
from toolchain.quantize.scheme import Scheme
calibrate(load_prepared(Path(sys.argv[1])), Path(sys.argv[2]), Scheme(method=sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_peak_memory_of_calibration_does_not_grow_with_the_number_of_batches(
    tmp_path: Path, model: Path, method: str
) -> None:
    peaks = {}
    for batches in (10, 200):
        data = random_data(tmp_path / f"{batches}", "image", (64, 1, 8, 8), batches)
        command = [sys.executable, "-c", _MEMORY, str(model), str(data), method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[batches] = int(done.stdout)
    # One batch's activations are about 1 MB: keeping those of 190 more would take some 190 MB.
    assert peaks[200] - peaks[10] < 20_000, peaks


def test_thresholds_depend_neither_on_the_order_of_batches_nor_on_a_first_batch_of_tiny_values(
    tmp_path: Path, model: Path
) -> None:
    arrays = [floats(1, 8, 1, 8, 8, scale=1e-6), floats(2, 8, 1, 8, 8, scale=1), floats(3, 8, 1, 8, 8, scale=5)]
    hashes = set()
    for number, order in enumerate((arrays, arrays[::-1])):
        data = dataset(tmp_path / f"d{number}", [({"image": a}, {}) for a in order])
        options = Options(method="percentile", percentile=99.0)
        run_stage(quantize, tmp_path / f"o{number}", options, onnx=model, calibration=data)
        hashes.add(hashlib.sha256((tmp_path / f"o{number}/onnx/model.onnx").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_percentile_cuts_an_outlier_that_minmax_keeps(tmp_path: Path, model: Path) -> None:
    image = floats(1, 64, 1, 8, 8, scale=1)
    image[0, 0, 0, 0] = 1000
    data = dataset(tmp_path / "d", [({"image": image}, {})])
    scales = {}
    for method in ("minmax", "percentile"):
        options = Options(method=method, percentile=99.0)
        run_stage(quantize, tmp_path / method, options, onnx=model, calibration=data)
        graph = onnx.load(str(tmp_path / method / "onnx/model.onnx")).graph
        scales[method] = next(onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name == "image_scale")
    assert scales["percentile"] < scales["minmax"] / 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(precision="int8"), "got 'int8'.*allowed: fp16, int8-static, int8-dynamic"),
        (Options(method="minmx"), "did you mean 'minmax'"),
        (Options(activation="u4"), "allowed: u8, s8"),
        (Options(percentile=20), "allowed: above 50"),
    ],
)
def test_settings_that_do_not_exist_are_refused(
    tmp_path: Path, model: Path, images: Path, options: Options, message: str
) -> None:
    with pytest.raises(ToolchainError, match=message) as caught:
        run_stage(quantize, tmp_path / "out", options, onnx=model, calibration=images)
    assert caught.value.code == ExitCode.QUANTIZE


def test_an_unreadable_model_is_an_error_of_this_stage(tmp_path: Path, model: Path) -> None:
    (model / "model.onnx").write_bytes(b"\\xff\\xff not a model")
    with pytest.raises(ToolchainError, match="cannot be read") as caught:
        run_stage(quantize, tmp_path / "out", Options(precision="fp16"), onnx=model)
    assert caught.value.code == ExitCode.QUANTIZE


def test_nothing_is_printed(tmp_path: Path, model: Path, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_stage(quantize, tmp_path / "out", Options(method="percentile"), onnx=model, calibration=images)
    assert capfd.readouterr() == ("", "")


def test_options_survive_json(model: Path) -> None:
    from toolchain.stage import options_to_json
    from toolchain.stage_child import rebuild

    options = Options(precision="fp16", exclude=("a", "b"))
    assert rebuild(Options, json.loads(json.dumps(options_to_json(options)))) == options
