"""``toolchain init``: a recipe, a Makefile fragment and a CI workflow for a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from toolchain.scaffold import PLACEHOLDER, Scaffold, plan_scaffold
from toolchain.scaffold_write import write_scaffold


@click.command()
@click.argument("model", metavar="MODEL.py:FUNCTION", required=False)
@click.option("--name", help="Name of the recipe.  [default: from the model's file or folder]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The recipe's file.  [default: recipe.toml, or NAME.toml where that is another model's]",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@click.option(
    "--dependencies",
    "recipe",
    type=click.Path(path_type=Path),
    metavar="RECIPE",
    help="Write nothing: print the files that the recipe's release depends on, as make variables (release.mk uses it).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None, name: str | None, output: Path | None, force: bool, recipe: Path | None, as_json: bool
) -> None:
    """Write a recipe, release.mk and a CI workflow for the model that FUNCTION of MODEL.py returns.

    The file is parsed, not run.  Nothing is replaced without --force: a second
    model of a repository has its own files, named after it.
    """
    if (model is None) == (recipe is None):
        raise click.UsageError("give either MODEL.py:FUNCTION or --dependencies RECIPE")
    if model is None:
        assert recipe is not None
        _print_dependencies(recipe, as_json)
        return
    scaffold = plan_scaffold(model, output, name, force)
    write_scaffold(scaffold, force)
    if as_json:
        click.echo(json.dumps(_to_json(scaffold), indent=2))
    else:
        _print(scaffold)


def _print_dependencies(path: Path, as_json: bool) -> None:
    from toolchain.dependencies import make_variables, release_sources
    from toolchain.recipe import load_recipe

    recipe = load_recipe(path)
    if as_json:
        facts = {"name": recipe.name, "version": recipe.version, "sources": [str(p) for p in release_sources(recipe)]}
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(make_variables(recipe, Path.cwd()), nl=False)


def _print(scaffold: Scaffold) -> None:
    for path in scaffold.files:
        click.echo(f"wrote {os.path.relpath(path)}")
    for path in scaffold.extended:
        click.echo(f"extended {os.path.relpath(path)}: artifacts/ is not for git")
    for note in scaffold.notes:
        click.echo(f"  {note}")
    recipe = os.path.relpath(scaffold.recipe)
    if scaffold.placeholders:
        lines = ", ".join(map(str, scaffold.placeholders))
        click.echo(f"next: replace {PLACEHOLDER} in {recipe} (line {lines}), then run: toolchain build {recipe}")
    else:
        click.echo(f"next: check {recipe}, then run: toolchain build {recipe}")
    fragment = os.path.relpath(scaffold.fragment)
    click.echo(f"for `make release`, add to your Makefile: include {fragment}")


def _to_json(scaffold: Scaffold) -> dict[str, object]:
    return {
        "name": scaffold.name,
        "recipe": str(scaffold.recipe),
        "written": [str(path) for path in scaffold.files],
        "extended": [str(path) for path in scaffold.extended],
        "placeholder_lines": list(scaffold.placeholders),
        "notes": list(scaffold.notes),
    }
