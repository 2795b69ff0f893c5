"""The files that a recipe's release depends on, as variables for make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.python_source import imported_files
from toolchain.scaffold import import_folders

if TYPE_CHECKING:
    from toolchain.recipe import Recipe


def release_sources(recipe: Recipe) -> list[Path]:
    """The recipe, its own target profiles, the checkpoint or model file, the Python files that it names, and
    those of the repository that they import; absolute, sorted, the recipe first.

    What the Python functions open while they run is not among them.
    """
    code: set[Path] = set()
    other: set[Path] = set()
    for reference in _references(recipe):
        path = recipe.folder / reference.rpartition(":")[0] if ".py:" in reference else recipe.folder / reference
        (code if path.suffix == ".py" else other).add(path.resolve())
    other |= {(recipe.folder / entry).resolve() for entry in recipe.targets if entry.endswith(".toml")}
    code.update(imported_files(code, import_folders(recipe.root, *sorted(code))))
    existing = {path for path in code | other if path.is_file()}
    return [recipe.path.resolve(), *sorted(existing - {recipe.path.resolve()})]


def make_variables(recipe: Recipe, folder: Path) -> str:
    """``RELEASE_NAME``, ``RELEASE_VERSION`` and ``RELEASE_SOURCES`` for a Makefile that runs in ``folder``."""
    lines = [_escaped(os.path.relpath(path, folder.resolve())) for path in release_sources(recipe)]
    head = f"RELEASE_NAME := {recipe.name}\nRELEASE_VERSION := {recipe.version}\n"
    return head + "RELEASE_SOURCES := " + " \\\n  ".join(lines) + "\n"


def _references(recipe: Recipe) -> Iterator[str]:
    model, data, metric = recipe.model, recipe.data, recipe.metric
    yield model.source
    metric_kind = metric.kind if metric is not None and ".py:" in metric.kind else None
    yield from model.labels.values()
    for reference in (model.checkpoint, model.example_inputs, data.calibration, data.evaluation, metric_kind):
        if reference is not None:
            yield reference


def _escaped(path: str) -> str:
    # GNU make manual, "Rule Syntax" and "Using Wildcard Characters"; `#` needs no more in an assignment.
    for character in ("\\", " ", "#", "%", ":", "*", "?", "["):
        path = path.replace(character, "\\" + character)
    return path.replace("$", "$$")
