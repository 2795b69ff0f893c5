"""``toolchain serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.errors import ExitCode, ToolchainError


@click.command()
@click.argument("bundles", nargs=-1)
@click.option("--settings", "file", type=click.Path(path_type=Path), help="Settings file (TOML); flags override it.")
@click.option("--host", help="Address to listen on [default: 127.0.0.1].")
@click.option("--http-port", type=click.IntRange(0, 65535), help="Port of REST; 0 for any [default: 8000].")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Port of gRPC; 0 for any [default: 8001].")
@click.option("--no-grpc", is_flag=True, help="Serve REST only.")
@click.option("--watch", type=click.Path(), help="Folder of releases, NAME/VERSION, to serve as they come and go.")
@click.option("--allow-admin", is_flag=True, help="Let clients load and unload models.")
@click.option("--server-name", help="What the server calls itself in its metadata [default: toolchain].")
@click.option("--token-file", type=click.Path(), help="File with the bearer tokens that clients need, one a line.")
@click.option("--trust-key", type=click.Path(), help="PEM file of public keys; serve only bundles signed with one.")
@click.option("--tls-cert", type=click.Path(), help="PEM file of the certificate chain.")
@click.option("--tls-key", type=click.Path(), help="PEM file of its private key.")
@click.option("--execution", help="process, thread or inline: where engines run [default: process].")
@click.option("--instances", type=click.IntRange(1), help="Engines of each model at the same time.")
@click.option("--threads", type=click.IntRange(0), help="Threads of an engine; 0: all, divided by the instances.")
@click.option("--max-batch", type=click.IntRange(1), help="Rows that are merged into one run.")
@click.option(
    "--on", "place", type=click.Choice(["ray"]), help="Serve on a Ray cluster, with replicas as the load asks."
)
@click.option("--min-replicas", type=click.IntRange(0), help="With --on ray: that always run [default: 1].")
@click.option("--max-replicas", type=click.IntRange(1), help="With --on ray: under load [default: 4].")
@click.option("--tune", is_flag=True, help="Measure which settings are best, write them to a file, and end.")
@click.option("--p99-ms", type=float, default=50.0, show_default=True, help="With --tune: the limit of the latency.")
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True, help="With --tune: clients.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("serve.toml"), help="With --tune: the file.")
def command(
    bundles: tuple[str, ...],
    file: Path | None,
    tls_cert: str | None,
    tls_key: str | None,
    place: str | None,
    min_replicas: int | None,
    max_replicas: int | None,
    tune: bool,
    p99_ms: float,
    concurrency: int,
    output: Path,
    execution: str | None,
    **flags: Any,
) -> None:
    """Serve BUNDLES over the Open Inference Protocol: folders of releases or bundles, FOLDER@TARGET, or releases in a
    registry, oci://HOST/REPOSITORY:TAG, whose tag is followed.

    Several versions of one model may be given; the latest answers requests that name none.  SIGTERM lets running
    requests end.
    """
    from toolchain.runtime.server import spare

    if place == "ray":
        others = {"settings": file, "tls_cert": tls_cert, "tls_key": tls_key, "tune": tune, "execution": execution}
        _on_ray(bundles, min_replicas, max_replicas, flags | others)
        return
    if min_replicas is not None or max_replicas is not None:
        raise ToolchainError("--min-replicas and --max-replicas belong to --on ray", code=ExitCode.USAGE)
    try:
        if bundles and not tune and execution in (None, "process"):
            # It starts while everything else is imported.
            spare.prepare()
            spare.preload(_backend(bundles[0]))
        _run(bundles, file, tls_cert, tls_key, tune, p99_ms, concurrency, output, flags | {"execution": execution})
    finally:
        spare.discard()


def _backend(reference: str) -> str:
    """What the engine of a bundle needs to be imported; nothing where the bundle is not right, which is said later."""
    from toolchain.bundle.resolve import resolve

    try:
        engine = resolve(reference, note=lambda text: None).manifest.engine
    except ToolchainError:
        return ""
    return "" if engine.form in ("aot", "static") else engine.backend


def _run(
    bundles: tuple[str, ...],
    file: Path | None,
    tls_cert: str | None,
    tls_key: str | None,
    tune: bool,
    p99_ms: float,
    concurrency: int,
    output: Path,
    flags: dict[str, Any],
) -> None:
    from toolchain.runtime.server.settings import load_settings

    if bool(tls_cert) != bool(tls_key):
        raise ToolchainError("--tls-cert and --tls-key belong together", code=ExitCode.USAGE)
    settings = load_settings(file, _overrides(flags, tls_cert, tls_key))
    if tune:
        _tune(bundles, p99_ms, concurrency, output, {"settings": file, **flags})
        return
    if not bundles and not settings.watch:
        raise ToolchainError(
            "nothing to serve", hint="name a release or bundle, or a folder to --watch", code=ExitCode.USAGE
        )
    from toolchain.runtime.server.app import serve

    serve(bundles, settings, click.echo)


def _overrides(flags: dict[str, Any], tls_cert: str | None, tls_key: str | None) -> dict[str, Any]:
    """Flags by their keys in the settings file; None where a flag was not given."""
    return {
        "host": flags["host"],
        "http_port": flags["http_port"],
        "grpc_port": flags["grpc_port"],
        "grpc": False if flags["no_grpc"] else None,
        "watch": flags["watch"],
        "admin": flags["allow_admin"] or None,
        "server_name": flags["server_name"],
        "token_file": flags["token_file"],
        "trust_key": flags["trust_key"],
        "tls.certificate": tls_cert,
        "tls.key": tls_key,
        "defaults.execution": flags["execution"],
        "defaults.instances": flags["instances"],
        "defaults.threads": flags["threads"],
        "defaults.max_batch_size": flags["max_batch"],
    }


def _tune(bundles: tuple[str, ...], p99_ms: float, concurrency: int, output: Path, others: dict[str, Any]) -> None:
    from toolchain.runtime.server.tune import tune_and_write

    if not bundles:
        raise ToolchainError("--tune needs a release or bundle to measure", code=ExitCode.USAGE)
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if given:
        what = f"--tune finds the settings itself and serves nobody; it does not take {', '.join(given)}"
        raise ToolchainError(what, code=ExitCode.USAGE)
    tune_and_write(bundles, p99_ms, concurrency, output, click.echo)


#: What can be said of a server on Ray.
_RAY_FLAGS = ("host", "http_port", "threads", "trust_key")


def _on_ray(bundles: tuple[str, ...], least: int | None, most: int | None, flags: dict[str, Any]) -> None:
    from toolchain.bundle.resolve import resolve
    from toolchain.exports.on_ray import serve_on_ray
    from toolchain.exports.ray_serve import Scaling
    from toolchain.exports.source import open_source

    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value and name not in _RAY_FLAGS]
    if given:
        raise ToolchainError(f"a server on Ray does not take {', '.join(given)}", code=ExitCode.USAGE)
    if len(bundles) != 1 or flags["http_port"] == 0:
        raise ToolchainError("--on ray serves one bundle, and on a port that is given", code=ExitCode.USAGE)
    reference = bundles[0]
    if flags["trust_key"]:
        from toolchain.bundle.sign import check_signed, read_trust

        bundle = resolve(reference)
        check_signed(bundle, read_trust(Path(flags["trust_key"])))
        reference = bundle.reference
    source = open_source(reference)
    least = 1 if least is None else least
    scaling = Scaling(least, most or max(4, least), threads=flags["threads"] or 1)
    serve_on_ray(source, scaling, flags["host"] or "127.0.0.1", flags["http_port"] or 8000, click.echo)
