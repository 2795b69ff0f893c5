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


def _open(
    bundle: str, folder: Path, target: str | None, name: str | None, force: bool, *, programs: bool = False
) -> Source:
    from toolchain.exports.files import check_folder
    from toolchain.exports.source import open_source

    # Said before a large bundle is read.
    check_folder(folder, force=force)
    return open_source(bundle, target, name, programs=programs)


def _write(
    source: Source,
    tree: Tree,
    folder: Path,
    force: bool,
    hint: str = "",
    notes: list[str] | None = None,
    programs: frozenset[str] = frozenset(),
) -> None:
    from toolchain.exports.files import write_tree

    write_tree(tree, folder, force=force, programs=programs)
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


@command.command()
@_shared
@click.option("--image", required=True, help="The model's image, REGISTRY/NAME:TAG; its storage URI is oci://IMAGE.")
@click.option("--runtime-image", required=True, help="An image that has toolchain serve, REGISTRY/NAME:TAG.")
@click.option("--namespace", default="", help="Namespace of the service [default: the current one].")
@click.option("--memory-mb", type=click.IntRange(1), help="Memory of the container [default: the profile's limit].")
def kserve(
    bundle: str,
    folder: Path,
    target: str | None,
    name: str | None,
    force: bool,
    image: str,
    runtime_image: str,
    namespace: str,
    memory_mb: int | None,
) -> None:
    """Manifests of an InferenceService that pulls the bundle from an OCI registry."""
    from toolchain.exports.kserve import kserve_tree

    source = _open(bundle, folder, target, name, force)
    tree = kserve_tree(source, image, runtime_image, namespace=namespace, memory_mb=memory_mb)
    _write(
        source,
        tree,
        folder,
        force,
        f"kubectl apply -f {folder}/serving-runtime.yaml -f {folder}/inference-service.yaml",
    )


@command.command()
@_shared
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="MLServer's processes; 0: its own."
)
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="Threads of a run; 0: all.")
def mlserver(
    bundle: str, folder: Path, target: str | None, name: str | None, force: bool, workers: int, threads: int
) -> None:
    """A folder that MLServer serves, with a runtime over this package."""
    from toolchain.exports.mlserver import mlserver_tree

    source = _open(bundle, folder, target, name, force)
    tree = mlserver_tree(source, workers=workers, threads=threads)
    _write(source, tree, folder, force, f"cd {folder} && mlserver start .")


@command.command()
@_shared
@_version_number
@click.option("--base", default="/models", show_default=True, help="Where the server will find DIR.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads of inference; 0: the server's choice.")
def ovms(
    bundle: str,
    folder: Path,
    target: str | None,
    name: str | None,
    force: bool,
    version_number: int | None,
    base: str,
    threads: int,
) -> None:
    """A model repository for OpenVINO Model Server; ONNX engines only."""
    from toolchain.exports.ovms import ovms_tree

    source = _open(bundle, folder, target, name, force)
    tree = ovms_tree(source, version_number=version_number, base=base, threads=threads)
    _write(source, tree, folder, force, f"ovms --config_path {base.rstrip('/')}/config.json --rest_port 8000")


@command.command()
@_shared
def onnx(bundle: str, folder: Path, target: str | None, name: str | None, force: bool) -> None:
    """The ONNX model with its contract and a page on it; ONNX engines only."""
    from toolchain.exports.onnx import onnx_tree

    source = _open(bundle, folder, target, name, force)
    _write(source, onnx_tree(source), folder, force)


@command.command("ray-serve")
@_shared
@click.option("--min-replicas", type=click.IntRange(0), default=1, show_default=True, help="Replicas that always run.")
@click.option("--max-replicas", type=click.IntRange(1), default=4, show_default=True, help="Replicas under load.")
@click.option(
    "--target-ongoing", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
    help="Requests of a replica at the same time, above which more replicas start.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Processors of a replica.")
def ray_serve(
    bundle: str,
    folder: Path,
    target: str | None,
    name: str | None,
    force: bool,
    min_replicas: int,
    max_replicas: int,
    target_ongoing: float,
    threads: int,
) -> None:
    """A Ray Serve application with autoscaling."""
    from toolchain.exports.ray_serve import Scaling, ray_serve_tree

    source = _open(bundle, folder, target, name, force)
    tree = ray_serve_tree(source, Scaling(min_replicas, max_replicas, target_ongoing, threads))
    _write(source, tree, folder, force, f"cd {folder} && serve run app:application")


@command.command()
@_shared
def edge(bundle: str, folder: Path, target: str | None, name: str | None, force: bool) -> None:
    """A folder that a device runs as it is: the bundle, bundle-run, the C library.

    Of a static executable or a WebAssembly module it is that file alone.

    Without a target it is the only bundle of the release that a device can run.
    """
    from toolchain.exports.edge import PROGRAMS, edge_target, edge_tree

    target = target or edge_target(bundle)
    source = _open(bundle, folder, target, name, force, programs=True)
    _write(source, edge_tree(source), folder, force, programs=PROGRAMS)
