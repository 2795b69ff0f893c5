"""Finds the bundle that a reference means: ``PATH`` or ``PATH@target``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from toolchain.bundle.read import BundleRef, Release, open_release
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.host import Host, cuda_runs, detect_host, incompatibilities
from toolchain.target_detect import own_name

Note = Callable[[str], None]


def to_stderr(text: str) -> None:
    """Print a note where it mixes with no result."""
    print(text, file=sys.stderr)


def resolve(reference: str, host: Host | None = None, note: Note = to_stderr) -> BundleRef:
    """The bundle meant by ``reference``.

    ``PATH@target`` names it, whether or not it can run here.  ``PATH`` means the only bundle of the release, or,
    among several that ``host`` can run: CUDA before CPU, the one made for the very processor of ``host`` (on ARM by
    implementer and part) before others, more CPU features before fewer, the first in the release of those left.

    Args:
        reference: ``PATH`` or ``PATH@target``; an existing path with an ``@`` in its name is a path.
        host: the machine; detected when needed and not given.
        note: told which others are as good, where nothing but their order decided.

    Raises:
        ToolchainError: USAGE, no release there or no such target; INCOMPATIBLE_HOST, none of several can run here;
            DAMAGED_BUNDLE.
    """
    path, target = split_reference(reference)
    release = open_release(path)
    if target:
        return _named(release, target)
    if len(release.bundles) == 1:
        return release.bundles[0]
    return _best(release, host or detect_host(), note)


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


def _best(release: Release, host: Host, note: Note) -> BundleRef:
    reasons = {b.target: incompatibilities(b.manifest.requirements, host) for b in release.bundles}
    able = [b for b in release.bundles if not reasons[b.target]]
    if not able:
        raise ToolchainError(
            "this machine can run none of its bundles",
            where=str(release.path),
            details=[f"{target}: {'; '.join(why)}" for target, why in reasons.items()],
            hint="build the release for a target that suits this machine (toolchain targets lists them)",
            code=ExitCode.INCOMPATIBLE_HOST,
        )
    fitting = [b for b in able if not any(_better_device(other, b) for other in able)]
    processor = own_name(host)
    fitting = [b for b in fitting if processor and _processor(b) == processor] or fitting
    best = [b for b in fitting if not any(_more_features(other, b) for other in fitting)]
    if len(best) > 1:
        others = ", ".join(b.target for b in best[1:])
        note(f"note: {best[0].reference} is used; as good for this machine, as far as is known: {others}")
    return best[0]


def _processor(bundle: BundleRef) -> str:
    """LLVM's name of the processor that the bundle was compiled for, as its profile says."""
    cpu = bundle.manifest.target.profile.get("cpu")
    return str(cpu.get("model", "")) if isinstance(cpu, Mapping) else ""


def _better_device(one: BundleRef, other: BundleRef) -> bool:
    """Whether ``one`` uses a device that ``other`` does not use, or not as well."""
    mine, its = (b.manifest.requirements.get("cuda_arch") for b in (one, other))
    # `its` code runs on `my` device, or needs no device at all.
    return mine is not None and mine != its and (its is None or cuda_runs(its, mine))


def _more_features(one: BundleRef, other: BundleRef) -> bool:
    return set(one.manifest.requirements["cpu_features"]) > set(other.manifest.requirements["cpu_features"])
