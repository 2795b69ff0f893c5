"""``toolchain why``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Only this target of the recipe; may be repeated.")
@click.option("--stage", help="Only stages whose id begins with this, e.g. export or compile[fp32.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the stage cache [default: the user's].")
@click.option("--no-measure", is_flag=True, help="As in build.")
@click.option("--device", "devices", multiple=True, envvar="TOOLCHAIN_DEVICE", metavar="TARGET=[USER@]HOST[:PORT]",
              help="As in build.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    recipe: Path,
    targets: tuple[str, ...],
    stage: str | None,
    cache: Path | None,
    no_measure: bool,
    devices: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say for each stage of RECIPE whether a build would run it, and what changed."""
    from toolchain.build import plan
    from toolchain.cli.show import forecast_lines, records_lines

    forecasts = plan(recipe, targets=targets, cache=cache, measure=not no_measure, devices=devices)
    shown = [f for f in forecasts if stage is None or f.node.id.startswith(stage)]
    if as_json:
        rows = [{"id": f.node.id, "target": f.node.target, "state": f.state, "reasons": list(f.reasons)} for f in shown]
        click.echo(json.dumps({"stages": rows}, indent=2))
        return
    click.echo("\n".join([*forecast_lines(shown), *records_lines(shown)]))
    running = sum(f.state != "cached" for f in shown)
    click.echo(f"{running} of {len(shown)} stages would run" if running else f"all {len(shown)} stages are up to date")
