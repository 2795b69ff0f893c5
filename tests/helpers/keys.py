"""Keys for signatures, made by OpenSSL."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def make_key(path: Path, *kind: str) -> tuple[Path, Path]:
    """A private key and its public key; of ECDSA P-256 unless ``kind`` says otherwise."""
    words = kind or ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    openssl("genpkey", *words, "-out", path)
    openssl("pkey", "-in", path, "-pubout", "-out", path.with_suffix(".pub"))
    return path, path.with_suffix(".pub")
