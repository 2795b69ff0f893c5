"""Media types and annotations of bundles: CNCF ModelPack's where they fit (``modelpack/model-spec``), else our own."""

from __future__ import annotations

from pathlib import Path

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
MEDIA_TYPE_CONFIG = "application/vnd.cncf.model.config.v1+json"
MEDIA_TYPE_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
MEDIA_TYPE_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
MEDIA_TYPE_DOC = "application/vnd.cncf.model.doc.v1.raw"
MEDIA_TYPE_CODE = "application/vnd.cncf.model.code.v1.raw"
MEDIA_TYPE_DATASET = "application/vnd.cncf.model.dataset.v1.raw"
MEDIA_TYPE_BUNDLE = "application/vnd.toolchain.bundle.v1+json"
ANNOTATION_FILEPATH = "org.cncf.model.filepath"
ANNOTATION_TITLE = "org.opencontainers.image.title"
ANNOTATION_VERSION = "org.opencontainers.image.version"
ANNOTATION_TARGET = "vnd.toolchain.target"
BUNDLE_JSON = "bundle.json"
# Signatures as cosign stores them (sigstore/cosign, specs/SIGNATURE_SPEC.md, and its layouts on disk).
MEDIA_TYPE_IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_TYPE_SIGNATURE = "application/vnd.dev.cosign.simplesigning.v1+json"
ANNOTATION_SIGNATURE = "dev.cosignproject.cosign/signature"
ANNOTATION_TAG = "org.opencontainers.image.ref.name"
ANNOTATION_KIND = "kind"
KIND_SIGNED = "dev.cosignproject.cosign/imageIndex"
KIND_SIGNATURES = "dev.cosignproject.cosign/sigs"
RUNNER_FOLDER = "runtime"
"""Folder inside a bundle of the edge runtime."""

_MEDIA_TYPES = {
    "contract.json": MEDIA_TYPE_WEIGHT_CONFIG,
    "engine.json": MEDIA_TYPE_WEIGHT_CONFIG,
    "recipe.toml": MEDIA_TYPE_CODE,
    "selftest.npz": MEDIA_TYPE_DATASET,
    BUNDLE_JSON: MEDIA_TYPE_BUNDLE,
}
_SUFFIX_MEDIA_TYPES = {
    ".json": MEDIA_TYPE_DOC,
    ".md": MEDIA_TYPE_DOC,
    ".html": MEDIA_TYPE_DOC,
    ".txt": MEDIA_TYPE_DOC,
    ".py": MEDIA_TYPE_CODE,
    ".toml": MEDIA_TYPE_CODE,
}


def media_type_of(name: str) -> str:
    """The media type of a bundle's file by its name; engines and whatever is unknown count as weights."""
    if name.startswith(f"{RUNNER_FOLDER}/"):
        return MEDIA_TYPE_CODE
    return _MEDIA_TYPES.get(name) or _SUFFIX_MEDIA_TYPES.get(Path(name).suffix) or MEDIA_TYPE_WEIGHT
