"""Tuning records: names of loop nests, which choices fit, the file, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import detect_host
from toolchain.plan import make_plan
from toolchain.recipe import load_recipe
from toolchain.target import load_target
from toolchain.tvm.choices import Choices, by_rule, candidates
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.machine import Machine
from toolchain.tvm.nests import Choice, Nest
from toolchain.tvm.race import race
from toolchain.tvm.records import from_json, load_records, save_records, to_json

SAME = Conv2d((1, 1), (1, 1, 1, 1), (1, 1), 1)
CONV = Nest.of("float32", ["n", 64, 56, 56], (64, 64, 3, 3), SAME, 512, 32)
STRIDED = Nest.of("float32", [2, 32, 28, 28], (64, 16, 5, 3), Conv2d((2, 1), (2, 1, 2, 1), (1, 2), 2), 256, 16)
FIRST = Nest.of("float32", [1, 3, 224, 224], (64, 3, 7, 7), Conv2d((2, 2), (3,) * 4, (1, 1), 1), 512, 32, plain=True)
DENSE = Nest.of("float16", ["m", 384], (384, 1536), None, 512, 32)
NESTS = [CONV, STRIDED, FIRST, DENSE, Nest.of("float32", [7, 13], (13, 5), None, 128, 32)]
KEY = (
    "conv float32 blocked data ?x64x56x56 weights 64x64x3x3 stride 1x1 pad 1x1x1x1 dilation 1x1 groups 1 "
    "vector 512 registers 32"
)


def machine(nest: Nest, choices: Choices | None = None) -> Machine:
    return Machine({}, "cpu", "x86_64", nest.vector_bits, nest.registers, choices=choices or Choices())


def test_names_never_change_as_committed_files_hold_them() -> None:
    assert str(CONV) == KEY
    assert str(DENSE) == "dense float16 data ?x384 weights 384x1536 vector 512 registers 32"
    assert [str(Choice(2, 7, 2)), str(Choice(1, 6, 4, winograd=True))] == ["2x7 x 2", "winograd 1x6 x 4"]


@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_a_name_says_all(nest: Nest) -> None:
    assert Nest.parse(str(nest)) == nest


@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_the_rule_and_all_candidates_fit_and_differ(nest: Nest) -> None:
    rule, others = by_rule(nest, machine(nest)), candidates(nest, machine(nest), 12)
    assert nest.problem(rule) == ""
    assert [nest.problem(choice) for choice in others] == [""] * len(others)
    assert len({rule, *others}) == len(others) + 1
    assert len(others) >= 3


def test_the_other_way_is_tried_first_where_winograd_applies() -> None:
    rule, others = by_rule(CONV, machine(CONV)), candidates(CONV, machine(CONV), 12)
    assert rule.winograd
    assert not others[0].winograd
    assert not any(choice.winograd for choice in candidates(STRIDED, machine(STRIDED), 12))


@pytest.mark.parametrize(
    ("nest", "choice", "why"),
    [
        (CONV, "1x7 x 4", "needs 33 vector registers, there are 32"),
        (CONV, "15x1 x 1", "has 15 single values, at most 14"),
        (CONV, "1x1 x 5", "has 5 vectors, at most 4"),
        (CONV, "3x1 x 1", "has 3 image rows, which must divide"),
        (CONV, "winograd 2x2 x 2", "has several rows"),
        (STRIDED, "winograd 1x2 x 2", "which does not apply here"),
        (STRIDED, "1x2 x 3", "which must divide the 4 of a group"),
        (DENSE, "2x2 x 2", "which must divide"),
        (NESTS[4], "1x8 x 1", "has 8 columns, the output has 7"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, nest: Nest, choice: str, why: str
) -> None:
    parsed = Choice.parse(choice)
    assert parsed is not None
    save_records(tmp_path / "r.tune.toml", {"x86-64-v4": {nest: parsed}})
    with pytest.raises(ToolchainError) as caught:
        load_records(tmp_path / "r.tune.toml")
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert why in caught.value.details[0]
    assert str(nest) in caught.value.details[0]


def test_the_file_is_sorted_and_read_as_it_was_written(tmp_path: Path) -> None:
    fast = {DENSE: Choice(1, 8, 3), CONV: Choice(1, 6, 4, winograd=True)}
    path = tmp_path / "r.tune.toml"
    save_records(path, {"x86-64-v4": fast, "x86-64-v3": {STRIDED: Choice(1, 4, 2)}, "none": {}})
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["schema = 1", '["x86-64-v3"]']
    assert lines[3:] == ['["x86-64-v4"]', f'"{CONV}" = "winograd 1x6 x 4"', f'"{DENSE}" = "1x8 x 3"']
    assert load_records(path) == {"x86-64-v4": fast, "x86-64-v3": {STRIDED: Choice(1, 4, 2)}}
    before = path.read_bytes()
    save_records(path, load_records(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert from_json(to_json(fast)) == fast


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = 2\n", "made for schema 2"),
        ("[host]\n", "schema: got nothing; allowed: 1"),
        ("schema = true\n", "schema: got true; allowed: 1"),
        ("schema = 1\nhost = 3\n", "host: got 3; allowed: a table"),
        (f'schema = 1\n[host]\n"{KEY} fast" = "1x6 x 4"\n', "allowed: a loop nest as `toolchain tune` writes it"),
        (f'schema = 1\n[host]\n"{KEY.replace("groups 1", "groups 7")}" = "1x6 x 4"\n', "allowed: a loop nest"),
        (f'schema = 1\n[host]\n"{KEY}" = "6 x 4"\n', "got '6 x 4'; allowed: '1x6 x 4'"),
        (f'schema = 1\n[host]\n"{KEY}" = 6\n', "got 6; allowed: '1x6 x 4'"),
        ("schema = 1\n[host\n", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_in_one_message(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.tune.toml").write_text(text)
    with pytest.raises(ToolchainError, match=r"r\.tune\.toml") as caught:
        load_records(tmp_path / "r.tune.toml")
    assert caught.value.code is ExitCode.BAD_RECIPE
    assert words in caught.value.render()


def test_all_bad_records_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "r.tune.toml").write_text(f'schema = 1\n[host]\n"x" = "1x1 x 1"\n"{KEY}" = "9x9 x 9"\n')
    with pytest.raises(ToolchainError, match="2 records can't be used") as caught:
        load_records(tmp_path / "r.tune.toml")
    assert len(caught.value.details) == 2


def test_a_record_comes_before_the_rule_and_only_for_its_very_loop_nest() -> None:
    tuned = Choices({CONV: Choice(1, 6, 4, winograd=True)})
    target = machine(CONV, tuned)
    assert target.choose("float32", ["n", 64, 56, 56], (64, 64, 3, 3), SAME) == Choice(1, 6, 4, winograd=True)
    other = target.choose("float32", ["n", 64, 28, 28], (64, 64, 3, 3), SAME)
    assert other == by_rule(Nest.of("float32", ["n", 64, 28, 28], (64, 64, 3, 3), SAME, 512, 32), target)
    assert tuned.used == 1
    narrow = Machine({}, "cpu", "x86_64", 256, 16, choices=Choices(tuned.records))
    narrow.choose("float32", ["n", 64, 56, 56], (64, 64, 3, 3), SAME)
    assert narrow.choices.used == 0


def test_a_plan_gives_the_fp32_engine_of_the_target_its_records(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'schema = 1\nname = "r"\nversion = "1.0.0"\ntargets = ["x86-64-v4", "x86-64-v3"]\n[model]\nsource = "m.onnx"\n'
    )

    def tuned() -> dict[str, dict[str, str]]:
        loaded = load_recipe(recipe)
        plan = make_plan(loaded, [load_target(t) for t in loaded.targets], detect_host())
        return {n.id: dict(n.options.records) for n in plan.nodes if getattr(n.options, "records", None)}

    assert tuned() == {}
    save_records(tmp_path / "r.tune.toml", {"x86-64-v4": {CONV: Choice(1, 6, 4, winograd=True)}})
    assert tuned() == {"compile[fp32/tvm]@x86-64-v4": {KEY: "winograd 1x6 x 4"}}
    recipe.write_text(recipe.read_text() + '[tvm]\nrecords = "other.toml"\n')
    with pytest.raises(ToolchainError, match="no such file of tuning records"):
        tuned()
    save_records(tmp_path / "other.toml", {"x86-64-v3": {STRIDED: Choice(1, 4, 2)}})
    assert tuned() == {"compile[fp32/tvm]@x86-64-v3": {str(STRIDED): "1x4 x 2"}}


def test_a_race_sees_which_call_takes_longer() -> None:
    def work(loops: int) -> None:
        end = time.process_time() + loops * 5e-5
        while time.process_time() < end:
            pass

    result = race(lambda: work(1), lambda: work(3), 0.05, threads=1)
    assert 2 < result.ratio < 4
    assert result.first < result.second
