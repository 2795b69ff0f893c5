"""`toolchain targets` lists the shipped profiles and explains one."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from toolchain.cli.targets import command
from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import CPUINFO_VARIABLE
from toolchain.target import load_target
from toolchain.target_words import fields

SHIPPED = {
    "x86-64-v3", "x86-64-v4", "host", "cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1",
    "cuda-sm80", "cuda-sm90",
}  # fmt: skip
OLD_X86 = "processor : 0\nvendor_id : GenuineIntel\nmodel name : Old One\nflags : fpu lm sse sse2 cx8 cmov mmx fxsr\n"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_shipped_profile_is_listed_with_how_it_is_executed() -> None:
    rows = {entry["name"]: entry for entry in json.loads(run("--json"))}
    assert set(rows) >= SHIPPED
    lines = {line.split()[0]: line for line in run().splitlines()[1:]}
    assert set(lines) == set(rows)
    for name, row in rows.items():
        assert row["executed"] in lines[name]
        assert row["precisions"] == list(load_target(name).numerics.precisions)
        assert (row["executed"] == "native") == (row["runs_here"] and row["measured_here"])


def test_the_host_profile_is_native_and_another_architecture_is_not() -> None:
    rows = {entry["name"]: entry for entry in json.loads(run("--json"))}
    assert rows["host"]["executed"] == "native"
    foreign = "cortex-a53" if rows["host"]["arch"] == "x86_64" else "x86-64-v3"
    assert rows[foreign]["executed"].startswith("not on this machine: ")
    assert rows[foreign]["arch"] in rows[foreign]["executed"]


def test_a_machine_without_the_features_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(OLD_X86)
    monkeypatch.setenv(CPUINFO_VARIABLE, str(tmp_path / "cpuinfo"))
    rows = {entry["name"]: entry for entry in json.loads(run("--json"))}
    assert "avx2" in rows["x86-64-v3"]["executed"]
    assert "cannot run them: needs CPU features" in run("show", "x86-64-v3")


def test_show_explains_every_field_of_the_profile() -> None:
    text = run("show", "cortex-a76")
    profile = load_target("cortex-a76")
    for field in fields(profile):
        assert field.key in text
        assert field.meaning, f"{field.key} has no meaning"
        assert field.meaning in text
    assert "TVM compiles for LLVM's cortex-a76" in text
    assert "s8 activations times s8 weights" in text
    assert profile.runtime.abi.min in text


def test_show_says_what_a_gpu_needs() -> None:
    text = run("show", "cuda-sm90")
    assert "TVM compiles for CUDA sm_90" in text
    assert "a device that runs sm_90 code" in text


def test_show_as_json_holds_the_whole_profile_and_the_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(run("show", "cuda-sm80", "--json"))
    assert facts["profile"]["cuda"]["arch"] == "sm_80"
    assert facts["requirements"]["cuda_arch"] == "sm_80"
    assert all(tool["install"] for tool in facts["missing_tools"])


def test_a_profile_of_the_user_works_by_its_path(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('schema = 1\nname = "own-board"\nextends = "cortex-a72"\n[execute]\nhow = "none"\n')
    text = run("show", str(own))
    assert text.startswith("own-board")
    assert "cannot measure them: the profile says execute.how = 'none'" in text


def test_an_unknown_target_is_refused_with_a_suggestion() -> None:
    result = CliRunner().invoke(command, ["show", "cortex-a35"])
    assert isinstance(result.exception, ToolchainError)
    assert result.exception.code is ExitCode.BAD_TARGET
    assert "did you mean 'cortex-a" in result.exception.render()


def test_a_name_without_show_points_to_show() -> None:
    result = CliRunner().invoke(command, ["cortex-a53"])
    assert result.exit_code == ExitCode.USAGE
    assert "toolchain targets show cortex-a53" in result.stderr
