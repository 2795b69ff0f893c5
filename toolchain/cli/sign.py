"""``toolchain sign``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Private key, PEM: ECDSA P-256 or Ed25519.")
@click.option("--reference", default="", help="What the signature calls the release, as REGISTRY/NAME [default: NAME].")
def command(release: Path, key: Path, reference: str) -> None:
    """Sign RELEASE, a release's folder, and each bundle in it; digests and other signatures stay as they are.

    The form is that of cosign.  The password of an encrypted key is in TOOLCHAIN_KEY_PASSWORD.  Only digests are
    signed; `toolchain verify` checks that the files match them.
    """
    from toolchain.bundle.sign import sign_release

    signed = sign_release(release, key, reference)
    name = f"{signed.release.name} {signed.release.version}"
    click.echo(f"signed {name} and its bundles with {signed.key}; {signed.release.digest}")
