"""Where the files of ``toolchain init`` go: under the usual names, or the model's where another model has those."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_RECIPE = "recipe.toml"
WORKFLOWS = Path(".github/workflows")
_IGNORED = re.compile(r"(\*\*/|/)?artifacts(/|/\*|/\*\*)?")


@dataclass(frozen=True, slots=True)
class Places:
    """The files of one model.

    Attributes:
        recipe, fragment, workflow: their paths.
        goal: what ``make`` builds by the fragment.
        prefix: of the fragment's make variables, so that a Makefile can include several fragments.
    """

    recipe: Path
    fragment: Path
    workflow: Path
    goal: str
    prefix: str


def recipe_place(folder: Path, name: str, force: bool) -> Path:
    """``recipe.toml`` in ``folder``, or ``NAME.toml`` where that is the recipe of another model."""
    usual = folder / DEFAULT_RECIPE
    found = re.search(r'^name\s*=\s*["\'](.*?)["\']', _text(usual), re.MULTILINE)
    return folder / f"{name}.toml" if not force and found and found[1] != name else usual


def places(recipe: Path, root: Path, name: str, force: bool) -> Places:
    """The fragment lies beside the recipe, the workflow in the repository's root."""
    fragment = _free(recipe.parent / "release.mk", name, force)
    workflow = _free(root / WORKFLOWS / "release.yml", name, force)
    if fragment.name == "release.mk":
        return Places(recipe, fragment, workflow, "release", "RELEASE")
    return Places(recipe, fragment, workflow, f"release-{name}", "RELEASE_" + re.sub(r"\W", "_", name.upper()))


def headline(name: str) -> str:
    """The first line of a fragment or workflow: tells whose it is."""
    return f"# Builds the release of {name}"


def extended_gitignore(path: Path) -> str | None:
    """The text of ``path`` with releases ignored, or None if it does so already."""
    text = _text(path)
    if any(_IGNORED.fullmatch(line.strip()) for line in text.splitlines()):
        return None
    return text + ("\n" if text and not text.endswith("\n") else "") + "artifacts/\n"


def _free(usual: Path, name: str, force: bool) -> Path:
    """``usual`` unless it is somebody else's: then the same with the model's name."""
    own = not usual.exists() or _text(usual).startswith((f"{headline(name)}.  ", f"{headline(name)} and "))
    return usual if own or force else usual.with_name(f"{usual.stem}-{name}{usual.suffix}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
