import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.config_errors import shape_problems
from toolchain.errors import ExitCode, ToolchainError
from toolchain.recipe import Recipe, load_recipe
from toolchain.recipe_checks import sense_problems
from toolchain.schemas import write_schemas

REPO = Path(__file__).resolve().parents[2]

GOOD = """
schema = 1
name = "digits"
version = "1.0.0"
targets = ["x86-64-v3", "cortex-a53", "own/board.toml"]
[model]
source = "net.py:build"
checkpoint = "net.safetensors"
outputs = ["logits"]
[[model.inputs]]
name = "image"
dtype = "float32"
shape = ["batch", 1, 8, 8]
pad = 0
[model.dims.batch]
max = 64
batch = true
buckets = [1, 8]
[data]
calibration = "net.py:calibration"
evaluation = "net.py:evaluation"
[metric]
kind = "top1"
[quantize]
precisions = ["fp32", "int8-static"]
[measure]
shapes = { batch = 1 }
[gates]
cosine = 0.99
size_mb = 5
unmeasured = "allow"
[gates.targets.cortex-a53]
size_mb = 1.0
[gates.targets.board]
latency_ms = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text("")
    (tmp_path / "net.safetensors").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "board.toml").write_text('schema = 1\nname = "board"\nextends = "cortex-a72"\n')
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def load(folder: Path, text: str = GOOD) -> Recipe:
    return load_recipe(write(folder, text))


def mistakes(folder: Path, *edits: tuple[str, str], text: str = GOOD) -> tuple[str, ...]:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(ToolchainError) as caught:
        load(folder, text)
    assert caught.value.code == ExitCode.BAD_RECIPE
    return caught.value.details


def test_a_good_recipe_loads_with_defaults_filled_in(folder: Path) -> None:
    recipe = load(folder)
    assert recipe.model.inputs[0].shape == ("batch", 1, 8, 8)
    assert (recipe.model.opset, recipe.model.dims["batch"].min, recipe.measure.runs) == (18, 1, 50)
    assert recipe.path == folder / "recipe.toml"
    assert recipe.folder == folder
    assert recipe.resolve("net.py") == folder / "net.py"


def test_a_recipe_cannot_be_changed_after_loading(folder: Path) -> None:
    recipe = load(folder)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_five_mistakes_are_told_at_once_each_with_file_key_got_allowed_and_suggestion(folder: Path) -> None:
    details = mistakes(
        folder,
        ('"x86-64-v3", ', '"x86-64-v33", '),
        ("outputs =", "opset = 17\noutputs ="),
        ('"batch", 1, 8, 8', '"bach", 1, 8, 8'),
        ('kind = "top1"', 'kind = "top-1"'),
        ("cosine = 0.99", "cosin = 0.99"),
        ('precisions = ["fp32", "int8-static"]', 'precisions = ["fp32", "int8-statc"]'),
    )
    shipped = (
        "armv7-neon, cortex-a53, cortex-a72, cortex-a76, cuda-sm80, cuda-sm90, host, neoverse-n1, neoverse-v1, "
        "riscv64, wasm32-wasi, x86-64-v3, x86-64-v4"
    )
    metrics = "'top1', 'topk', 'mae', 'cosine', 'f1' or 'file.py:function'"
    precisions = "'fp32', 'fp16', 'int8-static', 'int8-mixed', 'int8-dynamic'"
    limits = "cosine, max_abs_error, max_rel_error, agreement, accuracy_drop, min_accuracy, latency_ms, latency_p95_ms"
    expected = f"""\
targets[0]: got 'x86-64-v33'; allowed: {shipped}, or the path of a .toml file; did you mean 'x86-64-v3'?
model.opset: got 17; allowed: 18
model.inputs[0].shape[0]: got 'bach'; allowed: a size, or a dimension declared under [model.dims] (batch); \
did you mean 'batch'?
metric.kind: got 'top-1'; allowed: {metrics}; did you mean 'top1'?
quantize.precisions[1]: got 'int8-statc'; allowed: {precisions}; did you mean 'int8-static'?
gates.cosin: got an unknown key; allowed: the keys {limits}, memory_mb, size_mb, unmeasured, targets; \
did you mean 'cosine'?"""
    assert details == tuple(f"recipe.toml: {line}" for line in expected.splitlines())


CASES = {
    "unknown top-level key": (
        ('name = "digits"', 'name = "digits"\nmetrics = 1'),
        "metrics: got an unknown key; allowed: the keys schema, name, ",
    ),
    "unknown key of a dimension": (("max = 64", "max = 64\nmx = 3"), "model.dims.batch.mx: got an unknown key; "),
    "unknown key of an input": (("pad = 0", "padd = 0"), "did you mean 'pad'?"),
    "missing name": (('name = "digits"', ""), "name: got nothing; allowed: name of the release"),
    "missing max": (("max = 64", ""), "model.dims.batch.max: got nothing; allowed: largest size"),
    "bad name": (('"digits"', '"Digits!"'), "name: got 'Digits!'; allowed: lower-case letters"),
    "bad version": (('"1.0.0"', '"1.0"'), "version: got '1.0'; allowed: a semantic version"),
    "string for a number": (("max = 64", 'max = "64"'), "model.dims.batch.max: got '64'; allowed: a whole number"),
    "boolean for a number": (("max = 64", "max = true"), "model.dims.batch.max: got true; allowed: a whole number"),
    "string for a flag": (("batch = true", 'batch = "yes"'), "model.dims.batch.batch: got 'yes'; allowed: true or"),
    "not a number": (("cosine = 0.99", "cosine = nan"), "gates.cosine: got nan; allowed: a finite number"),
    "share above one": (("cosine = 0.99", "agreement = 1.5"), "gates.agreement: got 1.5; allowed: a number of at most"),
    "zero in a shape": (("1, 8, 8", "0, 8, 8"), "model.inputs[0].shape[1]: got 0; allowed: a size of at least 1"),
    "bad dtype": (('"float32"', '"float31"'), "model.inputs[0].dtype: got 'float31'; allowed: 'float32', 'float16'"),
    "date for a string": (('kind = "top1"', "kind = 2024-01-01"), "metric.kind: got 2024-01-01; allowed: a string"),
    "no targets": (('targets = ["x86-64-v3", "cortex-a53", "own/board.toml"]', "targets = []"), "targets: got []; "),
    "target twice": (
        ('"x86-64-v3", ', '"cortex-a53", '),
        "targets: got ['cortex-a53', 'cortex-a53', 'own/board.toml']",
    ),
    "target file missing": (("own/board.toml", "own/bord.toml"), "did you mean 'own/board.toml'?"),
    "absolute target": (("own/board.toml", "/own/board.toml"), "targets[2]: got '/own/board.toml'; allowed: the name"),
    "source of no known form": (("net.py:build", "net.py"), "model.source: got 'net.py'; allowed: 'file.py:function'"),
    "source file missing": (("net.py:build", "nets.py:build"), "model.source: got 'nets.py:build', but nets.py does"),
    "source file suggestion": (("net.py:build", "nets.py:build"), "did you mean 'net.py:build'?"),
    "onnx file missing": (('"net.py:build"\ncheckpoint = "net.safetensors"', '"nat.onnx"'), "did you mean 'net.onnx'?"),
    "checkpoint missing": (('"net.safetensors"', '"nt.safetensors"'), "model.checkpoint: got 'nt.safetensors', but"),
    "checkpoint absolute": (('"net.safetensors"', '"/net.safetensors"'), "allowed: a path relative to this file"),
    "checkpoint beside onnx": (
        ('"net.py:build"', '"net.onnx"'),
        "model.checkpoint: got 'net.safetensors'; allowed: no",
    ),
    "data file missing": (
        ('"net.py:calibration"', '"no.py:calibration"'),
        "data.calibration: got 'no.py:calibration', ",
    ),
    "min above max": (
        ("max = 64", "min = 65\nmax = 64"),
        "model.dims.batch.min: got 65; allowed: a size of at most max",
    ),
    "bucket out of range": (("[1, 8]", "[1, 80]"), "model.dims.batch.buckets[1]: got 80; allowed: a size from min to"),
    "example out of range": (("max = 64", "max = 64\nexample = 65"), "model.dims.batch.example: got 65; allowed: a"),
    "last bucket of a sequence": (("batch = true", "batch = false"), "allowed: a largest bucket equal to max (64)"),
    "low above high": (
        ("pad = 0", "low = 2\nhigh = 1"),
        "model.inputs[0].low: got 2; allowed: a number of at most high",
    ),
    "mean of another number of channels": (
        ("pad = 0", "image = { mean = [0.5, 0.5, 0.5] }"),
        "model.inputs[0].image.mean: got [0.5, 0.5, 0.5]; allowed: one number",
    ),
    "std of zero": (
        ("pad = 0", "image = { std = [0.0] }"),
        "model.inputs[0].image.std[0]: got 0.0; allowed: a",
    ),
    "unknown key of an image": (("pad = 0", "image = { scal = 1 }"), "did you mean 'scale'?"),
    "image of booleans": (
        ('dtype = "float32"', 'dtype = "bool"\nimage = { invert = true }'),
        "model.inputs[0].image: got a table with invert; allowed: no image for",
    ),
    "low alone": (("pad = 0", "low = 2"), "model.inputs[0].high: got nothing; allowed: low and high together"),
    "k without topk": (('kind = "top1"', 'kind = "top1"\nk = 3'), "metric.k: got 3; allowed: k only with kind 'topk'"),
    "topk without k": (('kind = "top1"', 'kind = "topk"'), "metric.k: got nothing; allowed: a whole number"),
    "direction of a built-in metric": (('"top1"', '"top1"\nhigher_is_better = true'), "only with a metric of your own"),
    "unknown output": (('"top1"', '"top1"\noutput = "logit"'), "metric.output: got 'logit'; allowed: one of model.out"),
    "metric without evaluation": (('evaluation = "net.py:evaluation"', ""), "data.evaluation: got nothing; allowed: "),
    "int8 without calibration": (('calibration = "net.py:calibration"', ""), "as [quantize] asks for int8-static"),
    "require outside precisions": (
        ("[measure]", 'require = "fp16"\n[measure]'),
        "quantize.require: got 'fp16'; allowed",
    ),
    "percentile without its method": (("[measure]", "percentile = 99.9\n[measure]"), "quantize.percentile: got 99.9; "),
    "size to measure out of range": (("batch = 1 }", "batch = 65 }"), "measure.shapes.batch: got 65; allowed: a size"),
    "dimension to measure unknown": (
        ("{ batch = 1 }", "{ bach = 1 }"),
        "measure.shapes.bach: got an unknown dimension",
    ),
    "gates of another target": (
        ("targets.cortex-a53]", "targets.cortex-a72]"),
        "gates.targets.cortex-a72: got another",
    ),
    "accuracy gate without metric": (
        ('[metric]\nkind = "top1"\n[quantize]', "[gates.targets.x86-64-v3]\naccuracy_drop = 0.1\n[quantize]"),
        "gates.targets.x86-64-v3.accuracy_drop: got 0.1; allowed: a limit of accuracy only where",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line_of_our_own_words(case: str, folder: Path) -> None:
    edit, expected = CASES[case]
    details = mistakes(folder, edit)
    assert [line for line in details if expected in line], details
    for line in details:
        assert line.startswith("recipe.toml: ")
        assert "pydantic" not in line
        assert "Input should" not in line


def test_a_recipe_whose_only_mistake_is_an_unknown_target_ends_with_the_targets_code(folder: Path) -> None:
    unknown = GOOD.replace('"x86-64-v3"', '"x86-64-v33"')
    with pytest.raises(ToolchainError, match="1 mistake in this recipe") as caught:
        load(folder, unknown)
    assert caught.value.code is ExitCode.BAD_TARGET
    with pytest.raises(ToolchainError, match="2 mistakes in this recipe") as caught:
        load(folder, unknown.replace("cosine = 0.99", "cosin = 0.99"))
    assert caught.value.code is ExitCode.BAD_RECIPE


def test_one_edit_makes_one_line(folder: Path) -> None:
    assert len(mistakes(folder, ("max = 64", "min = 65\nmax = 64"))) == 1


def test_whole_number_inputs_need_a_range_only_where_no_data_gives_one(folder: Path) -> None:
    whole = GOOD.replace('"float32"', '"int64"')
    load(folder, whole)
    bare = whole.split("[data]")[0]
    assert any("model.inputs[0].low: got nothing" in line for line in mistakes(folder, text=bare))
    load(folder, bare.replace("pad = 0", "low = 0\nhigh = 9"))


def test_a_function_source_needs_inputs_or_example_inputs(folder: Path) -> None:
    text = 'schema = 1\nname = "a"\nversion = "1.0.0"\ntargets = ["host"]\n[model]\nsource = "net.py:build"\n'
    assert mistakes(folder, text=text) == (
        "recipe.toml: model.inputs: got nothing; allowed: [[model.inputs]] tables, or model.example_inputs",
    )
    assert load(folder, text + 'example_inputs = "net.py:example"\n').model.inputs == ()
    assert load(folder, text.replace("net.py:build", "net.onnx")).model.source == "net.onnx"


def test_a_newer_schema_is_named_before_its_keys_are_taken_for_mistakes(folder: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        load(folder, "schema = 2\nsomething_new = 1\n")
    assert "made for schema 2; this version of toolchain understands up to 1" in caught.value.what
    assert "upgrade" in caught.value.hint
    assert caught.value.details == ()


def test_a_syntax_error_has_file_line_and_column(folder: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        load(folder, 'schema = 1\nname = "a\n')
    assert caught.value.where == f"{folder / 'recipe.toml'}, line 2, column 10"
    assert caught.value.code == ExitCode.BAD_RECIPE


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_told_apart(folder: Path) -> None:
    with pytest.raises(ToolchainError, match="there is no such recipe file"):
        load_recipe(folder / "none.toml")
    with pytest.raises(ToolchainError, match="this is a folder"):
        load_recipe(folder)
    (folder / "bad.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ToolchainError, match="not UTF-8 text: bad byte at offset 8"):
        load_recipe(folder / "bad.toml")


def test_gates_of_a_target_replace_the_general_ones_key_by_key(folder: Path) -> None:
    recipe = load(folder)
    small = recipe.gates_for("cortex-a53")
    assert (small.size_mb, small.cosine, small.unmeasured, dict(small.targets)) == (1.0, 0.99, "allow", {})
    assert recipe.gates_for("x86-64-v3").size_mb == 5
    assert recipe.gates_for("board").latency_ms == 3


def test_gates_may_name_an_own_profile_by_its_path(folder: Path) -> None:
    recipe = load(folder, GOOD.replace("[gates.targets.board]", '[gates.targets."own/board.toml"]'))
    assert recipe.gates_for("board").latency_ms == 3


def test_the_root_is_the_repository_then_the_project_then_the_folder(folder: Path) -> None:
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "net.onnx").write_bytes(b"")
    text = 'schema = 1\nname = "a"\nversion = "1.0.0"\ntargets = ["host"]\n[model]\nsource = "net.onnx"\n'
    assert load(inner, text).root == inner.resolve()
    (folder / "a" / "pyproject.toml").write_text("")
    assert load(inner, text).root == (folder / "a").resolve()
    (folder / ".git").mkdir()
    assert load(inner, text).root == folder.resolve()


def test_the_json_form_is_the_same_wherever_the_recipe_lies(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    for entry in ("net.py", "net.safetensors"):
        (other / entry).write_bytes(b"")
    (other / "own").mkdir()
    (other / "own" / "board.toml").write_bytes((folder / "own" / "board.toml").read_bytes())
    first, second = load(folder).to_json(), load(other, "# a comment\n" + GOOD).to_json()
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert str(folder) not in json.dumps(first)


def test_importing_recipes_imports_nothing_heavy() -> None:
    program = "import sys, toolchain.recipe; print(*sorted({'numpy', 'torch', 'tvm', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == ""


def test_the_committed_schemas_are_current(tmp_path: Path) -> None:
    for written in write_schemas(tmp_path):
        committed = REPO / "docs" / "schemas" / written.name
        assert written.read_text() == committed.read_text(), "run `python -m toolchain.schemas`"


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 99)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["batch", "fp32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _places(tree: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [at] if at else []
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        found += _places(value, (*at, key))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_recipe_the_answer_is_a_list_of_mistakes(data: st.DataObject, folder: Path) -> None:
    raw = tomllib.loads(GOOD)
    *parents, last = data.draw(st.sampled_from(_places(raw)))
    parent: Any = raw
    for part in parents:
        parent = parent[part]
    parent[last] = data.draw(_VALUES)
    problems = [*shape_problems(Recipe, raw), *sense_problems(raw, folder, {})]
    lines = [problem.line("recipe.toml") for problem in problems]
    assert not [line for line in lines if "see the JSON Schema" in line]
    if not problems:
        Recipe.model_validate(raw)


def test_a_python_file_in_the_place_of_a_recipe_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import torch\n")
    with pytest.raises(ToolchainError, match="not valid TOML") as caught:
        load_recipe(tmp_path / "model.py")
    assert caught.value.hint == "a recipe is a TOML file; is model.py one?"
