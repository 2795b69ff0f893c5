"""``toolchain targets``: the shipped target profiles, and one explained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolchain.doctor import TargetState, missing_tools, target_state
from toolchain.host import Host, detect_host
from toolchain.target import TargetProfile, list_targets, load_target
from toolchain.target_words import build_words, execution_words, fields, machine_words


class _Group(click.Group):
    """Points from ``targets NAME`` to ``targets show NAME``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}; to explain a target: toolchain targets show {args[0]}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the target profiles that come with toolchain.

    A profile of your own works wherever a name does, by its path, and may extend a shipped one.
    """
    ctx.obj = as_json
    if ctx.invoked_subcommand is None:
        host = detect_host()
        states = [(profile, target_state(profile, host)) for profile in map(load_target, list_targets())]
        if as_json:
            click.echo(json.dumps([_summary(profile, state) for profile, state in states], indent=2))
        else:
            click.echo("\n".join(_table([("name", "arch", "kind", "precisions", "executed here"), *map(_row, states)])))


@command.command()
@click.argument("target", metavar="NAME|PATH")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(parent_json: bool, target: str, as_json: bool) -> None:
    """Explain a profile: every field, what it means for a build, and what this machine can do with it."""
    profile, host = load_target(target, Path.cwd()), detect_host()
    state = target_state(profile, host)
    if as_json or parent_json:
        click.echo(json.dumps(_details(profile, state), indent=2))
    else:
        click.echo("\n".join(_explained(profile, state, host)))


def _summary(profile: TargetProfile, state: TargetState) -> dict[str, Any]:
    return {
        "name": profile.name,
        "description": profile.description,
        "arch": profile.arch,
        "kind": profile.kind,
        "precisions": list(profile.numerics.precisions),
        "executed": execution_words(state),
        "runs_here": not state.run,
        "measured_here": not state.measure,
        "problems": {k: list(v) for k, v in asdict(state).items() if k != "name"},
    }


def _details(profile: TargetProfile, state: TargetState) -> dict[str, Any]:
    return {
        **_summary(profile, state),
        "requirements": profile.requirements(),
        "missing_tools": [asdict(tool) for tool in missing_tools(profile)],
        "profile": profile.model_dump(mode="json"),
    }


def _row(entry: tuple[TargetProfile, TargetState]) -> tuple[str, ...]:
    profile, state = entry
    return (profile.name, profile.arch, profile.kind, " ".join(profile.numerics.precisions), execution_words(state))


def _explained(profile: TargetProfile, state: TargetState, host: Host) -> Iterator[str]:
    yield f"{profile.name}: {profile.description}"
    yield from ("", "for a build", *(f"  {line}" for line in build_words(profile)))
    yield from ("", f"on this machine ({host.describe()})")
    yield from (f"  {line}" for line in machine_words(state, missing_tools(profile)))
    yield from ("", "fields", *_table([(f"  {f.key}", f.value, f.meaning) for f in fields(profile)], widest=48))


def _table(rows: Sequence[tuple[str, ...]], widest: int = 60) -> Iterator[str]:
    widths = [min(widest, max(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
