"""The whole path on a small model in a repository of its own: real exports, engines, races and bundles."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.shop import RECIPE, Shop

from toolchain.bundle.read import open_release

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    made = Shop(tmp_path_factory.mktemp("shop"))
    elsewhere = {"TMPDIR": str(tmp_path_factory.mktemp("tmp")), "HOME": str(tmp_path_factory.mktemp("home"))}
    code, result, errors = made.build(env=elsewhere)
    assert code == 0, errors
    assert result["targets"]["x86-64-v3"]["chosen"]  # type: ignore[index]
    left = [path for folder in elsewhere.values() for path in Path(folder).rglob("*")]
    assert left == [], "a build leaves nothing outside of its cache and output"
    return made


@pytest.fixture
def copy(shop: Shop, tmp_path: Path) -> Shop:
    """The built shop again, moved to another folder, to change at will."""
    return shop.copied(tmp_path)


def test_a_second_build_runs_nothing_and_leaves_the_release_as_it_is(shop: Shop) -> None:
    before = (shop.release / "index.json").stat().st_mtime_ns
    code, result, _ = shop.build()
    assert code == 0
    assert result["unchanged"] is True
    assert {s["status"] for s in result["stages"]} <= {"cached", "skipped"}  # type: ignore[attr-defined, index]
    assert (shop.release / "index.json").stat().st_mtime_ns == before


def test_nothing_runs_after_touching_files_moving_the_repository_and_renaming_the_user(copy: Shop) -> None:
    for path in copy.repository.glob("*.*"):
        os.utime(path)
    (copy.repository / "README").write_text("unrelated")
    assert copy.ran(env={"HOME": str(copy.repository), "USER": "somebody-else"}) == set()


def test_labels_are_in_the_bundle_though_no_stage_runs_again(copy: Shop) -> None:
    text = copy.recipe.read_text()
    copy.recipe.write_text(text.replace('outputs = ["y"]', 'outputs = ["y"]\nlabels = { y = "names.txt" }'))
    code, _, errors = copy.build()
    assert code == 10
    assert "names.txt does not exist" in errors
    (copy.repository / "names.txt").write_text("north\neast\nsouth\nwest\n")
    assert copy.ran() == set()
    [bundle] = open_release(copy.release).bundles
    assert bundle.manifest.contract["outputs"][0]["labels"] == ["north", "east", "south", "west"]
    inputs = copy.repository / "x.json"
    inputs.write_text(json.dumps([[1.0] * 8]))
    told = copy.call("run", copy.release, inputs).stdout
    assert re.search(r"largest: \d \((north|east|south|west)\)", told), told


def test_an_edited_helper_file_runs_the_export_again_and_why_names_the_file(copy: Shop) -> None:
    (copy.repository / "helper.py").write_text("WIDTH = 48\n")
    told = copy.call("why", copy.recipe, "--cache", copy.cache, "--stage", "export").stdout
    assert "helper.py has changed" in told
    ran = copy.ran()
    assert {"export", "reference", "optimize@x86-64-v3"} <= ran
    assert not {"calibration", "evaluation"} & ran


def test_changed_calibration_data_runs_only_what_is_calibrated(copy: Shop) -> None:
    table = copy.repository / "table.csv"
    table.write_text(table.read_text().replace("1.200", "2.400").replace("-1.000", "-3.000"))
    ran = copy.ran("--no-measure")
    assert {"calibration", "quantize[int8-static]@x86-64-v3"} <= ran
    assert not {"export", "evaluation", "reference", "compile[fp32/onnxruntime]@x86-64-v3"} & ran


def test_a_changed_option_runs_only_the_stage_that_has_it(copy: Shop) -> None:
    text = copy.recipe.read_text()
    copy.recipe.write_text(text.replace('"int8-static"]', '"int8-static"]\nmethod = "percentile"'))
    ran = copy.ran("--no-measure")
    assert "quantize[int8-static]@x86-64-v3" in ran
    assert not {"export", "calibration", "optimize@x86-64-v3"} & ran


def test_another_target_reuses_the_shared_stages(copy: Shop) -> None:
    copy.recipe.write_text(copy.recipe.read_text().replace('["x86-64-v3"]', '["x86-64-v3", "cortex-a72"]'))
    ran = copy.ran()
    assert ran
    assert not [name for name in ran if "@" not in name or "x86-64-v3" in name]


def test_one_target_built_anew_keeps_the_bundles_of_the_others_and_their_measurements(copy: Shop) -> None:
    copy.recipe.write_text(copy.recipe.read_text().replace('["x86-64-v3"]', '["x86-64-v3", "cortex-a72"]'))
    code, whole, errors = copy.build()
    assert code == 0, errors
    code, part, errors = copy.build("--target", "cortex-a72")
    assert code == 0, errors
    assert (part["kept"], part["dropped"]) == (["x86-64-v3"], [])
    assert part["unchanged"]
    assert part["digest"] == whole["digest"]
    assert "x86-64-v3: " in copy.call(*copy.text_arguments("--target", "cortex-a72")).stdout
    # Up to date in the cache, thanks to a build into another folder; but what was measured is another engine.
    (copy.repository / "helper.py").write_text("WIDTH = 24\n")
    assert copy.build("--no-measure", "--output", copy.output.with_name("elsewhere"))[0] == 0
    code, _, errors = copy.build("--target", "cortex-a72")
    assert code == 2
    assert "x86-64-v3: its measurements are of another fp32/onnxruntime engine" in errors


def test_one_target_built_anew_never_takes_out_stale_bundles_of_others_unasked(copy: Shop) -> None:
    copy.recipe.write_text(copy.recipe.read_text().replace('["x86-64-v3"]', '["x86-64-v3", "cortex-a72"]'))
    assert copy.build("--no-measure")[0] == 0
    before = open_release(copy.release)
    (copy.repository / "helper.py").write_text("WIDTH = 24\n")
    for extra in ((), ("--dry-run",)):
        code, _, errors = copy.build("--no-measure", "--target", "x86-64-v3", *extra)
        assert code == 2
        assert "would take the bundle for cortex-a72 out of this release" in errors
        assert "export: file helper.py has changed" in errors
    assert open_release(copy.release).digest == before.digest
    done = copy.call(*copy.text_arguments("--no-measure", "--target", "x86-64-v3", "--partial"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no longer in the release: cortex-a72"
    assert [b.target for b in open_release(copy.release).bundles] == ["x86-64-v3"]


def test_the_bundle_of_a_target_alone_is_as_built_with_the_others(copy: Shop) -> None:
    copy.recipe.write_text(copy.recipe.read_text().replace('["x86-64-v3"]', '["x86-64-v3", "cortex-a72"]'))
    assert copy.build("--no-measure")[0] == 0
    bundles = {bundle.target: bundle.digest for bundle in open_release(copy.release).bundles}
    shutil.rmtree(copy.release)
    assert copy.build("--no-measure", "--target", "x86-64-v3")[0] == 0
    (alone,) = open_release(copy.release).bundles
    assert alone.digest == bundles["x86-64-v3"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_cache_entry_is_made_again(copy: Shop, damage: str) -> None:
    model = next(p for p in sorted((copy.cache / "v1" / "artifacts").glob("*/model.onnx")))
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    assert copy.ran("--no-measure")


def test_a_gate_that_cannot_be_met_fails_with_its_own_code_and_writes_no_release(copy: Shop) -> None:
    for gate, code in (("cosine = 0.9", None), ("latency_ms = 0.0000001", 22), ("size_mb = 0.00001", 24)):
        copy.recipe.write_text(RECIPE.replace("cosine = 0.9", gate))
        got, result, errors = copy.build()
        if code is None:
            shutil.rmtree(copy.output)
            continue
        assert got == code
        assert gate.split(" ")[0] in errors
        assert result["failures"]["x86-64-v3"]  # type: ignore[index]
        assert not copy.release.exists()


def test_a_latency_gate_on_a_target_that_cannot_be_measured_fails_unless_allowed(copy: Shop) -> None:
    text = RECIPE.replace('["x86-64-v3"]', '["cortex-a72"]').replace("cosine = 0.9", "latency_ms = 1000.0")
    copy.recipe.write_text(text)
    code, _, errors = copy.build()
    assert code == 22
    assert "not measured" in errors
    copy.recipe.write_text(text + 'unmeasured = "allow"\n')
    assert copy.build()[0] == 0


def test_a_missing_compiler_is_reported_and_the_other_engine_is_shipped(copy: Shop) -> None:
    (copy.repository / "own.toml").write_text(
        'schema = 1\nname = "own"\nextends = "x86-64-v3"\n[tvm]\nlinker = "no-such-compiler"\n'
    )
    copy.recipe.write_text(RECIPE.replace('["x86-64-v3"]', '["own.toml"]'))
    code, result, errors = copy.build("--no-measure")
    assert code == 0, errors
    engines = {e["engine"]: e for e in result["targets"]["own"]["engines"]}  # type: ignore[index]
    assert engines["fp32/tvm"]["state"] == "not offered"
    assert "no-such-compiler" in engines["fp32/tvm"]["reason"]


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("model.py:build", "modle.py:build", 10, "modle.py"),
        ("model.py:build", "model.py:biuld", 10, "build"),
        ('"x86-64-v3"', '"x86-64-v5"', 11, "x86-64-v4"),
        ("schema = 1", "schema = 2", 10, "schema"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_clear_message_with_its_code(
    copy: Shop, old: str, new: str, code: int, words: str
) -> None:
    copy.recipe.write_text(RECIPE.replace(old, new))
    got, _, errors = copy.build()
    assert got == code, errors
    assert words in errors


def test_an_input_shape_that_the_model_refuses_is_an_export_failure_naming_the_line(copy: Shop) -> None:
    without_data = RECIPE[: RECIPE.index("[data]")] + RECIPE[RECIPE.index("[quantize]") :]
    without_data = without_data.replace('["fp32", "int8-static"]', '["fp32"]')
    copy.recipe.write_text(without_data.replace('shape = ["batch", 8]', 'shape = ["batch", 9]'))
    code, _, errors = copy.build()
    assert code == 13, errors
    assert "model.py:" in errors


def test_a_model_that_raises_is_reported_with_its_line(copy: Shop) -> None:
    (copy.repository / "helper.py").write_text("raise RuntimeError('the disk of the model is empty')\n")
    code, _, errors = copy.build()
    assert code == 12
    assert "helper.py:1" in errors
    assert "the disk of the model is empty" in errors


def test_two_builds_at_once_both_succeed_with_the_same_bundles(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    command = [sys.executable, "-m", "toolchain.cli.main", *map(str, shop.build_arguments("--no-measure"))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    digests = set()
    for process in both:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        digests.add(json.loads(out)["digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("delay", [0.6, 3.0, 5.5])
def test_an_interrupted_build_leaves_nothing_half_written_and_the_next_one_succeeds(
    tmp_path: Path, delay: float
) -> None:
    shop = Shop(tmp_path)
    command = [sys.executable, "-m", "toolchain.cli.main", *map(str, shop.build_arguments("--no-measure"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not shop.release.exists()
    assert not list((shop.cache / "v1" / "tmp").iterdir()) if shop.cache.exists() else True
    assert shop.build("--no-measure")[0] == 0


def test_run_inspect_verify_and_diff_work_on_the_release(shop: Shop, tmp_path: Path) -> None:
    inputs = tmp_path / "in.json"
    inputs.write_text(json.dumps({"x": [[0.5] * 8, [-1.0] * 8]}))
    done = shop.call("run", shop.release, inputs, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["y"]) == 2
    assert "x float32" in shop.call("inspect", shop.release).stdout
    verified = shop.call("verify", shop.release)
    assert "self-test passed" in verified.stdout, verified.stderr
    assert "the same" in shop.call("diff", shop.release, shop.release).stdout


def test_one_flipped_bit_in_the_engine_is_refused_as_damaged(shop: Shop, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(shop.release, bad)
    blob = max((bad / "blobs" / "sha256").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 4
    blob.write_bytes(data)
    inputs = tmp_path / "in.json"
    inputs.write_text(json.dumps({"x": [[0.5] * 8]}))
    done = shop.call("run", bad, inputs)
    assert done.returncode == 31
    assert "Traceback" not in done.stderr


def test_a_recipe_reproduces_in_two_folders_for_measured_and_unmeasured_targets(copy: Shop) -> None:
    copy.recipe.write_text(copy.recipe.read_text().replace('["x86-64-v3"]', '["x86-64-v3", "cortex-a72"]'))
    done = copy.call("verify", "--reproduce", copy.recipe)
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout
