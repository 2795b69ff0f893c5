"""Models too large for one protobuf message: the whole path with weights in a file of their own.

The real limit is 2 GiB; a model of 2.2 GB takes more than a minute, so all Python processes of these builds start
with a limit of 1 kB instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.shop import RECIPE, Shop

from toolchain.record import Record

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]

LOWERED = """
import toolchain.export.clean, toolchain.quantize.dynamic, toolchain.quantize.model
toolchain.export.clean.EXTERNAL_LIMIT = 1000
toolchain.quantize.dynamic._ONE_FILE = 1000
toolchain.quantize.model._PROTOBUF_LIMIT = 1000
"""
PRECISIONS = ("fp32", "fp16", "int8-static", "int8-dynamic")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    made = Shop(tmp_path_factory.mktemp("large"))
    (made.repository / "helper.py").write_text("WIDTH = 512\n")
    made.recipe.write_text(RECIPE.replace('["fp32", "int8-static"]', json.dumps(PRECISIONS)))
    return made


@pytest.fixture(scope="module")
def result(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(LOWERED)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, built, errors = shop.build("--no-measure", env={"PYTHONPATH": path})
    assert code == 0, errors
    return built


def test_every_stage_keeps_large_weights_in_a_file_beside_the_model(shop: Shop, result: dict[str, Any]) -> None:
    folder = shop.cache / "v1"
    records = [Record.decode(path.read_bytes()) for path in (folder / "records").glob("*/*")]
    split: dict[str, set[bool]] = {}
    for record in records:
        for artifact in record.outputs.values():
            files = {file.name for file in (folder / "artifacts" / artifact.digest[7:]).iterdir()}
            if "model.onnx" in files:
                split.setdefault(record.components["stage"], set()).add("model.onnx.data" in files)
    assert split == {stage: {True} for stage in ("export", "optimize", "quantize", "compile_ort")}


def test_every_engine_of_a_large_model_is_verified(result: dict[str, Any]) -> None:
    engines = {row["engine"]: row for row in result["targets"]["x86-64-v3"]["engines"]}
    states = {name: engines[f"{name}/onnxruntime"]["state"] for name in PRECISIONS}
    assert states == {**dict.fromkeys(PRECISIONS, "passed"), "fp32": "chosen"}
    assert engines["fp32/tvm"]["state"] == "passed"


def test_the_bundle_of_a_large_model_runs_with_its_weights_beside_it(
    shop: Shop, result: dict[str, Any], tmp_path: Path
) -> None:
    inspected = json.loads(shop.call("inspect", shop.release, "--json").stdout)
    (bundle,) = inspected["bundles"]
    assert bundle["engine"]["variants"] == [{"file": "model.onnx", "sizes": {}}]
    assert bundle["size"] > 8 * 512 * 4
    inputs = tmp_path / "in.json"
    inputs.write_text(json.dumps({"x": [[0.5] * 8, [-1.0] * 8]}))
    done = shop.call("run", shop.release, inputs, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["y"]) == 2
    assert "self-test passed" in shop.call("verify", shop.release).stdout
