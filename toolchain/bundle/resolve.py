"""Finds the bundle that a reference means: ``PATH`` or ``PATH@target``."""

from __future__ import annotations

from pathlib import Path

from toolchain.bundle.read import BundleRef, Release, open_release
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.host import Host, cuda_runs, detect_host, incompatibilities


def resolve(reference: str, host: Host | None = None) -> BundleRef:
    """The bundle meant by ``reference``.

    ``PATH@target`` names it, whether or not it can run here.  ``PATH`` means the only bundle of the release, or,
    among several, the most specific one that ``host`` can run: CUDA before CPU, more CPU features before fewer.

    Args:
        reference: ``PATH`` or ``PATH@target``; an existing path with an ``@`` in its name is a path.
        host: the machine; detected when needed and not given.

    Raises:
        ToolchainError: USAGE, no release there, no such target, or several bundles fit equally well;
            INCOMPATIBLE_HOST, none of several can run here; DAMAGED_BUNDLE.
    """
    path, target = split_reference(reference)
    release = open_release(path)
    if target:
        return _named(release, target)
    if len(release.bundles) == 1:
        return release.bundles[0]
    return _best(release, host or detect_host())


def split_reference(reference: str) -> tuple[Path, str]:
    """``PATH@target`` -> path and target; the target is empty when none is named."""
    path, at, target = reference.rpartition("@")
    if not at or Path(reference).exists():
        return Path(reference), ""
    return Path(path), target


def _named(release: Release, target: str) -> BundleRef:
    bundle = release.bundle(target)
    if bundle is None:
        targets = [b.target for b in release.bundles]
        raise ToolchainError(
            f"has no bundle for target {target!r}{did_you_mean(target, targets)}; it has {', '.join(targets)}",
            where=str(release.path),
            code=ExitCode.USAGE,
        )
    return bundle


def _best(release: Release, host: Host) -> BundleRef:
    reasons = {b.target: incompatibilities(b.manifest.requirements, host) for b in release.bundles}
    able = [b for b in release.bundles if not reasons[b.target]]
    best = [b for b in able if not any(_more_specific(other, b) for other in able)]
    if len(best) == 1:
        return best[0]
    if not able:
        raise ToolchainError(
            "this machine can run none of its bundles",
            where=str(release.path),
            details=[f"{target}: {'; '.join(why)}" for target, why in reasons.items()],
            hint="build the release for a target that suits this machine (toolchain targets lists them)",
            code=ExitCode.INCOMPATIBLE_HOST,
        )
    raise ToolchainError(
        f"several bundles suit this machine equally well: {', '.join(b.target for b in best)}",
        where=str(release.path),
        details=[f"{t}: {'; '.join(why) or 'runs on this machine'}" for t, why in reasons.items()],
        hint=f"name one: {best[0].reference}",
        code=ExitCode.USAGE,
    )


def _more_specific(one: BundleRef, other: BundleRef) -> bool:
    """Whether everything that runs ``one`` runs ``other``, and ``one`` needs more."""
    mine, its = one.manifest.requirements, other.manifest.requirements
    my_cuda, its_cuda = mine.get("cuda_arch"), its.get("cuda_arch")
    if my_cuda != its_cuda:
        # `its` code runs on `my` device, or needs no device at all.
        return my_cuda is not None and (its_cuda is None or cuda_runs(its_cuda, my_cuda))
    return set(mine["cpu_features"]) > set(its["cpu_features"])
