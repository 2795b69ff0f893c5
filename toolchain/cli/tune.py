"""``toolchain tune``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.progress import Progress

if TYPE_CHECKING:
    from toolchain.search import Found
    from toolchain.tune import TuneResult

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


class _Duration(click.ParamType[float]):
    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if found is None or float(found[1]) <= 0:
            self.fail(f"got {value!r}; allowed: seconds, or a number with a unit: 90s, 10m, 1h", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--budget", type=_Duration(), default="10m", show_default=True,
              help="Wall-clock time, of all targets together: 90s, 10m, 1h.")  # fmt: skip
@click.option("--target", "targets", multiple=True, help="Tune this target of the recipe only; may be repeated.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False),
              help="File of records [default: RECIPE's name with .tune.toml, beside it].")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True,
              help="Threads of what is measured; 0 for all cores.")  # fmt: skip
@click.option("--restart", is_flag=True, help="Forget what earlier runs found.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of the stage cache [default: the user's].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    recipe: Path,
    budget: float,
    targets: tuple[str, ...],
    output: Path | None,
    threads: int,
    restart: bool,
    cache: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Search for better tiles than the rules' for RECIPE's fp32 engines, on this machine.

    Never needed: without it builds use the rules' tiles.  What pays, measured on the whole model, goes into a small
    text file to be committed; later builds use it, and give the same bytes every time.  After Ctrl-C, or when
    the budget is spent, another run goes on where this one ended.
    """
    from toolchain.search import Settings
    from toolchain.tune import tune

    with Progress(quiet=quiet) as progress:
        result = tune(
            recipe,
            targets=targets,
            output=output,
            cache=cache,
            settings=Settings(budget, threads),
            restart=restart,
            listener=progress,
            say=progress.note,
        )
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else "\n".join(_lines(result)))


def _lines(result: TuneResult) -> list[str]:
    from toolchain.cli.show import columns

    lines: list[str] = []
    for target in result.targets:
        if target.refused:
            lines += [f"{target.target}: no engine of TVM: {target.refused}", ""]
            continue
        header = ("loop nest", "share", "rule", "best", "gain", "")
        lines += [target.target, *("  " + line for line in columns(header, map(_cells, target.found)))]
        if target.records:
            faster = f"{target.rule_ms:.3f} ms by the rules, {target.best_ms:.3f} ms with {len(target.records)} records"
            lines += [f"  whole model: {faster} ({1 / target.ratio:.2f}x as fast)", ""]
        else:
            lines += ["  whole model: no records pay; builds go on as the rules say", ""]
    lines += [f"not tuned here: {name}: {reason}" for name, reason in result.refused.items()]
    return [*lines, f"records in {result.file}"]


def _cells(found: Found) -> tuple[str, ...]:
    name = found.nest.partition(" vector ")[0]
    gain = "-" if found.best == found.rule else f"{1 / found.ratio:.2f}x"
    notes = [found.state] if found.state != "searched" else []
    notes += ["dropped: does not pay"] if found.best != found.rule and not found.kept else []
    notes += [f"{len(found.failed)} candidates failed"] if found.failed else []
    return name, f"{found.share:.0%}", found.rule, found.best, gain, ", ".join(notes)
