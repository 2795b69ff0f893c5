"""Packs bundles and releases.

A bundle is an OCI artifact of the CNCF ModelPack kind (``modelpack/model-spec``, ``docs/spec.md``): one manifest, a
layer for each file, uncompressed, its name in the annotation ``org.cncf.model.filepath``.  A release is an OCI image
index over the bundles of all targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.artifact import canonical_json, digest_file
from toolchain.bundle.atomic import replace_folder
from toolchain.bundle.check import parse_json
from toolchain.bundle.layout import (
    INDEX_JSON,
    MEDIA_TYPE_INDEX,
    MEDIA_TYPE_MANIFEST,
    OCI_LAYOUT,
    Blob,
    Descriptor,
    Layout,
    blob_of_bytes,
    blob_of_file,
    index_json,
    write_layout,
)
from toolchain.bundle.manifest import BundleManifest, parse_engine
from toolchain.bundle.media import (
    ANNOTATION_FILEPATH,
    ANNOTATION_TARGET,
    ANNOTATION_TITLE,
    ANNOTATION_VERSION,
    ARTIFACT_TYPE,
    BUNDLE_JSON,
    MEDIA_TYPE_CONFIG,
    media_type_of,
)
from toolchain.bundle.names import name_conflicts
from toolchain.bundle.platform import oci_platform
from toolchain.bundle.signatures import with_standing
from toolchain.errors import ExitCode, ToolchainError


@dataclass(frozen=True, slots=True)
class BundleSpec:
    """What goes into one bundle.

    Attributes:
        manifest: becomes ``bundle.json``.
        files: name inside the bundle -> file of this machine.  ``contract.json``, ``engine.json`` and every engine
            file must be among them, ``bundle.json`` must not.
        media_types: name -> media type, where ``media.media_type_of`` does not fit.
    """

    manifest: BundleManifest
    files: Mapping[str, Path]
    media_types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedBundle:
    """A bundle ready to be written: the descriptor of its manifest, and all its blobs by digest."""

    descriptor: Descriptor
    blobs: Mapping[str, Blob]


@dataclass(frozen=True, slots=True)
class PackResult:
    """What :func:`pack_release` did.

    Attributes:
        folder: where the release is.
        digest: of the release's image index; equal digests mean equal releases.
        bundles: target name -> digest of its manifest.
        size: bytes of all blobs.
        unchanged: the folder already held exactly this release, and was left as it was.
    """

    folder: Path
    digest: str
    bundles: Mapping[str, str]
    size: int
    unchanged: bool


def pack_bundle(spec: BundleSpec) -> PackedBundle:
    """Hash the files of a bundle and make its manifest; writes nothing.

    Raises:
        ToolchainError: INTERNAL, names that are unsafe or missing, or a manifest that contradicts its files;
            STORAGE, a file that cannot be read.
    """
    _check_spec(spec)
    named = {name: _blob(path) for name, path in spec.files.items()}
    named[BUNDLE_JSON] = blob_of_bytes(spec.manifest.to_bytes())
    layers = [
        Descriptor(
            spec.media_types.get(name) or media_type_of(name),
            blob.digest,
            blob.size,
            annotations={ANNOTATION_FILEPATH: name},
        )
        for name, blob in sorted(named.items())
    ]
    config = blob_of_bytes(canonical_json(_model_config(spec.manifest, layers)))
    info = spec.manifest
    annotations = {
        ANNOTATION_TITLE: info.name,
        ANNOTATION_VERSION: info.version,
        ANNOTATION_TARGET: info.target.name,
        "vnd.toolchain.backend": info.engine.backend,
        "vnd.toolchain.precision": info.engine.precision,
    }
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": Descriptor(MEDIA_TYPE_CONFIG, config.digest, config.size).to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": annotations,
    }
    manifest = blob_of_bytes(canonical_json(document))
    descriptor = Descriptor(
        MEDIA_TYPE_MANIFEST, manifest.digest, manifest.size, ARTIFACT_TYPE, annotations, oci_platform(info)
    )
    return PackedBundle(descriptor, {blob.digest: blob for blob in (*named.values(), config, manifest)})


def pack_release(
    name: str, version: str, bundles: Sequence[PackedBundle], folder: Path, choose: str = "another folder"
) -> PackResult:
    """Write a release with these bundles as an OCI image layout, in place of what ``folder`` held.

    A reader sees the old release or the new one, never a mixture; a failure leaves the old one.

    Raises:
        ToolchainError: STORAGE, ``folder`` holds something else than a release, or the disk is full or read-only;
            INTERNAL, no bundles, or two for one target.
    """
    layout = release_layout(name, version, [b.descriptor for b in bundles], [b.blobs for b in bundles])
    unchanged = place_layout(layout, folder, choose=choose)
    digests = {b.descriptor.annotations[ANNOTATION_TARGET]: b.descriptor.digest for b in bundles}
    return PackResult(folder, layout.root.digest, digests, sum(b.size for b in layout.blobs.values()), unchanged)


def release_layout(
    name: str, version: str, descriptors: Sequence[Descriptor], blobs: Sequence[Mapping[str, Blob]]
) -> Layout:
    """The layout of a release over manifests with these descriptors, in the order of the targets' names."""
    ordered = sorted(descriptors, key=lambda d: d.annotations[ANNOTATION_TARGET])
    targets = [d.annotations[ANNOTATION_TARGET] for d in ordered]
    if not targets or len(set(targets)) != len(targets):
        raise ToolchainError(f"a release needs bundles of different targets, got {targets}")
    annotations = {ANNOTATION_TITLE: name, ANNOTATION_VERSION: version}
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE_INDEX,
        "artifactType": ARTIFACT_TYPE,
        "manifests": [d.to_json() for d in ordered],
        "annotations": annotations,
    }
    index = blob_of_bytes(canonical_json(document))
    root = Descriptor(MEDIA_TYPE_INDEX, index.digest, index.size, ARTIFACT_TYPE, annotations)
    return Layout(root, {index.digest: index} | {d: blob for part in blobs for d, blob in part.items()})


def place_layout(layout: Layout, folder: Path, *, link: bool = False, choose: str = "another folder") -> bool:
    """Put ``layout`` at ``folder``; True when it was there already and nothing was written.

    Signatures of the same release that stand there are kept.  ``link``: as for :func:`write_layout`.
    """
    layout = layout if layout.signatures else with_standing(layout, folder)
    if _holds(folder, layout):
        return True
    _refuse_foreign(folder)
    replace_folder(folder, lambda staging: write_layout(layout, staging, link=link), choose)
    return False


def _holds(folder: Path, layout: Layout) -> bool:
    """Whether ``folder`` holds exactly ``layout``; every file is hashed."""
    try:
        if (folder / INDEX_JSON).read_bytes() != index_json(layout.root, layout.signatures):
            return False
        files = layout.files()
        present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
        return present.keys() == files.keys() and all(
            present[name].stat().st_size == blob.size and digest_file(present[name]) == blob.digest
            for name, blob in files.items()
        )
    except OSError:
        return False


def _refuse_foreign(folder: Path) -> None:
    """A folder is replaced only if nothing of the user's would be lost with it."""
    if not folder.exists():
        return
    where = str(folder)
    if not folder.is_dir():
        raise ToolchainError("a file is in the way of the release's folder", where=where, code=ExitCode.STORAGE)
    foreign = sorted({p.name for p in folder.iterdir()} - {OCI_LAYOUT, INDEX_JSON, "blobs"})
    if foreign:
        raise ToolchainError(
            f"the folder holds files that are not part of a release: {', '.join(foreign[:5])}",
            where=where,
            hint="move them away, or write the release to another folder",
            code=ExitCode.STORAGE,
        )


def _blob(path: Path) -> Blob:
    try:
        return blob_of_file(path)
    except OSError as error:
        raise ToolchainError(f"cannot be read: {error.strerror}", where=str(path), code=ExitCode.STORAGE) from error


def _check_spec(spec: BundleSpec) -> None:
    problems = name_conflicts([*spec.files, BUNDLE_JSON])
    engine_files = [variant.file for variant in spec.manifest.engine.variants]
    problems += [f"{n!r} is missing" for n in ("contract.json", "engine.json", *engine_files) if n not in spec.files]
    if not problems:
        engine_json = spec.files["engine.json"]
        if parse_engine(_read_json(engine_json), engine_json) != spec.manifest.engine:
            problems.append("bundle.json and engine.json describe different engines")
        if _read_json(spec.files["contract.json"]) != spec.manifest.contract:
            problems.append("bundle.json and contract.json hold different contracts")
    if problems:
        raise ToolchainError("the bundle does not hold together", where=spec.manifest.target.name, details=problems)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise ToolchainError(f"cannot be read: {error.strerror}", where=str(path), code=ExitCode.STORAGE) from error


def _model_config(info: BundleManifest, layers: Sequence[Descriptor]) -> dict[str, Any]:
    """ModelPack's configuration (``docs/config.md``); it has no field for the target and forbids other fields."""
    precision = {"fp32": "float32", "fp16": "float16"}.get(info.engine.precision, "int8")
    config = {"format": "onnx" if info.engine.backend == "onnxruntime" else "tvm", "precision": precision}
    if precision == "int8":
        config["quantization"] = info.engine.precision
    descriptor = {"name": info.name, "version": info.version, "description": info.description}
    return {
        "descriptor": {key: value for key, value in descriptor.items() if value},
        "config": config,
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }
