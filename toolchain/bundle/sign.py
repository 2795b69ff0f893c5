"""Signs releases, and tells whether a bundle was signed with a key that is trusted.

The form is cosign's "simple signing" (``sigstore/cosign``, ``specs/SIGNATURE_SPEC.md``; that of the payload is
``containers-signature(5)``): ECDSA on P-256 with SHA-256, or Ed25519.  Signatures of ECDSA are deterministic
(RFC 6979), so signing twice gives the same bytes.  Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifact import canonical_json
from toolchain.bundle.check import parse_json, read_blob
from toolchain.bundle.layout import INDEX_JSON, Blob, Descriptor, blob_path, index_json, sync_folder
from toolchain.bundle.media import ANNOTATION_SIGNATURE
from toolchain.bundle.read import BundleRef, Release, open_release
from toolchain.bundle.signatures import Signature, SignatureSet, make_set, read_set
from toolchain.errors import ExitCode, ToolchainError
from toolchain.install import install_command
from toolchain.storage import storage_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
    PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

PASSWORD = "TOOLCHAIN_KEY_PASSWORD"
"""Environment variable with the password of an encrypted private key."""
_TYPE = "cosign container image signature"
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", re.DOTALL)
_LARGEST_KEY = 1 << 16
_KINDS = "ECDSA on P-256, or Ed25519"


@dataclass(frozen=True, slots=True)
class TrustKey:
    """A public key, and how it is named in messages: the first digits of the SHA-256 of its DER form."""

    key: PublicKey
    name: str

    def made(self, signature: bytes, payload: bytes) -> bool:
        """Whether ``signature`` of ``payload`` was made with the private key."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            if isinstance(self.key, ec.EllipticCurvePublicKey):
                self.key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
            else:
                self.key.verify(signature, payload)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Signed:
    """What :func:`sign_release` did: how many digests it signed, and the name of the key."""

    release: Release
    digests: int
    key: str


def read_trust(path: Path) -> tuple[TrustKey, ...]:
    """The public keys in a PEM file; each of them is trusted.

    Raises:
        ToolchainError: USAGE, unreadable, or not public keys of a kind that is known; MISSING_TOOL.
    """
    serialization = _serialization()
    keys = []
    for label, block in _pem_blocks(path):
        if b"PUBLIC" not in label:
            what = f"holds a {label.decode().lower()}; to verify takes public keys"
            raise _bad_key(path, what, f"openssl pkey -in {path} -pubout -out trust.pub")
        try:
            key = serialization.load_pem_public_key(block)
        except (ValueError, _unsupported()) as error:
            raise _bad_key(path, f"is not a public key ({_line(error)})") from None
        keys.append(_trust_key(_of_known_kind(key, path)))
    return tuple(keys)


def check_signed(bundle: BundleRef, keys: tuple[TrustKey, ...]) -> TrustKey:
    """The key of ``keys`` that signed the bundle's manifest, or the image index that it was opened from.

    Raises:
        ToolchainError: UNTRUSTED, none has; DAMAGED_BUNDLE, a signature is not what its digest says.
    """
    seen = 0
    for digest, descriptor in bundle.signatures.items():
        for signature in read_set(bundle.layout, digest, descriptor)[1]:
            seen += 1
            key = _signer(signature, keys)
            if key is not None and _names(signature.payload, digest) and _covers(bundle, digest):
                return key
    names = ", ".join(key.name for key in keys)
    what = f"none of its {seen} signatures is of it and by a trusted key ({names})" if seen else "is not signed"
    raise ToolchainError(
        what,
        where=bundle.reference,
        hint="get it from where it is signed; the owner of the key signs it with: toolchain sign RELEASE --key KEY",
        code=ExitCode.UNTRUSTED,
    )


def sign_release(folder: Path, key_file: Path, reference: str = "") -> Signed:
    """Add signatures of the release and of each of its bundles; other signatures stay, and so do all digests.

    Only digests are signed: engines and weights are not read.

    Args:
        folder: of the release.
        key_file: the private key in PEM; its password, if any, is in the environment (:data:`PASSWORD`).
        reference: what the payload calls the image; the release's name if empty.  Cosign does not look at it, policies
            of container engines do.

    Raises:
        ToolchainError: USAGE, no release, or not a private key; DAMAGED_BUNDLE; STORAGE; MISSING_TOOL.
    """
    key = _private_key(key_file)
    name = _trust_key(key.public_key()).name
    with _alone(folder):
        release = open_release(folder)
        sets = []
        root = release.bundles[0].release
        for digest in (release.digest, *(bundle.digest for bundle in release.bundles)):
            payload = payload_of(digest, reference or release.name)
            found = release.signatures.get(digest)
            standing = read_set(folder, digest, found)[1] if found else []
            made = Signature(payload, {ANNOTATION_SIGNATURE: base64.b64encode(_sign(key, payload)).decode()})
            kept = [s for s in standing if s != made]
            sets.append(make_set(digest, [*kept, made], root=digest == release.digest))
        _write(folder, root, sets)
    return Signed(open_release(folder), len(sets), name)


def payload_of(digest: str, reference: str) -> bytes:
    """The bytes that are signed: cosign's own form of them."""
    critical = {
        "identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": digest},
        "type": _TYPE,
    }
    return canonical_json({"critical": critical, "optional": None})


def _names(payload: bytes, digest: str) -> bool:
    """Whether a payload, which a trusted key signed, is about ``digest``."""
    critical = parse_json(payload, "signature").get("critical")
    image = critical.get("image") if isinstance(critical, Mapping) else None
    if not isinstance(critical, Mapping) or not isinstance(image, Mapping):
        return False
    return bool(critical.get("type") == _TYPE and image.get("docker-manifest-digest") == digest)


def _covers(bundle: BundleRef, digest: str) -> bool:
    """Whether what has ``digest`` is the bundle, or the image index read anew names it."""
    if digest == bundle.digest:
        return True
    index = parse_json(read_blob(bundle.layout, bundle.release), bundle.layout)
    manifests = index.get("manifests")
    assert isinstance(manifests, list)
    return any(isinstance(entry, Mapping) and entry.get("digest") == bundle.digest for entry in manifests)


def _signer(signature: Signature, keys: tuple[TrustKey, ...]) -> TrustKey | None:
    try:
        value = base64.b64decode(signature.annotations[ANNOTATION_SIGNATURE], validate=True)
    except (binascii.Error, ValueError):
        return None
    return next((key for key in keys if key.made(value, signature.payload)), None)


def _sign(key: PrivateKey, payload: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(payload, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return key.sign(payload)


def _private_key(path: Path) -> PrivateKey:
    serialization = _serialization()
    password = os.environ.get(PASSWORD)
    label, block = _pem_blocks(path)[-1]
    if b"PRIVATE" not in label:
        raise _bad_key(path, f"holds a {label.decode().lower()}; to sign takes the private key")
    if b"SIGSTORE" in label or b"COSIGN" in label:
        hint = "sign with cosign itself after toolchain push, or make a key of your own (docs/distribution.md)"
        raise _bad_key(path, "is encrypted in cosign's own form, which is not read", hint)
    try:
        key = serialization.load_pem_private_key(block, password.encode() if password and b"ENC" in label else None)
    except TypeError:
        raise _bad_key(path, f"is encrypted, and {PASSWORD} is not set") from None
    except (ValueError, _unsupported()) as error:
        raise _bad_key(path, f"is not a private key, or {PASSWORD} is wrong ({_line(error)})") from None
    found: PrivateKey = _of_known_kind(key, path)
    return found


def _of_known_kind(key: Any, path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    known = isinstance(key, (ed25519.Ed25519PublicKey, ed25519.Ed25519PrivateKey))
    if isinstance(key, (ec.EllipticCurvePublicKey, ec.EllipticCurvePrivateKey)):
        known = isinstance(key.curve, ec.SECP256R1)
    if not known:
        raise _bad_key(path, f"is a key of another kind; allowed: {_KINDS}")
    return key


def _trust_key(key: PublicKey) -> TrustKey:
    serialization = _serialization()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return TrustKey(key, f"key {hashlib.sha256(der).hexdigest()[:16]}")


def _pem_blocks(path: Path) -> list[tuple[bytes, bytes]]:
    """Label and text of every PEM block in a file."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_KEY)
    except OSError as error:
        raise _bad_key(path, f"cannot be read: {error.strerror}") from None
    blocks = [(found.group(1), found.group(0)) for found in _PEM.finditer(data)]
    # Parameters of a curve may stand before the key.
    blocks = [block for block in blocks if b"PARAMETERS" not in block[0]]
    if not blocks:
        raise _bad_key(path, "is not a key in PEM")
    return blocks


def _bad_key(path: Path, what: str, hint: str = "") -> ToolchainError:
    return ToolchainError(what, where=f"key {path}", hint=hint, code=ExitCode.USAGE)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise ToolchainError(
            "signatures need the package cryptography, which is not installed",
            hint=install_command("sign"),
            code=ExitCode.MISSING_TOOL,
        ) from None
    return serialization


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process signs the release meanwhile, so that no signature is lost."""
    blobs = folder / "blobs"
    if not blobs.is_dir():
        yield
        return
    with storage_errors(folder):
        handle = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(folder: Path, root: Descriptor, sets: list[SignatureSet]) -> None:
    """Add the signatures' blobs, then swap in the new ``index.json``: a reader sees the old one or the new one."""
    blobs: dict[str, Blob] = {}
    for one in sets:
        blobs |= one.blobs
    with storage_errors(folder):
        for digest, blob in blobs.items():
            path = folder / blob_path(digest)
            if not path.exists():
                assert isinstance(blob.source, bytes)
                _replace(path, blob.source)
        sync_folder(folder / "blobs" / "sha256")
        _replace(folder / INDEX_JSON, index_json(root, [one.descriptor for one in sets]))
        sync_folder(folder)


def _replace(path: Path, data: bytes) -> None:
    # Not beside index.json: there a file that a killed process left would be in the way of later builds.
    scratch = path.parent if path.name != INDEX_JSON else path.parent / "blobs" / "sha256"
    temporary = scratch / f".tmp-{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
