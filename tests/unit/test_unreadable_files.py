"""Files that the user may not read are named as such, with what to do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.bundle_samples import MATRIX_CONTRACT

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import parse_contract
from toolchain.runtime.inputs import read_inputs
from toolchain.user_code import load_function

_NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter; the test runs as a user whom a file's mode binds."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    user = os.geteuid()
    try:
        yield made
    finally:
        os.seteuid(user)
        shutil.rmtree(made)


def close(path: Path) -> Path:
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(_NOBODY)
    return path


def check(error: ToolchainError, path: Path, code: ExitCode) -> None:
    assert error.code is code
    assert error.what == "this file may not be read"
    assert error.hint == f"let this user read it: chmod u+r {path}"


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.json", "x.png"])
def test_an_input(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    path = close(folder / name)
    with pytest.raises(ToolchainError) as caught:
        read_inputs([str(path)], parse_contract(MATRIX_CONTRACT, "c"))
    check(caught.value, path, ExitCode.BAD_INPUT)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_checkpoint(folder: Path, name: str) -> None:
    import torch

    from toolchain.export.checkpoint import load_checkpoint

    module = torch.nn.Linear(1, 1)
    (folder / name).write_bytes(b"")
    path = close(folder / name)
    with pytest.raises(ToolchainError) as caught:
        load_checkpoint(module, path, name)
    check(caught.value, path, ExitCode.BAD_RECIPE)
    assert caught.value.where == f"model.checkpoint = {name!r}"


def test_the_models_file(folder: Path) -> None:
    (folder / "closed_model.py").write_text("def build(): ...")
    path = close(folder / "closed_model.py")
    with pytest.raises(ToolchainError) as caught:
        load_function("closed_model.py:build", folder)
    check(caught.value, path, ExitCode.BAD_RECIPE)


def test_a_file_that_the_users_code_opens(folder: Path) -> None:
    (folder / "opens.py").write_text(f"def build():\n    return open({str(folder / 'data.csv')!r})\n")
    (folder / "data.csv").write_text("")
    function = load_function("opens.py:build", folder)
    path = close(folder / "data.csv")
    with pytest.raises(ToolchainError, match="raised PermissionError") as caught:
        function.call()
    assert caught.value.where == "opens.py:2"
    assert f"chmod u+r {path}" in caught.value.hint


def test_a_module_that_is_not_installed_is_to_be_installed(folder: Path) -> None:
    (folder / "wants.py").write_text("import not_there_at_all.part\n")
    with pytest.raises(ToolchainError, match="No module named 'not_there_at_all'") as caught:
        load_function("wants.py:build", folder)
    assert caught.value.hint.startswith("install not_there_at_all")
    (folder / "own_part").mkdir()
    (folder / "asks.py").write_text("import own_part.missing\n")
    with pytest.raises(ToolchainError) as caught:
        load_function("asks.py:build", folder)
    assert caught.value.hint.startswith("fix the code")
