"""The command that installs an extra the way the toolchain itself was installed."""

from pathlib import Path

import pytest

from toolchain.install import command_for, install_command
from toolchain.version import __version__


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///a/my%20tree", "dir_info": {"editable": True}}, "pip install -e '/a/my tree[build]'"),
        ({"url": "file:///a/tree", "dir_info": {}}, "pip install '/a/tree[build]'"),
        ({"url": "file:///a/t-1.whl", "archive_info": {}}, "pip install '/a/t-1.whl[build]'"),
        (
            {"url": "https://h/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'toolchain[build] @ git+https://h/r.git@abc'",
        ),
        ({"url": "https://h/t-1.whl", "archive_info": {}}, "pip install 'toolchain[build] @ https://h/t-1.whl'"),
    ],
)
def test_it_repeats_where_the_toolchain_came_from(origin: dict[str, object], command: str) -> None:
    assert command_for("build", origin, None) == command


def test_without_a_record_a_checkout_is_named_or_else_this_very_version() -> None:
    assert command_for("build", None, Path("/a/tree")) == "pip install -e '/a/tree[build]'"
    found = command_for("build", None, None)
    assert found.startswith(f"pip install 'toolchain[build]=={__version__}'  # with the index")


def test_this_installation_is_known() -> None:
    assert install_command("build").startswith("pip install ")
    assert "[build]" in install_command("build")
