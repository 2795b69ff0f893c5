"""Signatures in a layout, in cosign's form (``sigstore/cosign``, ``specs/SIGNATURE_SPEC.md``); what they are worth is
checked by :mod:`toolchain.bundle.sign`.

The signatures of a manifest or image index are one manifest, tagged ``sha256-<hex>.sig`` after what they sign.  Each is
a layer: the payload, which names the signed digest, with the signature in an annotation.  ``index.json`` names these
manifests beside the image index, which itself stays as it is: signing changes no digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifact import canonical_json
from toolchain.bundle.check import check_index, damaged, parse_descriptor, parse_json, read_blob, read_index
from toolchain.bundle.layout import (
    INDEX_JSON,
    MEDIA_TYPE_MANIFEST,
    Blob,
    Descriptor,
    Layout,
    blob_of_bytes,
    blob_path,
)
from toolchain.bundle.media import (
    ANNOTATION_KIND,
    ANNOTATION_SIGNATURE,
    ANNOTATION_TAG,
    KIND_SIGNATURES,
    MEDIA_TYPE_IMAGE_CONFIG,
    MEDIA_TYPE_SIGNATURE,
)
from toolchain.errors import ToolchainError

#: The time that cosign writes, so that the same signatures give the same bytes.
_NO_TIME = "0001-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature: the bytes that are signed, and the layer's annotations, one of which is the signature."""

    payload: bytes
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SignatureSet:
    """All signatures of one manifest or image index, ready to be written."""

    descriptor: Descriptor
    blobs: Mapping[str, Blob]


def signature_tag(digest: str) -> str:
    """The tag of the signatures of ``digest``: ``sha256-<hex>.sig``."""
    return digest.replace(":", "-") + ".sig"


def descriptor_of(digest: str, manifest: Blob, *, root: bool) -> Descriptor:
    """The entry in ``index.json`` of the signatures of ``digest``; ``root``: it is the image index itself."""
    annotations = {ANNOTATION_TAG: signature_tag(digest)} | ({ANNOTATION_KIND: KIND_SIGNATURES} if root else {})
    return Descriptor(MEDIA_TYPE_MANIFEST, manifest.digest, manifest.size, annotations=annotations)


def known_signatures(
    folder: Path, root: Descriptor, bundles: Iterable[str], signatures: Sequence[Descriptor]
) -> dict[str, Descriptor]:
    """Signed digest -> manifest of its signatures, after ``index.json`` was checked as a whole.

    Args:
        folder: the layout.
        root: the image index as it follows from its own content.
        bundles: digests of the manifests that it names.
        signatures: what ``index.json`` names besides.

    Raises:
        ToolchainError: DAMAGED_BUNDLE.
    """
    where = folder / INDEX_JSON
    tags = {signature_tag(digest): digest for digest in (root.digest, *bundles)}
    known: dict[str, Descriptor] = {}
    for found in signatures:
        digest = tags.get(found.annotations.get(ANNOTATION_TAG, ""))
        if digest is None:
            raise damaged(f"names {found.short}, which is no signature of anything in this release", where)
        expected = descriptor_of(digest, Blob(found.digest, found.size, b""), root=digest == root.digest)
        if found != expected or digest in known:
            raise damaged(f"names signatures of {digest} in another way than once as {signature_tag(digest)}", where)
        known[digest] = found
    check_index(folder, root, signatures)
    return known


def read_set(folder: Path, digest: str, descriptor: Descriptor) -> tuple[SignatureSet, list[Signature]]:
    """The signatures of ``digest``, every blob of them checked against its own digest.

    Raises:
        ToolchainError: DAMAGED_BUNDLE.
    """
    data = read_blob(folder, descriptor)
    where = folder / blob_path(descriptor.digest)
    layers, config = signature_parts(data, where)
    blobs = {descriptor.digest: blob_of_bytes(data)}
    signatures = []
    for part in (config, *layers):
        content = read_blob(folder, part)
        blobs[part.digest] = Blob(part.digest, part.size, folder / blob_path(part.digest))
        if part is not config and part.media_type == MEDIA_TYPE_SIGNATURE and ANNOTATION_SIGNATURE in part.annotations:
            signatures.append(Signature(content, part.annotations))
    return SignatureSet(descriptor, blobs), signatures


def signature_parts(data: bytes, where: Path | str) -> tuple[list[Descriptor], Descriptor]:
    """Layers and configuration of a manifest of signatures.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, it is none.
    """
    document = parse_json(data, where)
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise damaged("a manifest of signatures must hold layers", where)
    return [parse_descriptor(layer, where) for layer in layers], parse_descriptor(document.get("config"), where)


def make_set(digest: str, signatures: Sequence[Signature], *, root: bool) -> SignatureSet:
    """The manifest of ``signatures`` of ``digest``, and all its blobs."""
    payloads = [blob_of_bytes(signature.payload) for signature in signatures]
    layers = [
        Descriptor(MEDIA_TYPE_SIGNATURE, blob.digest, blob.size, annotations=signature.annotations).to_json()
        for blob, signature in zip(payloads, signatures, strict=True)
    ]
    config = blob_of_bytes(canonical_json(_image_config([blob.digest for blob in payloads])))
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE_MANIFEST,
        "config": Descriptor(MEDIA_TYPE_IMAGE_CONFIG, config.digest, config.size).to_json(),
        "layers": layers,
    }
    manifest = blob_of_bytes(canonical_json(document))
    blobs = {blob.digest: blob for blob in (manifest, config, *payloads)}
    return SignatureSet(descriptor_of(digest, manifest, root=root), blobs)


def _image_config(diff_ids: Sequence[str]) -> dict[str, object]:
    """The configuration that the OCI image specification asks for; it says nothing of its own."""
    return {
        "architecture": "",
        "os": "",
        "config": {},
        "created": _NO_TIME,
        "history": [{"created": _NO_TIME} for _ in diff_ids],
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }


def with_sets(layout: Layout, sets: Iterable[SignatureSet]) -> Layout:
    """``layout`` with signatures."""
    blobs, descriptors = dict(layout.blobs), list(layout.signatures)
    for one in sets:
        descriptors.append(one.descriptor)
        blobs |= one.blobs
    return Layout(layout.root, blobs, descriptors)


def with_standing(layout: Layout, folder: Path) -> Layout:
    """``layout`` with the signatures that ``folder`` holds, if it is about the same image index.

    So building a release again does not take away what signed it.
    """
    digests = [blob for blob in layout.blobs if blob != layout.root.digest]
    try:
        root, signatures = read_index(folder)
        if root.digest != layout.root.digest or not signatures:
            return layout
        known = known_signatures(folder, layout.root, digests, signatures)
        return with_sets(layout, [read_set(folder, digest, found)[0] for digest, found in known.items()])
    except ToolchainError:
        return layout
