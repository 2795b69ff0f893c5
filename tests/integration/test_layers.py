"""The contracts of import-linter in pyproject.toml refuse what they are there to refuse."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> str:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return re.sub(r"\s+", " ", done.stdout)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    shutil.copytree(ROOT / "toolchain", folder / "toolchain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def append(module: Path, line: str) -> None:
    module.write_text(module.read_text() + f"\n{line}\n")


def test_each_contract_is_broken_by_what_it_forbids_and_kept_without(copied: Path) -> None:
    before = lint(copied)
    assert "0 broken" in before, before
    package = copied / "toolchain"
    append(package / "recipe.py", "import toolchain.build")
    append(package / "stages" / "verify.py", "import toolchain.stages.measure")
    append(package / "bundle" / "read.py", "import torch")
    append(package / "runtime" / "contract.py", "import toolchain.export.contract")
    append(package / "quantize" / "static.py", "import tvm")
    (package / "unplaced.py").write_text("")
    after = lint(copied)
    assert "0 kept, 4 broken" in after
    assert "toolchain.recipe -> toolchain.build" in after
    assert "unplaced" in after
    assert "toolchain.stages.verify -> toolchain.stages.measure" in after
    assert "toolchain.bundle.read -> torch" in after
    assert "toolchain.runtime.contract -> toolchain.export.contract" in after
    assert "toolchain.quantize.static -> tvm" in after


def test_the_runtime_imports_nothing_of_tvm_but_its_runtime() -> None:
    found: set[str] = set()
    for path in [*ROOT.glob("toolchain/runtime/*.py"), *ROOT.glob("toolchain/bundle/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.startswith("tvm")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tvm"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert found == {"tvm", "tvm.runtime.vm"}
