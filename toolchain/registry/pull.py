"""Brings a release out of a registry into a folder: resumable, every byte checked, whole or not at all.

Blobs come into ``FOLDER/.pull/DIGEST/``, a layout in the making, which stays when a transfer breaks off and is gone on
with the next time.  When all is there it becomes ``FOLDER/NAME/VERSION`` at once.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.bundle.check import MAX_JSON_BYTES, damaged, parse_descriptor, parse_json
from toolchain.bundle.layout import (
    INDEX_JSON,
    MEDIA_TYPE_INDEX,
    OCI_LAYOUT,
    OCI_LAYOUT_BYTES,
    Blob,
    Descriptor,
    Layout,
    blob_path,
    index_json,
)
from toolchain.bundle.media import ANNOTATION_FILEPATH, ANNOTATION_TITLE, ARTIFACT_TYPE, BUNDLE_JSON
from toolchain.bundle.pack import place_layout
from toolchain.bundle.read import BundleRef, bundle_layout, open_release
from toolchain.bundle.resolve import resolve
from toolchain.bundle.signatures import descriptor_of, read_set, signature_parts, signature_tag, with_sets
from toolchain.errors import ToolchainError
from toolchain.registry.client import TIMEOUT, Registry
from toolchain.registry.download import Download, Say
from toolchain.registry.reference import RegistryReference
from toolchain.storage import storage_errors

if TYPE_CHECKING:
    from toolchain.bundle.sign import TrustKey

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_KEEP_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where the release is, its digest in the registry, and the bytes that came over the network."""

    folder: Path
    digest: str
    name: str
    version: str
    received: int


def pull(
    reference: RegistryReference,
    folder: Path,
    *,
    target: str = "",
    suitable: bool = False,
    trust: Sequence[TrustKey] = (),
    plain_http: bool = False,
    timeout: float = TIMEOUT,
    say: Say = lambda text: None,
) -> Pulled:
    """Bring a release into ``folder/NAME/VERSION``.

    Args:
        reference: of the release; a tag is looked up once, so that it may move meanwhile.
        folder: where releases are.
        target: only the bundle for this target, as a layout of its own.
        suitable: only the bundle that suits this machine best.
        trust: public keys; the bundles must be signed with one, before their engines are fetched.
        plain_http: without encryption, also for other machines than this one.
        timeout: seconds that the registry may keep silent.
        say: told which files come.

    Raises:
        ToolchainError: REGISTRY, it cannot be reached, or has no such release; DAMAGED_BUNDLE, something is not what
            its digest says; UNTRUSTED; STORAGE; USAGE, no such target; INCOMPATIBLE_HOST, nothing for this machine.
    """
    registry = Registry(reference, plain_http=plain_http, timeout=timeout)
    found = registry.manifest(reference.named)
    assert found is not None
    data, digest = found
    if reference.digest and digest != reference.digest:
        raise damaged(f"has digest {digest}", str(reference))
    with _store(folder, digest) as store:
        job = _Job(registry, store, Download(registry, store, folder, say), say)
        job.begin(data, digest)
        chosen = job.choose(target, suitable=suitable)
        if trust:
            from toolchain.bundle.sign import check_signed

            for bundle in chosen:
                try:
                    check_signed(bundle, tuple(trust))
                except ToolchainError as error:
                    where = f"{reference} for {bundle.target}"
                    raise ToolchainError(error.what, where=where, hint=error.hint, code=error.code) from None
        for bundle in chosen:
            for name, descriptor in bundle.files.items():
                job.download.fetch(descriptor, f"{bundle.target}: {name}")
        layout = bundle_layout(chosen[0]) if target or suitable else job.whole()
        info = chosen[0].manifest
        place = folder / info.name / info.version
        place_layout(layout, place, link=True)
        shutil.rmtree(store, ignore_errors=True)
    return Pulled(place, digest, info.name, info.version, job.download.received)


class _Job:
    """One release on its way; what is there already, here or in other versions, is not fetched again."""

    def __init__(self, registry: Registry, store: Path, download: Download, say: Say) -> None:
        self._registry = registry
        self._store = store
        self._say = say
        self._where = str(registry.reference)
        self._root: Descriptor | None = None
        self._signatures: dict[str, Descriptor] = {}
        self.download = download

    def begin(self, data: bytes, digest: str) -> None:
        """Fetch everything but engines and other files: indices, manifests, what they say, and signatures."""
        index = parse_json(data, self._where)
        manifests, annotations = index.get("manifests"), index.get("annotations")
        if index.get("artifactType") != ARTIFACT_TYPE or not isinstance(manifests, list):
            raise damaged(f"is no release: not an image index of type {ARTIFACT_TYPE}", self._where)
        descriptors = [parse_descriptor(entry, self._where) for entry in manifests]
        if isinstance(annotations, dict) and _NAME.fullmatch(str(annotations.get(ANNOTATION_TITLE))):
            self.download.name = str(annotations[ANNOTATION_TITLE])
        self._root = Descriptor(MEDIA_TYPE_INDEX, digest, len(data), ARTIFACT_TYPE, annotations or {})
        self.download.write(digest, data)
        for descriptor in descriptors:
            document = parse_json(self._manifest(descriptor), f"{self._where} {descriptor.digest}")
            self._parts(document.get("config"), document.get("layers"))
        for signed in (digest, *(d.digest for d in descriptors)):
            self._signature(signed)
        with storage_errors(self._store):
            (self._store / OCI_LAYOUT).write_bytes(OCI_LAYOUT_BYTES)
            (self._store / INDEX_JSON).write_bytes(index_json(self._root, list(self._signatures.values())))

    def choose(self, target: str, *, suitable: bool) -> tuple[BundleRef, ...]:
        """The bundles that are wanted; their files are yet to come."""
        release = open_release(self._store)
        for name in [text for b in release.bundles for text in (b.manifest.name, b.manifest.version)]:
            if not _NAME.fullmatch(name):
                raise damaged(f"{name!r} is no name or version", self._where)
        if target:
            return (resolve(f"{self._store}@{target}"),)
        return (resolve(str(self._store), note=self._say),) if suitable else release.bundles

    def whole(self) -> Layout:
        """The release with all its bundles."""
        assert self._root is not None
        release = open_release(self._store)
        blobs = {self._root.digest: self._blob(self._root)}
        for bundle in release.bundles:
            parts = (bundle.descriptor, bundle.config, *bundle.files.values())
            blobs |= {part.digest: self._blob(part) for part in parts}
        sets = [read_set(self._store, digest, found)[0] for digest, found in release.signatures.items()]
        return with_sets(Layout(self._root, blobs), sets)

    def _manifest(self, descriptor: Descriptor) -> bytes:
        path = self._store / blob_path(descriptor.digest)
        if not path.exists():
            found = self._registry.manifest(descriptor.digest)
            assert found is not None
            self.download.write(descriptor.digest, found[0])
        return path.read_bytes()

    def _parts(self, config: object, layers: object) -> None:
        """Fetch the configuration and ``bundle.json`` of a bundle."""
        if not isinstance(layers, list):
            raise damaged("a bundle's manifest must hold layers", self._where)
        wanted = [parse_descriptor(config, self._where)]
        for layer in (parse_descriptor(entry, self._where) for entry in layers):
            if layer.annotations.get(ANNOTATION_FILEPATH) == BUNDLE_JSON:
                wanted.append(layer)
        for part in wanted:
            self._small(part)

    def _signature(self, signed: str) -> None:
        found = self._registry.manifest(signature_tag(signed), missing_ok=True)
        if found is None:
            return
        data, digest = found
        layers, config = signature_parts(data, self._where)
        for part in (config, *layers):
            self._small(part)
        self.download.write(digest, data)
        assert self._root is not None
        root = signed == self._root.digest
        self._signatures[signed] = descriptor_of(signed, Blob(digest, len(data), data), root=root)

    def _small(self, part: Descriptor) -> None:
        if part.size > MAX_JSON_BYTES:
            raise damaged(f"{part.digest} has {part.size} bytes, at most {MAX_JSON_BYTES} are allowed", self._where)
        self.download.fetch(part, part.media_type)

    def _blob(self, descriptor: Descriptor) -> Blob:
        return Blob(descriptor.digest, descriptor.size, self._store / blob_path(descriptor.digest))


@contextmanager
def _store(folder: Path, digest: str) -> Iterator[Path]:
    """The layout in the making of a release, for one process at a time."""
    hidden = folder / ".pull"
    store = hidden / digest.partition(":")[2]
    with storage_errors(folder):
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with storage_errors(folder):
            for left in hidden.iterdir():
                if left != store and time.time() - left.stat().st_mtime > _KEEP_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
            (store / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        yield store
    finally:
        os.close(lock)
