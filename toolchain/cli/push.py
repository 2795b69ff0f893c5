"""``toolchain push``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("release", type=click.Path(path_type=Path))
@click.argument("reference")
@click.option("--plain-http", is_flag=True, help="Without encryption; always so with a registry on this machine.")
def command(release: Path, reference: str, plain_http: bool) -> None:
    """Send RELEASE, a release's folder, with its signatures to REFERENCE: oci://HOST/REPOSITORY[:TAG].

    The tag is the release's version if none is given.  Logins are those of docker and podman.
    """
    from toolchain.bundle.read import open_release
    from toolchain.registry.push import push
    from toolchain.registry.reference import parse_reference

    place = parse_reference(reference)
    pushed = push(open_release(release), place, plain_http=plain_http, say=lambda text: click.echo(text, err=True))
    click.echo(f"{pushed.reference} ({pushed.sent} bytes sent)")
