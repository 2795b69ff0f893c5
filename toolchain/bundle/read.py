"""Opens releases and bundles, and vouches for what they hold.

Opening reads and verifies ``index.json``, the image index, and of each bundle the manifest, the configuration and
``bundle.json``; :meth:`BundleRef.verify` hashes the rest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain.bundle.check import damaged, parse_descriptor, parse_json, read_blob, read_index, verify_blob
from toolchain.bundle.layout import (
    INDEX_JSON,
    MEDIA_TYPE_INDEX,
    MEDIA_TYPE_MANIFEST,
    OCI_LAYOUT,
    Blob,
    Descriptor,
    Layout,
    blob_path,
)
from toolchain.bundle.manifest import BundleManifest
from toolchain.bundle.media import (
    ANNOTATION_FILEPATH,
    ANNOTATION_TARGET,
    ANNOTATION_TITLE,
    ANNOTATION_VERSION,
    ARTIFACT_TYPE,
    BUNDLE_JSON,
    MEDIA_TYPE_CONFIG,
)
from toolchain.bundle.names import name_conflicts
from toolchain.bundle.pack import place_layout, release_layout
from toolchain.bundle.signatures import known_signatures, read_set, with_sets
from toolchain.errors import ExitCode, ToolchainError
from toolchain.storage import storage_errors


@dataclass(frozen=True, slots=True)
class BundleRef:
    """One target's bundle inside a layout.

    Attributes:
        layout: the folder of the layout.
        descriptor: of the bundle's manifest, as the release's index has it.
        config: descriptor of the ModelPack configuration.
        files: name inside the bundle -> descriptor of the layer.
        manifest: the parsed ``bundle.json``.
        release: descriptor of the image index that the bundle was opened from.
        signatures: signed digest (of a manifest or image index) -> manifest of its signatures.
    """

    layout: Path
    descriptor: Descriptor
    config: Descriptor
    files: Mapping[str, Descriptor]
    manifest: BundleManifest
    release: Descriptor
    signatures: Mapping[str, Descriptor]

    @property
    def target(self) -> str:
        return self.manifest.target.name

    @property
    def digest(self) -> str:
        """Digest of the manifest: the identity of the bundle."""
        return self.descriptor.digest

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())

    @property
    def reference(self) -> str:
        """``PATH@target``, as :func:`toolchain.bundle.resolve.resolve` takes it."""
        return f"{self.layout}@{self.target}"

    def verify(self) -> None:
        """Hash every blob of this bundle.

        Raises:
            ToolchainError: DAMAGED_BUNDLE, a blob is missing, truncated or changed.
        """
        verify_blob(self.layout, self.descriptor, "the manifest")
        verify_blob(self.layout, self.config, "the configuration")
        for name, descriptor in self.files.items():
            verify_blob(self.layout, descriptor, name)

    def read(self, name: str) -> bytes:
        """The verified bytes of one small file.

        Raises:
            ToolchainError: DAMAGED_BUNDLE, its content is wrong, or there is no such file.
        """
        if name not in self.files:
            raise damaged(f"the bundle of {self.target} has no file {name}", self.layout)
        return read_blob(self.layout, self.files[name])

    def extract(self, folder: Path) -> None:
        """Copy the files of the bundle under their names into ``folder``, which must be empty or not exist.

        Raises:
            ToolchainError: DAMAGED_BUNDLE; STORAGE, not writable or not empty.
        """
        self.verify()
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ToolchainError("the folder is not empty", where=str(folder), code=ExitCode.STORAGE)
            try:
                self._place(folder, shutil.copyfile)
            except BaseException:
                for entry in folder.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                raise

    @contextmanager
    def materialize(self) -> Iterator[Path]:
        """A temporary folder with the files under their names, without copying them where possible.

        Only for reading: the files are hard links to the bundle's own.  :meth:`verify` is left to the caller.
        """
        with storage_errors(Path(tempfile.gettempdir()), "another folder for temporary files (TMPDIR)"):
            holder = tempfile.TemporaryDirectory(prefix="toolchain-bundle-")
        with holder as name:
            self.link_into(Path(name))
            yield Path(name)

    def link_into(self, folder: Path) -> None:
        """Link the files of the bundle into the existing ``folder``: hard links, else symbolic ones."""
        with storage_errors(folder):
            self._place(folder, _link)

    def _place(self, folder: Path, put: Callable[[Path, Path], object]) -> None:
        for name, descriptor in self.files.items():
            destination = folder / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            put(self.layout / blob_path(descriptor.digest), destination)


def _link(source: Path, destination: Path) -> None:
    try:
        # A hard link outlives the replacement of the release while the bundle is in use.
        os.link(source, destination)
    except OSError:
        # Another file system, or a file of another user.
        destination.symlink_to(source.resolve())


@dataclass(frozen=True, slots=True)
class Release:
    """A release: bundles of one model version, one for each target, ordered by the targets' names."""

    path: Path
    name: str
    version: str
    digest: str
    bundles: tuple[BundleRef, ...]
    signatures: Mapping[str, Descriptor]

    def verify(self) -> None:
        """Hash every blob of every bundle, and of signatures; whose they are is not asked.

        Raises:
            ToolchainError: DAMAGED_BUNDLE.
        """
        for bundle in self.bundles:
            bundle.verify()
        self.verify_signatures()

    def verify_signatures(self) -> None:
        """Hash every blob of signatures.

        Raises:
            ToolchainError: DAMAGED_BUNDLE.
        """
        for digest, descriptor in self.signatures.items():
            read_set(self.path, digest, descriptor)

    def bundle(self, target: str) -> BundleRef | None:
        return next((b for b in self.bundles if b.target == target), None)


def open_release(path: Path) -> Release:
    """Open a release, or a single bundle that was copied into a layout of its own.

    Raises:
        ToolchainError: USAGE, nothing there or not a release; DAMAGED_BUNDLE; INCOMPATIBLE_HOST, a newer schema.
    """
    if not path.is_dir() or not any((path / name).exists() for name in (OCI_LAYOUT, INDEX_JSON, "blobs")):
        reason = "is not a bundle or release (no OCI image layout)" if path.exists() else "does not exist"
        raise ToolchainError(reason, where=str(path), hint=_releases_below(path), code=ExitCode.USAGE)
    root, named = read_index(path)
    where = path / blob_path(root.digest)
    if root.media_type != MEDIA_TYPE_INDEX:
        raise damaged(f"must name an image index ({MEDIA_TYPE_INDEX}), got {root.media_type!r}", path / INDEX_JSON)
    index = parse_json(read_blob(path, root), where)
    manifests, annotations = index.get("manifests"), index.get("annotations")
    if not isinstance(manifests, list) or not manifests or not isinstance(annotations, dict):
        raise damaged("a release's index must hold manifests and annotations", where)
    descriptors = [parse_descriptor(m, where) for m in manifests]
    derived = Descriptor(MEDIA_TYPE_INDEX, root.digest, root.size, ARTIFACT_TYPE, annotations)
    signatures = known_signatures(path, derived, [d.digest for d in descriptors], named)
    name, version = annotations.get(ANNOTATION_TITLE), annotations.get(ANNOTATION_VERSION)
    if not isinstance(name, str) or not isinstance(version, str):
        raise damaged(f"the annotations must hold {ANNOTATION_TITLE} and {ANNOTATION_VERSION}", where)
    bundles = tuple(_open_bundle(path, descriptor, derived, signatures) for descriptor in descriptors)
    targets = [b.target for b in bundles]
    if len(set(targets)) != len(targets):
        raise damaged(f"two bundles are for the same target: {', '.join(targets)}", where)
    return Release(path, name, version, root.digest, bundles, signatures)


def _releases_below(path: Path) -> str:
    """A hint at releases one or two folders further down, as OUTPUT/NAME/VERSION has them."""
    found = sorted(layout.parent for depth in ("*", "*/*") for layout in path.glob(f"{depth}/{OCI_LAYOUT}"))
    return f"releases in it: {', '.join(map(str, found[:5]))}{', ...' if len(found) > 5 else ''}" if found else ""


def _open_bundle(
    layout: Path, descriptor: Descriptor, release: Descriptor, signatures: Mapping[str, Descriptor]
) -> BundleRef:
    where = layout / blob_path(descriptor.digest)
    if descriptor.media_type != MEDIA_TYPE_MANIFEST or descriptor.artifact_type != ARTIFACT_TYPE:
        raise damaged(f"must be a manifest ({MEDIA_TYPE_MANIFEST}) of type {ARTIFACT_TYPE}", where)
    data = parse_json(read_blob(layout, descriptor), where)
    layers = data.get("layers")
    if not isinstance(layers, list) or not layers:
        raise damaged("a bundle's manifest must hold layers", where)
    config = parse_descriptor(data.get("config"), where)
    if config.media_type != MEDIA_TYPE_CONFIG:
        raise damaged(f"the configuration must be {MEDIA_TYPE_CONFIG}, got {config.media_type!r}", where)
    parse_json(read_blob(layout, config), layout / blob_path(config.digest))
    named = [_named_layer(layer, where) for layer in layers]
    conflicts = name_conflicts(name for name, _ in named)
    if conflicts:
        raise damaged(f"unsafe file name: {conflicts[0]}", where)
    files = dict(named)
    if BUNDLE_JSON not in files:
        raise damaged(f"the bundle has no {BUNDLE_JSON}", where)
    blob = layout / blob_path(files[BUNDLE_JSON].digest)
    manifest = BundleManifest.from_bytes(read_blob(layout, files[BUNDLE_JSON]), f"{BUNDLE_JSON} ({blob})")
    for variant in manifest.engine.variants:
        if variant.file not in files:
            raise damaged(f"the engine file {variant.file} is not in the bundle", where)
    if descriptor.annotations.get(ANNOTATION_TARGET) != manifest.target.name:
        raise damaged(f"the index and {BUNDLE_JSON} name different targets", where)
    own = {digest: signatures[digest] for digest in (descriptor.digest, release.digest) if digest in signatures}
    return BundleRef(layout, descriptor, config, files, manifest, release, own)


def _named_layer(layer: object, where: Path) -> tuple[str, Descriptor]:
    descriptor = parse_descriptor(layer, where)
    name = descriptor.annotations.get(ANNOTATION_FILEPATH)
    if name is None:
        raise damaged(f"layer {descriptor.short} lacks the annotation {ANNOTATION_FILEPATH}", where)
    return name, descriptor


def copy_bundle(bundle: BundleRef, folder: Path) -> bool:
    """Write one target's bundle as a layout of its own; its manifest, and so its digest, stay the same.

    Returns:
        True when ``folder`` held exactly this already and was left as it was.

    Raises:
        ToolchainError: DAMAGED_BUNDLE; STORAGE.
    """
    bundle.verify()
    return place_layout(bundle_layout(bundle), folder)


def bundle_layout(bundle: BundleRef) -> Layout:
    """One target's bundle as a layout of its own, with the signatures of its manifest.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, a signature is not what its digest says.
    """
    descriptors = [bundle.descriptor, bundle.config, *bundle.files.values()]
    blobs = {d.digest: Blob(d.digest, d.size, bundle.layout / blob_path(d.digest)) for d in descriptors}
    info = bundle.manifest
    layout = release_layout(info.name, info.version, [bundle.descriptor], [blobs])
    sets = []
    if bundle.digest in bundle.signatures:
        sets.append(read_set(bundle.layout, bundle.digest, bundle.signatures[bundle.digest])[0])
    if layout.root.digest == bundle.release.digest and bundle.release.digest in bundle.signatures:
        # It was a layout of its own already.
        sets.insert(0, read_set(bundle.layout, bundle.release.digest, bundle.signatures[bundle.release.digest])[0])
    return with_sets(layout, sets)
