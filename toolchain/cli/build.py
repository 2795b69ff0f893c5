"""``toolchain build``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.progress import Progress
from toolchain.errors import ExitCode, ToolchainError

if TYPE_CHECKING:
    from toolchain.execute import Forecast
    from toolchain.publish import TargetResult


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True,
              help="Build this target of the recipe only; may be repeated.  The release's other bundles stay if they "
              "are up to date; if not, nothing is built, unless --partial is given.")  # fmt: skip
@click.option("--partial", is_flag=True, help="With --target: bundles that are not up to date leave the release.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("artifacts"), show_default=True,
              help="Folder of releases, relative to the current one: OUTPUT/NAME/VERSION is the release.")  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the stage cache [default: the user's].")
@click.option("--jobs", type=click.IntRange(min=1), help="Stages at once [default: the number of cores].")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--dry-run", is_flag=True, help="Show the plan and what the cache holds of it; run nothing.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Write TVM's IR after every phase into this folder.")
@click.option("--explain", is_flag=True,
              help="Print for each loop nest of TVM's engines its rule, tile and expected share of peak.")  # fmt: skip
@click.option("--no-measure", is_flag=True, help="Take no measurements; engines are chosen by the profile's order.")
@click.option("--device", "devices", multiple=True, envvar="TOOLCHAIN_DEVICE", metavar="TARGET=[USER@]HOST[:PORT]",
              help="Measure this target's engines on a device over SSH; may be repeated (docs/remote.md).")  # fmt: skip
@click.option("--measurements", type=click.Path(path_type=Path, exists=True),
              help="Use the measurements of this release instead of taking new ones.")  # fmt: skip
def command(
    recipe: Path,
    targets: tuple[str, ...],
    partial: bool,
    output: Path,
    cache: Path | None,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    dump_ir: Path | None,
    explain: bool,
    no_measure: bool,
    devices: tuple[str, ...],
    measurements: Path | None,
) -> None:
    """Build RECIPE into a release of verified bundles, one for each target.

    Exit code 0 means that every gate of every target held.  Otherwise nothing is written, and the code
    says what failed (docs/exit-codes.md).
    """
    from toolchain.build import build, plan
    from toolchain.cli.show import explain_lines, result_lines

    if dry_run:
        forecasts = plan(
            recipe,
            targets=targets,
            cache=cache,
            measure=not no_measure,
            devices=devices,
            output=output,
            partial=partial,
        )
        _show_plan(forecasts, as_json)
        return
    with Progress(quiet=quiet) as progress:
        try:
            result = build(
                recipe,
                targets=targets,
                output=output,
                cache=cache,
                jobs=jobs,
                dump_ir=dump_ir,
                measure=not no_measure,
                measurements=_measurements(measurements),
                listener=progress,
                devices=devices,
                partial=partial,
            )
        except ToolchainError as error:
            if as_json:
                click.echo(json.dumps({"exit_code": int(error.code), "error": error.to_json()}, indent=2))
            raise
    lines = [*result_lines(result), *(explain_lines(result) if explain else [])]
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else "\n".join(lines))
    for note in result.notes:
        progress.note(note)
    failed = [r for r in result.targets if r.selection.code]
    if failed:
        raise _no_release(recipe, result.code, failed)


def _show_plan(forecasts: Sequence[Forecast], as_json: bool) -> None:
    from toolchain.cli.show import forecast_lines

    rows = [{"id": f.node.id, "state": f.state, "reasons": f.reasons} for f in forecasts]
    click.echo(json.dumps({"stages": rows}, indent=2) if as_json else "\n".join(forecast_lines(forecasts)))


def _measurements(release: Path | None) -> dict[str, dict[str, Any]] | None:
    from toolchain.reproduce import measurements_of

    return measurements_of(release) if release is not None else None


def _no_release(recipe: Path, code: ExitCode, failed: Sequence[TargetResult]) -> ToolchainError:
    """Why there is no release, each reason once."""
    hints = dict.fromkeys(r.selection.hint for r in failed)
    reasons = [f"{r.target}: {r.selection.reason}" for r in failed]
    lines = [f"{r.target}: {line}" for r in failed for line in r.selection.failures]
    return ToolchainError(
        "no release was written: " + "; ".join(reasons),
        where=str(recipe),
        details=[line for line in lines if line not in reasons],
        hint="; ".join(hints),
        code=code,
    )
