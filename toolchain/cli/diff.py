"""``toolchain diff``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("old")
@click.argument("new")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def command(old: str, new: str, as_json: bool) -> None:
    """Compare OLD and NEW: engines, accuracy, latency, size, operators and tools, per target.

    Each is a release's folder, or FOLDER@TARGET for one bundle; if only one names a target, the other's bundle
    for that target is meant.
    """
    from toolchain.bundle.read import open_release
    from toolchain.bundle.resolve import resolve, split_reference
    from toolchain.cli.difference import difference_lines
    from toolchain.compare import compare_bundles, compare_releases

    (old_path, old_target), (new_path, new_target) = split_reference(old), split_reference(new)
    before, after = old_target or new_target, new_target or old_target
    if before:
        name = before if before == after else f"{before} -> {after}"
        pair = resolve(f"{old_path}@{before}"), resolve(f"{new_path}@{after}")
        differences = {name: compare_bundles(*pair)}
    else:
        differences = compare_releases(open_release(old_path), open_release(new_path))
    if as_json:
        click.echo(json.dumps(differences, indent=2))
        return
    click.echo("\n".join(difference_lines(differences)))
