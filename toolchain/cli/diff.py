"""``toolchain diff``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def command(old: Path, new: Path, as_json: bool) -> None:
    """Compare two releases: engines, accuracy, latency, size, operators and tools, per target."""
    from toolchain.bundle.read import open_release
    from toolchain.compare import compare_releases

    differences = compare_releases(open_release(old), open_release(new))
    if as_json:
        click.echo(json.dumps(differences, indent=2))
        return
    for target, changes in differences.items():
        click.echo(f"{target}: {'the same' if not changes else ''}".rstrip())
        for name, (before, after) in changes.items():
            click.echo(f"  {name}: {before} -> {after}")
