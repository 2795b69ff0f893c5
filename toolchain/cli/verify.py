"""``toolchain verify``."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.errors import ExitCode, ToolchainError

if TYPE_CHECKING:
    from toolchain.bundle.read import BundleRef


@click.command()
@click.argument("subject")
@click.option("--reproduce", is_flag=True, help="SUBJECT is a recipe: build it twice in different folders and compare.")
@click.option("--target", "targets", multiple=True, help="Only this target; may be repeated.")
@click.option("--key", type=click.Path(path_type=Path), help="PEM file of public keys; one must have signed SUBJECT.")
@click.option("--strict", is_flag=True,
              help="Fail (exit code 35) on warnings: what is not verified here, or was not at the build.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, also of what failed.")
def command(
    subject: str, reproduce: bool, targets: tuple[str, ...], key: Path | None, strict: bool, as_json: bool
) -> None:
    """Check the digests of SUBJECT (a release's folder, or FOLDER@TARGET), with --key its signatures, and run its
    self-tests.

    Bundles for other machines than this one have their digests checked only, and the output says so.
    """
    found: dict[str, Any] = {"subject": subject, "ok": False}
    if reproduce and strict:
        raise ToolchainError("--strict is about bundles; leave it out with --reproduce", code=ExitCode.USAGE)
    if reproduce and key:
        raise ToolchainError("--reproduce compares builds, which nobody signed; leave out --key", code=ExitCode.USAGE)
    try:
        if reproduce:
            _reproduce(Path(subject), targets, found, as_json)
        else:
            _verify(subject, targets, key, found, as_json)
            if strict:
                _refuse_warnings(subject, found["bundles"])
        found["ok"] = True
    except ToolchainError as error:
        found |= {"exit_code": int(error.code), "error": error.to_json()}
        raise
    finally:
        if as_json:
            click.echo(json.dumps(found, indent=2))


def _verify(subject: str, targets: tuple[str, ...], key: Path | None, found: dict[str, Any], quiet: bool) -> None:
    """Fills ``found`` in bundle by bundle, and prints a line for each unless it is to be ``quiet``."""
    from toolchain.bundle.read import open_release
    from toolchain.bundle.resolve import resolve, split_reference

    path, target = split_reference(subject)
    # Each name is resolved: one that the release does not have must not pass as verified.
    named = dict.fromkeys((*([target] if target else []), *targets))
    release = open_release(path)
    bundles = tuple(resolve(f"{path}@{name}") for name in named) or release.bundles
    if target and set(named) != {target}:
        what = f"{subject} names one target, --target {', '.join(targets)} another"
        raise ToolchainError(what, where="--target", code=ExitCode.USAGE)
    release.verify_signatures()
    signers = _signers(bundles, key)
    rows: list[dict[str, Any]] = []
    found["bundles"] = rows
    for bundle in bundles:
        bundle.verify()
        row: dict[str, Any] = {"target": bundle.target, "digest": bundle.digest, "files": len(bundle.files)}
        row |= signers[bundle.target]
        row["selftest"] = _selftest(bundle)
        row["warnings"] = _warnings(bundle, row["selftest"])
        rows.append(row)
        if not quiet:
            signed = f"signed with {row['signed_with']}; " if key else ""
            told = _told(row["selftest"])
            click.echo(f"{bundle.target}: {signed}{row['files']} files match their digests; {told}")
            for warning in row["warnings"]:
                click.echo(f"  warning: {warning}")


def _warnings(bundle: BundleRef, selftest: dict[str, Any]) -> list[str]:
    """What is not shown about the bundle, by this verification or by its report."""
    from toolchain.report import weaknesses

    missing = {"none": ["it has no self-test"], "not run": ["its self-test was not run here"]}
    told = missing.get(selftest["state"], [])
    if "report.json" not in bundle.files:
        return [*told, "it carries no report of how it was verified"]
    return [*told, *weaknesses(json.loads(bundle.read("report.json")))]


def _refuse_warnings(subject: str, rows: list[dict[str, Any]]) -> None:
    """Raises:
    ToolchainError: WEAK_EVIDENCE.
    """
    warnings = [f"{row['target']}: {warning}" for row in rows for warning in row["warnings"]]
    if warnings:
        raise ToolchainError(
            "what was checked holds, but not everything is shown (--strict)",
            where=subject,
            details=warnings,
            hint="verify on the target's own machine, give evaluation data, measure with build --device",
            code=ExitCode.WEAK_EVIDENCE,
        )


def _signers(bundles: tuple[BundleRef, ...], key: Path | None) -> dict[str, dict[str, str]]:
    """By target, what is said of its signature; checked before anything else of a bundle is looked at.

    Raises:
        ToolchainError: UNTRUSTED.
    """
    if key is None:
        return {bundle.target: {} for bundle in bundles}
    from toolchain.bundle.sign import check_signed, read_trust

    trusted = read_trust(key)
    return {bundle.target: {"signed_with": check_signed(bundle, trusted).name} for bundle in bundles}


def _selftest(bundle: BundleRef) -> dict[str, Any]:
    """``state`` is ``"passed"``, ``"not run"`` (with the ``reason``) or ``"none"``.

    Raises:
        ToolchainError: GATE_FIDELITY, it failed.
    """
    from toolchain.runtime import load, run_selftest

    try:
        model = load(bundle.reference)
    except ToolchainError as error:
        if error.code is ExitCode.INCOMPATIBLE_HOST:
            return {"state": "not run", "reason": error.what}
        raise
    with model:
        if "selftest.npz" not in model.bundle.files:
            return {"state": "none"}
        result = run_selftest(model, BytesIO(model.bundle.read("selftest.npz")))
    if not result.passed:
        raise ToolchainError(
            "the self-test failed", where=bundle.reference, details=result.problems, code=ExitCode.GATE_FIDELITY
        )
    return {"state": "passed", "max_abs_error": max((check.max_abs_error for check in result.outputs), default=0.0)}


def _told(selftest: dict[str, Any]) -> str:
    if selftest["state"] == "passed":
        return f"self-test passed, largest error {selftest['max_abs_error']:.3g}"
    return f"self-test not run: {selftest['reason']}" if selftest["state"] == "not run" else "it has no self-test"


def _reproduce(recipe: Path, targets: tuple[str, ...], found: dict[str, Any], quiet: bool) -> None:
    from toolchain.reproduce import reproduce

    result = reproduce(recipe, targets, lambda text: click.echo(text, err=True))
    found |= {"files": result.files, "digest": result.first}
    if not quiet:
        click.echo(f"reproducible: {result.files} files in two builds are identical; {result.first}")
