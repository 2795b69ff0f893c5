"""docs/exit-codes.md lists every exit code, and no other."""

import re
from pathlib import Path

import pytest

from toolchain.errors import ExitCode

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"
ROWS = {
    int(code): name for code, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \| \S", DOCUMENT.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_exit_code_is_documented_under_its_name(code: ExitCode) -> None:
    assert ROWS.get(code.value) == code.name


def test_no_other_code_is_documented() -> None:
    assert set(ROWS) == {code.value for code in ExitCode}
