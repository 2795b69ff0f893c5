"""A small repository with a model, data and a recipe, and the command line to use on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

MODEL = """
import torch
from helper import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, WIDTH)
        self.last = torch.nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

def build():
    torch.manual_seed(1)
    return Net()
"""

DATA = """
from pathlib import Path

import numpy as np

TABLE = Path(__file__).parent / "table.csv"

def calibration():
    values = np.loadtxt(TABLE, delimiter=",", dtype=np.float32)
    for start in range(0, len(values), 8):
        yield {"x": values[start:start + 8]}

def evaluation():
    generator = np.random.default_rng(5)
    for _ in range(3):
        x = generator.normal(size=(8, 8)).astype(np.float32)
        yield {"x": x}, np.zeros(8, np.int64)
"""

RECIPE = """
schema = 1
name = "tiny"
version = "0.1.0"
targets = ["x86-64-v3"]
[model]
source = "model.py:build"
outputs = ["y"]
[[model.inputs]]
name = "x"
dtype = "float32"
shape = ["batch", 8]
[model.dims.batch]
min = 1
max = 16
batch = true
[data]
calibration = "data.py:calibration"
evaluation = "data.py:evaluation"
[metric]
kind = "top1"
[quantize]
precisions = ["fp32", "int8-static"]
[measure]
runs = 10
warmup = 1
max_seconds = 2.0
[gates]
cosine = 0.9
"""


def make_repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "helper.py").write_text("WIDTH = 32\n")
    (folder / "data.py").write_text(DATA)
    rows = [",".join(f"{(i * 7 + j * 3) % 11 / 5 - 1:.3f}" for j in range(8)) for i in range(16)]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


class Shop:
    """A repository, a cache and an output folder, and the command line to use them with."""

    def __init__(self, base: Path) -> None:
        self.repository = make_repository(base / "repository")
        self.cache, self.output = base / "cache", base / "out"

    def copied(self, base: Path) -> Shop:
        """The same repository and cache in another folder, to change at will; it has built nothing yet."""
        made = Shop.__new__(Shop)
        made.repository, made.cache, made.output = base / "moved", base / "cache", base / "out"
        shutil.copytree(self.repository, made.repository)
        shutil.copytree(self.cache, made.cache)
        return made

    @property
    def recipe(self) -> Path:
        return self.repository / "recipe.toml"

    @property
    def release(self) -> Path:
        return self.output / "tiny" / "0.1.0"

    def call(self, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolchain.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)

    def build_arguments(self, *extra: str | Path) -> list[str | Path]:
        return ["build", self.recipe, "--cache", self.cache, "--output", self.output, "--quiet", "--json", *extra]

    def text_arguments(self, *extra: str | Path) -> list[str | Path]:
        """As :meth:`build_arguments`, for a person."""
        return [a for a in self.build_arguments(*extra) if a != "--json"]

    def build(self, *extra: str | Path, env: dict[str, str] | None = None) -> tuple[int, dict[str, object], str]:
        done = self.call(*self.build_arguments(*extra), env=env)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def ran(self, *extra: str | Path, env: dict[str, str] | None = None) -> set[str]:
        """Build, and return the stages that ran."""
        code, result, errors = self.build(*extra, env=env)
        assert code == 0, errors
        return {s["id"] for s in result["stages"] if s["status"] == "ran"}  # type: ignore[attr-defined, index]
