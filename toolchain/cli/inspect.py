"""``toolchain inspect``."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="Print the manifests as JSON.")
@click.option("--report", is_flag=True, help="Print the whole report of each bundle as Markdown.")
def command(bundle: str, as_json: bool, report: bool) -> None:
    """Show what BUNDLE (a release's folder, or FOLDER@TARGET) holds, promises and measured."""
    from toolchain.bundle.read import open_release
    from toolchain.bundle.resolve import resolve, split_reference
    from toolchain.bundle.signatures import read_set
    from toolchain.cli.show import bundle_lines

    path, target = split_reference(bundle)
    release = open_release(path)
    bundles = (resolve(bundle),) if target else release.bundles
    signatures = {digest: len(read_set(path, digest, found)[1]) for digest, found in release.signatures.items()}
    if as_json:
        rows = [{"digest": b.digest, "size": b.size, **b.manifest.to_json()} for b in bundles]
        click.echo(json.dumps({"digest": release.digest, "signatures": signatures, "bundles": rows}, indent=2))
        return
    click.echo(f"{release.name} {release.version}  {release.digest}")
    if signatures:
        click.echo(f"{sum(signatures.values())} signatures; whose they are: toolchain verify {path} --key KEY")
    for one in bundles:
        click.echo("")
        click.echo(one.read("report.md").decode() if report else "\n".join(bundle_lines(one)))
