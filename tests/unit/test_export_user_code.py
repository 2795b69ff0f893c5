"""Loading functions of the user's repository, and what is said when that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.user_code import load_function


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def failure(reference: str, root: Path) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        load_function(reference, root, "model.source").call()
    return caught.value


def test_helpers_beside_the_file_at_the_root_and_relative_ones_import(tmp_path: Path) -> None:
    write(tmp_path, "at_root_helper.py", "A = 1\n")
    write(tmp_path, "pack_uc/beside_helper.py", "B = 2\n")
    write(
        tmp_path, "pack_uc/model.py",
        "import at_root_helper, beside_helper\nfrom .beside_helper import B\n"
        "def build():\n    return at_root_helper.A + beside_helper.B + B\n",
    )  # fmt: skip
    function = load_function("pack_uc/model.py:build", tmp_path)
    assert function.call() == 5
    assert function() == 5
    assert function.function.__module__ == "pack_uc.model"


def test_two_functions_of_one_file_share_its_module(tmp_path: Path) -> None:
    write(tmp_path, "state.py", "STATE = []\ndef add():\n    STATE.append(1)\ndef count():\n    return len(STATE)\n")
    load_function("state.py:add", tmp_path).call()
    assert load_function("state.py:count", tmp_path).call() == 1


def test_a_file_named_like_a_standard_module_does_not_replace_it(tmp_path: Path) -> None:
    write(tmp_path, "json.py", "def build():\n    return 7\n")
    before = sys.modules["json"]
    assert load_function("json.py:build", tmp_path).call() == 7
    assert sys.modules["json"] is before


def test_a_folder_named_like_an_installed_package_keeps_its_relative_imports(tmp_path: Path) -> None:
    write(tmp_path, "click/part.py", "VALUE = 11\n")
    write(tmp_path, "click/model.py", "from .part import VALUE\nimport click\ndef build():\n    return VALUE, click\n")
    value, module = load_function("click/model.py:build", tmp_path).call()
    assert value == 11
    assert module.Command


def test_a_missing_file_gets_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path, "nets/model.py", "")
    error = failure("nets/modle.py:build", tmp_path)
    assert error.code is ExitCode.BAD_RECIPE
    assert "did you mean 'model.py'" in error.what
    assert error.where == "model.source = 'nets/modle.py:build'"
    assert "folder 'other'" in failure("other/model.py:build", tmp_path).what


def test_a_wrong_function_name_gets_a_suggestion_and_the_list(tmp_path: Path) -> None:
    write(tmp_path, "m.py", "from os.path import join\nVALUE = 3\ndef build():\n    pass\ndef train():\n    pass\n")
    error = failure("m.py:biuld", tmp_path)
    assert error.code is ExitCode.BAD_RECIPE
    assert "did you mean 'build'" in error.what
    assert error.hint == "the file defines: build, train"
    assert "'VALUE' is not a function" in failure("m.py:VALUE", tmp_path).what


@pytest.mark.parametrize("reference", ["m.py", "m:build", "m.py:", "m.py:a b", ""])
def test_a_reference_of_another_form(tmp_path: Path, reference: str) -> None:
    error = failure(reference, tmp_path)
    assert error.code is ExitCode.BAD_RECIPE
    assert "allowed: 'file.py:function'" in error.what


def test_an_import_that_raises_names_the_line_in_the_helper(tmp_path: Path) -> None:
    write(tmp_path, "breaks_uc.py", "X = 1\nY = {}['missing']\n")
    write(tmp_path, "m2.py", "import breaks_uc\ndef build():\n    pass\n")
    error = failure("m2.py:build", tmp_path)
    assert error.code is ExitCode.USER_CODE
    assert error.where == "breaks_uc.py:2"
    assert "KeyError: 'missing'" in error.what
    assert "Traceback" in error.debug
    assert "Traceback" not in error.render()


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    write(tmp_path, "m3.py", "def build():\n    return 1\n\ndef not python\n")
    error = failure("m3.py:build", tmp_path)
    assert error.where == "m3.py:4"
    assert "SyntaxError" in error.what


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    write(tmp_path, "m4.py", "import no_such_package_here\n")
    error = failure("m4.py:build", tmp_path)
    assert "No module named 'no_such_package_here'" in error.what
    assert error.where == "m4.py:1"


def test_a_function_that_raises_or_exits(tmp_path: Path) -> None:
    write(
        tmp_path,
        "m5.py",
        "import sys\ndef build():\n    raise ValueError('bad\\nweights')\ndef leave():\n    sys.exit(3)\n",
    )
    error = failure("m5.py:build", tmp_path)
    assert error.code is ExitCode.USER_CODE
    assert error.where == "m5.py:3"
    assert error.what == "m5.py:build raised ValueError: bad weights"
    assert failure("m5.py:leave", tmp_path).where == "m5.py:5"


def test_the_innermost_own_line_is_named_when_a_library_raises(tmp_path: Path) -> None:
    write(tmp_path, "m6.py", "import json\ndef build():\n    return json.loads('{')\n")
    assert failure("m6.py:build", tmp_path).where == "m6.py:3"
