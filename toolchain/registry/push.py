"""Sends a release to a registry: what it has already is not sent again, and the tag comes last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from toolchain.bundle.check import read_blob
from toolchain.bundle.layout import MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, Descriptor, blob_path
from toolchain.bundle.read import Release
from toolchain.bundle.signatures import signature_parts, signature_tag
from toolchain.registry.client import Registry, UnreachableError, pause
from toolchain.registry.reference import RegistryReference, tag_of_version

_TRIES = 4


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where the release is now, and how many bytes were sent."""

    reference: RegistryReference
    sent: int


def push(
    release: Release,
    reference: RegistryReference,
    *,
    plain_http: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Send a release, with its signatures.

    Args:
        release: all of it is checked first.
        reference: where to; the tag is the release's version if it names none.
        plain_http: without encryption, also to other machines than this one.
        say: told which files are sent.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, the release is not what its digests say; REGISTRY.
    """
    release.verify()
    place = replace(reference, tag=reference.tag or tag_of_version(release.version), digest="")
    registry = Registry(place, plain_http=plain_http)
    sent = 0
    for descriptor, name in _blobs(release):
        sent += _send(registry, release, descriptor, name, say)
    for bundle in release.bundles:
        registry.put_manifest(bundle.digest, read_blob(release.path, bundle.descriptor), MEDIA_TYPE_MANIFEST)
    for digest, descriptor in release.signatures.items():
        registry.put_manifest(signature_tag(digest), read_blob(release.path, descriptor), MEDIA_TYPE_MANIFEST)
    # Whoever follows the tag finds everything that it leads to.
    registry.put_manifest(place.tag, read_blob(release.path, release.bundles[0].release), MEDIA_TYPE_INDEX)
    return Pushed(replace(place, digest=release.digest), sent)


def _blobs(release: Release) -> list[tuple[Descriptor, str]]:
    """Every blob that is no manifest, once, with a name for it."""
    found: dict[str, tuple[Descriptor, str]] = {}
    for bundle in release.bundles:
        found.setdefault(bundle.config.digest, (bundle.config, f"{bundle.target}: the configuration"))
        for name, descriptor in bundle.files.items():
            found.setdefault(descriptor.digest, (descriptor, f"{bundle.target}: {name}"))
    for descriptor in release.signatures.values():
        layers, config = signature_parts(read_blob(release.path, descriptor), release.path)
        for part in (config, *layers):
            found.setdefault(part.digest, (part, "a signature"))
    return list(found.values())


def _send(registry: Registry, release: Release, descriptor: Descriptor, name: str, say: Callable[[str], None]) -> int:
    """Send one blob unless it is there; returns how many bytes that took."""
    if registry.has_blob(descriptor.digest):
        return 0
    say(f"{name} ({descriptor.size} bytes)")
    for attempt in range(1, _TRIES + 1):
        try:
            with open(release.path / blob_path(descriptor.digest), "rb") as file:
                registry.send_blob(registry.start_upload(), descriptor.digest, file, descriptor.size)
            return descriptor.size
        except UnreachableError:
            if attempt == _TRIES:
                raise
            pause(attempt)
            if registry.has_blob(descriptor.digest):
                # Only the answer was lost.
                return descriptor.size
    raise AssertionError
