"""The public Python API."""

from __future__ import annotations

import subprocess
import sys

import pytest

import toolchain


def test_functions_are_not_hidden_by_the_modules_of_their_names() -> None:
    code = (
        "import toolchain, toolchain.build, toolchain.plan\n"
        "from toolchain import build, plan\n"
        "import toolchain.cli.build\n"
        "assert callable(build) and callable(plan)\n"
        "assert toolchain.build is build is toolchain.build and toolchain.plan is plan\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_second_call_is_as_good_as_the_first() -> None:
    for _ in range(2):
        with pytest.raises(toolchain.ToolchainError):
            toolchain.build("nosuch.toml")


def test_every_name_of_the_interface_is_there() -> None:
    for name in toolchain.__all__:
        assert getattr(toolchain, name) is not None
