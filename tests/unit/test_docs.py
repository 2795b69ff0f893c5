"""README and docs name only what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolchain.cli.commands import COMMANDS
from toolchain.errors import ExitCode
from toolchain.target import list_targets

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not ((ROOT / page).parent / link).exists()]
    assert missing == []


def test_the_readme_leads_to_every_page_of_the_docs() -> None:
    text = (ROOT / "README.md").read_text()
    pages = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")]
    assert [page for page in pages if f"]({page})" not in text] == []


def test_the_readme_names_commands_make_goals_targets_and_recipes_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"toolchain ([a-z]+) [a-zA-Z/`]", text)) <= set(COMMANDS)
    for command in COMMANDS:
        assert re.search(rf"`{command}\b", text), command
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {"release"}
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", text)) <= goals
    shipped = text[text.index("Shipped targets:") : text.index("explains one")]
    assert set(re.findall(r"`([a-z0-9-]+)`", shipped)) == set(list_targets())
    recipes = {path.stem for path in ROOT.glob("recipes/*.toml")}
    assert {name for name in recipes if f"`{name}`" not in text} == set()


def test_the_exit_codes_page_lists_every_code_by_number_and_name() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(int(code), code.name) for code in ExitCode]
