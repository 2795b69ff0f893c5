"""``toolchain pull``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from toolchain.bundle.sign import TrustKey


@click.command()
@click.argument("reference")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("artifacts"))
@click.option("--target", default="", help="Only the bundle for this target.")
@click.option("--trust-key", type=click.Path(path_type=Path), help="PEM file of public keys; refuse what none signed.")
@click.option("--plain-http", is_flag=True, help="Without encryption; always so with a registry on this machine.")
def command(reference: str, folder: Path, target: str, trust_key: Path | None, plain_http: bool) -> None:
    """Bring REFERENCE, oci://HOST/REPOSITORY[:TAG] or ...@DIGEST, into FOLDER/NAME/VERSION [default: artifacts].

    A transfer that broke off is gone on with when it is run again.  Logins are those of docker and podman.
    """
    from toolchain.registry.pull import pull
    from toolchain.registry.reference import parse_reference

    place = parse_reference(reference)
    trust: Sequence[TrustKey] = ()
    if trust_key is not None:
        from toolchain.bundle.sign import read_trust

        trust = read_trust(trust_key)
    pulled = pull(
        place, folder, target=target, trust=trust, plain_http=plain_http, say=lambda text: click.echo(text, err=True)
    )
    click.echo(f"{pulled.folder} ({pulled.digest}, {pulled.received} bytes received)")
