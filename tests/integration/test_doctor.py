"""`toolchain doctor` on this machine, and on one where tools are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.errors import ExitCode

HEAVY = ("torch", "onnx", "onnxruntime", "tvm", "onnxscript", "sklearn", "numpy")


def doctor(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PATH": path} if path is not None else {})}
    command = [sys.executable, "-m", "toolchain.cli.main", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_complete_machine_is_ready_with_exit_code_0() -> None:
    done = doctor("--json")
    facts = json.loads(done.stdout)
    assert facts["ready"] is True
    assert (done.returncode, facts["missing"], done.stderr) == (0, [], "")
    targets = {entry["name"]: entry for entry in facts["targets"]}
    assert targets["host"] == {"name": "host", "onnxruntime": [], "tvm": [], "run": [], "measure": []}
    text = doctor().stdout
    assert "to build for this machine: everything is there" in text
    assert all(name in text for name in targets)


def test_without_programs_it_names_them_and_what_installs_them(tmp_path: Path) -> None:
    done = doctor("--json", path=str(tmp_path))
    assert done.returncode == ExitCode.MISSING_TOOL
    facts = json.loads(done.stdout)
    assert (facts["ready"], facts["missing"]) == (False, ["cc"])
    assert "apt-get install gcc" in facts["install"]
    assert "missing to build for this machine: cc" in done.stderr
    assert "apt-get install gcc" in done.stderr
    targets = {entry["name"]: entry for entry in facts["targets"]}
    assert targets["host"]["onnxruntime"] == []
    assert targets["host"]["tvm"] == ["cc: not on PATH"]
    assert "nvcc: not on PATH" in targets["cuda-sm80"]["tvm"]
    text = doctor(path=str(tmp_path)).stdout
    assert "NOT ON PATH" in text
    assert "not everything is there" in text


def test_a_machine_that_runs_but_does_not_build_is_told_so_and_enough_with_run(tmp_path: Path) -> None:
    done = doctor(path=str(tmp_path))
    assert done.returncode == ExitCode.MISSING_TOOL
    assert "this machine can run bundles, not build them" in done.stderr
    assert "toolchain doctor --run" in done.stderr
    done = doctor("--run", path=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "to run bundles here: everything is there" in done.stdout
    assert json.loads(doctor("--json", path=str(tmp_path)).stdout)["can_run"] is True


def test_without_the_build_libraries_it_asks_for_the_extra(tmp_path: Path) -> None:
    """An isolated interpreter that sees the light dependencies only, as after `pip install toolchain`."""
    import importlib.metadata

    for name in ("click", "filelock", "pydantic", "pydantic_core", "platformdirs", "typing_extensions", "toolchain",
                 "annotated_types", "typing_inspection", "colorama", "numpy"):  # fmt: skip
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")}:
            source = Path(str(distribution.locate_file(entry)))
            if source.exists() and not (tmp_path / entry).exists():
                (tmp_path / entry).symlink_to(source)
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from toolchain.cli.main import main; main()"
    command = [sys.executable, "-I", "-S", "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.MISSING_TOOL, done.stderr
    facts = json.loads(done.stdout)
    assert {"torch", "onnx", "onnxruntime", "apache-tvm"} <= set(facts["missing"])
    assert facts["install"][0] == f"pip install -e '{root}[build]'"
    assert facts["targets"][0]["onnxruntime"]
    for target in facts["targets"]:
        cuda = target["name"].startswith("cuda")
        assert cuda == any("no runtime is installed" in reason for reason in target["run"]), target
    measure = {target["name"]: target["measure"] for target in facts["targets"]}
    assert "no runtime is installed" in measure["host"][0]
    text = subprocess.run(command[:-1], capture_output=True, text=True, timeout=60, check=False).stdout
    assert text.count("torch: not installed") == 1
    assert facts["can_run"] is True, "engines ahead of time need no runtime"
    assert facts["runs"].startswith("engines ahead of time alone: no runtime is installed: pip install ")
    told = subprocess.run([*command[:-1], "--run"], capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert "to run bundles here: engines ahead of time alone" in told.stdout
    assert "  every target: build: torch: not installed" in text


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom toolchain.doctor import examine\nexamine(Path('.'))\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_answer_takes_less_than_a_second_of_processor_time() -> None:
    before = os.times()
    assert doctor().returncode == 0
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0, f"{used:.2f} s"


@pytest.mark.parametrize("command", ["targets", "cache", "init", "doctor"])
def test_help_of_each_command_goes_to_standard_output(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toolchain.cli.main", command, "--help"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: toolchain {command}")
    assert done.stderr == ""
