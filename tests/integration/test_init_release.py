"""From `toolchain init` to a real release with `make release`, editing only what init says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolchain.cli.commands import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]

MODEL = """
import torch
from layers import hidden


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = hidden(), torch.nn.Linear(16, 4)

    def forward(self, features):
        return self.last(torch.relu(self.first(features)))


def build():
    torch.manual_seed(3)
    return Net()
"""
LAYERS = "import torch\n\n\ndef hidden():\n    return torch.nn.Linear(8, 16)\n"
EXAMPLE = "\n\ndef example():\n    return (torch.ones(2, 8),)\n"


class Repository:
    """A user's git repository with a model in ``nets/``, and the command ``toolchain`` on its PATH."""

    def __init__(self, base: Path, example: str = "") -> None:
        self.root, self.cache = base / "theirs", base / "cache"
        (self.root / "nets").mkdir(parents=True)
        subprocess.run(["git", "init", "-q", str(self.root)], check=True)
        (self.root / "nets" / "tiny.py").write_text(MODEL + example)
        (self.root / "nets" / "layers.py").write_text(LAYERS)
        command = base / "bin" / "toolchain"
        command.parent.mkdir()
        checkout = Path(__file__).parents[2]
        command.write_text(f'#!/bin/sh\nPYTHONPATH={checkout} exec {sys.executable} -m toolchain.cli.main "$@"\n')
        command.chmod(0o755)
        path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "TOOLCHAIN_CACHE": str(self.cache)}

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def index(self) -> Path:
        return self.root / "artifacts" / "tiny" / "0.1.0" / "index.json"

    def call(self, *command: str) -> str:
        """What a command prints on standard output; it must succeed."""
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=self.environment, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fill_in(self, printed: str, value: str) -> None:
        """Edit the lines that init's output names, and nothing else."""
        told = re.search(r"next: replace FILL_IN in recipe.toml \(line ([\d, ]+)\)", printed)
        assert told, printed
        lines = self.recipe.read_text().splitlines(keepends=True)
        for number in map(int, told[1].split(",")):
            lines[number - 1] = lines[number - 1].replace('"FILL_IN"', value)
        self.recipe.write_text("".join(lines))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository that made its first release with make."""
    made = Repository(tmp_path_factory.mktemp("released"))
    printed = made.call("toolchain", "init", "nets/tiny.py:build")
    made.fill_in(printed, "8")
    (made.root / "Makefile").write_text(next(re.finditer("Makefile: (include .*)", printed))[1] + "\n")
    assert re.search(r"release (\S+/)?artifacts/tiny/0.1.0 written", made.call("make", "release"))
    assert made.index.is_file()
    return made


def test_make_release_does_nothing_again_and_builds_when_the_model_changed(released: Repository) -> None:
    before = released.index.read_bytes(), released.index.stat().st_mtime_ns
    assert "Nothing to be done for 'release'" in released.call("make", "release")
    assert (released.index.read_bytes(), released.index.stat().st_mtime_ns) == before

    (released.root / "nets" / "tiny.py").touch()
    assert re.search(r"release \S+ unchanged", released.call("make", "release"))
    assert released.index.read_bytes() == before[0]
    assert "Nothing to be done for 'release'" in released.call("make", "release")

    layers = released.root / "nets" / "layers.py"
    layers.write_text(LAYERS.replace("return torch", "torch.manual_seed(4)\n    return torch"))
    assert re.search(r"release \S+ written", released.call("make", "release"))
    assert released.index.read_bytes() != before[0]
    assert "Nothing to be done for 'release'" in released.call("make", "release")


def test_the_workflow_is_yaml_whose_commands_exist_and_work(released: Repository) -> None:
    workflow: dict[Any, Any] = yaml.safe_load((released.root / ".github" / "workflows" / "release.yml").read_text())
    # YAML 1.1 reads the key "on" as true.
    assert set(workflow) == {"name", True, "permissions", "env", "jobs"}
    (job,) = workflow["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)
    calls = [line for script in scripts for line in script.splitlines() if line.startswith("toolchain ")]
    assert calls
    assert {call.split()[1] for call in calls} <= set(COMMANDS)
    for call in calls:
        released.call("sh", "-euc", call)
    kept = next(step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    assert (released.root / kept / "0.1.0" / "index.json") == released.index
    assert released.index.is_file()


def test_a_model_with_an_example_function_builds_without_any_edit(tmp_path: Path) -> None:
    theirs = Repository(tmp_path, EXAMPLE)
    printed = theirs.call("toolchain", "init", "nets/tiny.py:build")
    assert "inputs and their sizes from nets/tiny.py:example" in printed
    assert "FILL_IN" not in printed + theirs.recipe.read_text()
    printed = theirs.call("toolchain", "build", "recipe.toml", "--no-measure")
    assert re.search(r"release (\S+/)?artifacts/tiny/0.1.0 written", printed)
    evidence = "verified on 16 random inputs: the recipe has no data.evaluation"
    assert evidence in printed
    inspected = theirs.call("toolchain", "inspect", "artifacts/tiny/0.1.0")
    assert "features float32[2, 8]" in inspected
    assert evidence in inspected
    assert f"- V{evidence[1:]}." in theirs.call("toolchain", "inspect", "--report", "artifacts/tiny/0.1.0")
