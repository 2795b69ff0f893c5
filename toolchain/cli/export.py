"""``toolchain export``: bundles for other servers.  What is written is made in ``toolchain.exports``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from toolchain.exports.files import Tree
    from toolchain.exports.source import Source
    from toolchain.exports.triton_config import Serving

Command = Callable[..., Any]


@click.group()
def command() -> None:
    """Write a bundle in the form that another server loads.

    Each format takes BUNDLE (a release's folder, or FOLDER@TARGET) and the folder to write, which is written whole or
    not at all.  docs/exports.md describes the formats.
    """


def _shared(function: Command) -> Command:
    """The arguments and options of every format."""
    for add in (
        click.option("--force", is_flag=True, help="Replace all that DIR holds."),
        click.option("--name", help="Name of the model in the other server [default: the release's]."),
        click.option("--target", help="Which bundle of a release [default: the one that suits this machine best]."),
        click.argument("folder", metavar="DIR", type=click.Path(path_type=Path)),
        click.argument("bundle"),
    ):
        function = add(function)
    return function


_version_number = click.option(
    "--version-number", type=click.IntRange(1), help="The version's number [default: 1.2.3 is 1002003]."
)


@command.command()
@_shared
@_version_number
@click.option("--settings", type=click.Path(path_type=Path), help="Settings that toolchain serve --tune measured.")
@click.option("--response-cache", is_flag=True, help="Let Triton answer equal requests from its cache.")
@click.option("--python-backend", is_flag=True, help="Run an ONNX model through Triton's python backend too.")
@click.option("--labels", multiple=True, metavar="[OUTPUT=]FILE", help="Labels of an output's classes, one a line.")
def triton(
    bundle: str,
    folder: Path,
    target: str | None,
    name: str | None,
    force: bool,
    version_number: int | None,
    settings: Path | None,
    response_cache: bool,
    python_backend: bool,
    labels: tuple[str, ...],
) -> None:
    """A model repository for Triton Inference Server."""
    from toolchain.exports.triton import triton_notes, triton_tree

    source = _open(bundle, folder, target, name, force)
    serving = _serving(settings, source.manifest.name) if settings else None
    tree = triton_tree(
        source,
        serving=serving,
        response_cache=response_cache,
        python_backend=python_backend,
        labels=labels,
        version_number=version_number,
    )
    hint = f"tritonserver --model-repository={folder}" + (
        " --cache-config=local,size=268435456" if response_cache else ""
    )
    _write(source, tree, folder, force, hint, triton_notes(source, serving))


def _serving(settings: Path, model: str) -> Serving:
    from toolchain.exports.triton_config import Serving
    from toolchain.runtime.server.settings import load_settings

    ours = load_settings(settings).model(model)
    return Serving(**{key: getattr(ours, key) for key in Serving.__slots__})


def _open(bundle: str, folder: Path, target: str | None, name: str | None, force: bool) -> Source:
    from toolchain.exports.files import check_folder
    from toolchain.exports.source import open_source

    # Said before a large bundle is read.
    check_folder(folder, force=force)
    return open_source(bundle, target, name)


def _write(
    source: Source, tree: Tree, folder: Path, force: bool, hint: str = "", notes: list[str] | None = None
) -> None:
    from toolchain.exports.files import write_tree

    write_tree(tree, folder, force=force)
    facts = source.facts()
    click.echo(f"{facts['release']}, {facts['target']}, {facts['engine']}, {facts['bundle_digest'][:19]}")
    for name, blob in sorted(tree.items()):
        click.echo(f"  {blob.size:>10} {name}")
    size = sum(blob.size for blob in tree.values())
    click.echo(f"{folder} written: {len(tree)} files, {size / 1e6:.3f} MB")
    for note in notes or ():
        click.echo(f"note: {note}", err=True)
    if hint:
        click.echo(f"serve with: {hint}", err=True)
