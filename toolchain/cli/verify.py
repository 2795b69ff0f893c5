"""``toolchain verify``."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import click

from toolchain.errors import ExitCode, ToolchainError


@click.command()
@click.argument("subject")
@click.option("--reproduce", is_flag=True, help="SUBJECT is a recipe: build it twice in different folders and compare.")
@click.option("--target", "targets", multiple=True, help="Only this target; may be repeated.")
def command(subject: str, reproduce: bool, targets: tuple[str, ...]) -> None:
    """Check the digests of SUBJECT (a release's folder, or FOLDER@TARGET) and run its self-tests.

    Bundles for other machines than this one have their digests checked only, and the output says so.
    """
    if reproduce:
        _reproduce(Path(subject), targets)
        return
    from toolchain.bundle.read import open_release
    from toolchain.bundle.resolve import resolve, split_reference

    path, target = split_reference(subject)
    bundles = (resolve(subject),) if target else open_release(path).bundles
    for bundle in bundles:
        if targets and bundle.target not in targets:
            continue
        bundle.verify()
        click.echo(f"{bundle.target}: {len(bundle.files)} files match their digests; {_selftest(bundle.reference)}")


def _selftest(reference: str) -> str:
    from toolchain.runtime import load, run_selftest

    try:
        model = load(reference)
    except ToolchainError as error:
        if error.code is ExitCode.INCOMPATIBLE_HOST:
            return f"self-test not run: {error.what}"
        raise
    with model:
        if "selftest.npz" not in model.bundle.files:
            return "it has no self-test"
        result = run_selftest(model, BytesIO(model.bundle.read("selftest.npz")))
    if not result.passed:
        raise ToolchainError(
            "the self-test failed", where=reference, details=result.problems, code=ExitCode.GATE_FIDELITY
        )
    worst = max((check.max_abs_error for check in result.outputs), default=0.0)
    return f"self-test passed, largest error {worst:.3g}"


def _reproduce(recipe: Path, targets: tuple[str, ...]) -> None:
    from toolchain.reproduce import reproduce

    result = reproduce(recipe, targets, lambda text: click.echo(text, err=True))
    click.echo(f"reproducible: {result.files} files in two builds are identical; {result.first}")
