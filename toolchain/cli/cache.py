"""``toolchain cache``: the size of the stage cache, and pruning it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from toolchain.cache import Cache, default_folder, default_limit, storage_errors
from toolchain.errors import ExitCode, ToolchainError
from toolchain.storage import ANOTHER_CACHE

_EMPTY = {"bytes": 0, "artifacts": 0, "records": 0}


@click.group(invoke_without_command=True)
@click.option("--cache", "folder", type=click.Path(path_type=Path), help="Cache folder.  [default: the user's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, folder: Path | None, as_json: bool) -> None:
    """Show the folder, size and limit of the stage cache, or prune it.

    The folder is TOOLCHAIN_CACHE or lies in the user's cache folder; TOOLCHAIN_CACHE_LIMIT_MB sets
    the size in MiB above which a build prunes it.
    """
    folder = (folder or default_folder()).absolute()
    ctx.obj = (folder, as_json)
    if ctx.invoked_subcommand is None:
        _show(folder, as_json)


@command.command()
@click.option("--max-size", type=click.IntRange(min=0), metavar="MB", help="Keep at most this many MiB.")
@click.option("--all", "everything", is_flag=True, help="Remove everything.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def prune(given: tuple[Path, bool], max_size: int | None, everything: bool, as_json: bool) -> None:
    """Remove the least recently used results until the cache holds at most its limit, or --max-size."""
    if everything and max_size is not None:
        raise click.UsageError("--all and --max-size exclude each other")
    folder, parent_json = given
    limit = 0 if everything else default_limit() if max_size is None else max_size << 20
    done = _prune(folder, limit)
    if as_json or parent_json:
        click.echo(json.dumps({"folder": str(folder), "limit_bytes": limit, **done}, indent=2))
        return
    click.echo(
        f"freed {_size(done['freed_bytes'])}: removed {_count(done['removed_records'], 'record')} and "
        f"{_count(done['removed_artifacts'], 'artifact')}; {_size(done['bytes'])} left in {folder}"
    )


def _prune(folder: Path, limit: int) -> dict[str, int]:
    if not _exists(folder):
        return {"removed_records": 0, "removed_artifacts": 0, "freed_bytes": 0, "bytes": 0}
    with storage_errors(folder, ANOTHER_CACHE):
        result = Cache(folder).prune(limit)
    if result is None:
        raise ToolchainError(
            "a build is using the cache, so nothing was removed",
            where=str(folder),
            hint="run this again when the build has ended",
            code=ExitCode.STORAGE,
        )
    return result


def _show(folder: Path, as_json: bool) -> None:
    limit = default_limit()
    with storage_errors(folder, ANOTHER_CACHE):
        size = Cache(folder).size() if _exists(folder) else _EMPTY
    if as_json:
        facts: dict[str, Any] = {"folder": str(folder), "exists": _exists(folder), **size, "limit_bytes": limit}
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"folder     {folder}{'' if _exists(folder) else '  (not made yet)'}")
    click.echo(f"size       {_size(size['bytes'])} of at most {_size(limit)}")
    click.echo(f"artifacts  {size['artifacts']}")
    click.echo(f"records    {size['records']}")


def _exists(folder: Path) -> bool:
    # Looking at a cache must not make one.
    if folder.exists() and not folder.is_dir():
        raise ToolchainError(
            "got a file; allowed: a folder", where=str(folder), hint="name another folder", code=ExitCode.STORAGE
        )
    return (folder / "v1").is_dir()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
