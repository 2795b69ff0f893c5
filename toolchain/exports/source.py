"""The bundle that is exported: found, checked against its digests, and taken apart."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifact import canonical_json
from toolchain.bundle.check import damaged, parse_json
from toolchain.bundle.layout import Blob, blob_path
from toolchain.bundle.manifest import BundleManifest, EngineInfo
from toolchain.bundle.read import BundleRef, bundle_layout
from toolchain.bundle.resolve import resolve, split_reference
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract, Size, parse_contract

if TYPE_CHECKING:
    import numpy as np

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_STEP = 1000
_MOST = 2**63 - 1
_INPUT = "input:"
#: Datatypes of the Open Inference Protocol, by the contract's dtype.
DATATYPES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A verified bundle, and the name that the other server is to know it by."""

    bundle: BundleRef
    name: str
    contract: Contract

    @property
    def manifest(self) -> BundleManifest:
        return self.bundle.manifest

    @property
    def engine(self) -> EngineInfo:
        return self.bundle.manifest.engine

    @property
    def profile(self) -> Mapping[str, Any]:
        """The target profile that the bundle was made for, as JSON."""
        return self.manifest.target.profile

    def file(self, name: str) -> Blob:
        """A file of the bundle, to be copied."""
        descriptor = self.bundle.files[name]
        return Blob(descriptor.digest, descriptor.size, self.bundle.layout / blob_path(descriptor.digest))

    def engine_files(self) -> dict[str, Blob]:
        """The files of the engine under their names: its variants, and external data beside them."""
        names = [variant.file for variant in self.engine.variants]
        return {
            f: self.file(f) for f in sorted(self.bundle.files) if any(f == n or f.startswith(n + ".") for n in names)
        }

    def engine_json(self) -> Blob:
        return self.file("engine.json")

    def contract_json(self) -> Blob:
        return self.file("contract.json")

    def layout_files(self, folder: str) -> dict[str, Blob]:
        """The bundle as an OCI image layout of its own below ``folder``."""
        layout = bundle_layout(self.bundle)
        return {f"{folder}/{path}": blob for path, blob in layout.files().items()}

    def recorded_inputs(self) -> dict[str, np.ndarray]:
        """The inputs of the bundle's self-test; none where it has no self-test."""
        import numpy as np

        if "selftest.npz" not in self.bundle.files:
            return {}
        blob = self.file("selftest.npz")
        assert isinstance(blob.source, Path)
        with np.load(io.BytesIO(blob.source.read_bytes()), allow_pickle=False) as archive:
            return {k.removeprefix(_INPUT): archive[k] for k in sorted(archive.files) if k.startswith(_INPUT)}

    def facts(self) -> dict[str, str]:
        """What tells an operator which bundle it was: names, versions and digests."""
        return {
            "release": f"{self.manifest.name} {self.manifest.version}",
            "target": self.manifest.target.name,
            "bundle_digest": self.bundle.digest,
            "engine": f"{self.engine.precision}/{self.engine.backend}"
            + (self.engine.form and f" ({self.engine.form})"),
        }


def open_source(
    reference: str, target: str | None = None, name: str | None = None, *, programs: bool = False
) -> Source:
    """The bundle meant by ``reference``, every digest of it checked.

    Args:
        reference: folder of a release or bundle, or ``PATH@target``.
        target: which of the release's bundles; the one that suits this machine best when not given.
        name: of the model in the other server; the release's when not given.
        programs: whether an engine that is a program of its own will do (form ``static``).

    Raises:
        ToolchainError: USAGE, no such bundle, not a name, or an engine that is a program; INCOMPATIBLE_HOST, several
            bundles and none for this machine; DAMAGED_BUNDLE.
    """
    if target is not None:
        path, named = split_reference(reference)
        if named and named != target:
            raise ToolchainError(
                f"names target {named!r}, but --target {target} is given too", where=reference, code=ExitCode.USAGE
            )
        reference = f"{path}@{target}"
    bundle = resolve(reference)
    bundle.verify()
    known = name or bundle.manifest.name
    if not _NAME.fullmatch(known):
        raise ToolchainError(
            f"a model's name has letters, digits, '.', '_' and '-', up to 128, got {known!r}",
            where="--name",
            code=ExitCode.USAGE,
        )
    if bundle.manifest.engine.form == "static" and not programs:
        raise ToolchainError(
            f"the bundle for {bundle.manifest.target.name} is one executable, which no server loads",
            where=reference,
            hint="toolchain export edge writes it to a folder; for servers build a target of another form",
            code=ExitCode.USAGE,
        )
    contract_json = parse_json(bundle.read("contract.json"), "contract.json")
    if canonical_json(contract_json) != canonical_json(bundle.manifest.contract):
        raise damaged("contract.json and bundle.json hold different contracts", bundle.layout)
    return Source(bundle, known, parse_contract(contract_json, "contract.json"))


def numbered(version: str, given: int | None = None) -> int:
    """The whole number that stands for a semantic version where a server knows only numbers.

    ``MAJOR.MINOR.PATCH`` becomes ``MAJOR * 1000000 + MINOR * 1000 + PATCH``, which keeps their order.

    Args:
        version: of the release.
        given: the number that the user wants instead, from 1.

    Raises:
        ToolchainError: USAGE, the version has no such number: a pre-release, 0.0.0, or a part above 999.
    """
    if given is not None:
        return given
    match = _VERSION.fullmatch(version)
    number = 0
    if match:
        major, minor, patch = (int(part) for part in match.groups())
        if minor < _STEP and patch < _STEP:
            number = (major * _STEP + minor) * _STEP + patch
    if not 0 < number <= _MOST:
        raise ToolchainError(
            f"version {version!r} has no number of its own: only MAJOR.MINOR.PATCH above 0.0.0, MINOR and PATCH "
            f"below {_STEP}, is numbered",
            hint="choose a number with --version-number",
            code=ExitCode.USAGE,
        )
    return number


def onnx_model(source: Source, what: str) -> str:
    """The file of the bundle's ONNX model.

    Raises:
        ToolchainError: USAGE, the bundle's engine is another, or has a model for each of several sizes.
    """
    engine = source.engine
    if engine.backend != "onnxruntime":
        raise ToolchainError(
            f"{what} takes ONNX models, the bundle for {source.bundle.target} holds a TVM engine",
            where=str(source.bundle.layout),
            hint="name the bundle of a target that ONNX Runtime was chosen for (toolchain inspect lists them), or "
            'build for a profile with [runtime] engines = ["onnxruntime"]',
            code=ExitCode.USAGE,
        )
    if len(engine.variants) > 1:
        files = ", ".join(variant.file for variant in engine.variants)
        raise ToolchainError(
            f"{what} takes one model, the bundle has one for each of several sizes: {files}",
            where=str(source.bundle.layout),
            hint="toolchain export triton writes one that chooses among them",
            code=ExitCode.USAGE,
        )
    return engine.variants[0].file


def protocol_tensor(name: str, dtype: str, shape: tuple[Size, ...]) -> dict[str, Any]:
    """A tensor in the words of the Open Inference Protocol; a size that may vary is -1."""
    return {"name": name, "datatype": DATATYPES[dtype], "shape": open_dims(shape)}


def open_dims(shape: tuple[Size, ...]) -> list[int]:
    """Sizes, -1 where any will do."""
    return [size if isinstance(size, int) else -1 for size in shape]
