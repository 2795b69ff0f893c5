"""Who one is at a registry: what ``docker login`` and ``podman login`` wrote, or a credential helper knows."""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError

_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and password, or a refresh token (``identity``) for the token server; empty: anonymous."""

    user: str = ""
    password: str = ""
    identity: str = ""

    @property
    def basic(self) -> str:
        """The value of an ``Authorization`` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r})"  # Secrets stay out of tracebacks.


def credentials_for(host: str) -> Credentials:
    """The credentials for a registry: of ``$REGISTRY_AUTH_FILE``, else of Docker's configuration; none: anonymous.

    Raises:
        ToolchainError: REGISTRY, the file cannot be read, or the helper that it names fails.
    """
    for path in _files():
        config = _read(path)
        helper = config.get("credHelpers", {}).get(host) or config.get("credsStore")
        for name in _names(host):
            if helper:
                found = _ask(helper, name)
            else:
                entry = config.get("auths", {}).get(name)
                found = _decoded(entry, path) if isinstance(entry, Mapping) else None
            if found is not None:
                return found
    return Credentials()


def _files() -> Iterator[Path]:
    if file := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(file)
    yield Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def _names(host: str) -> list[str]:
    if host in _HUB:
        return ["https://index.docker.io/v1/", *_HUB]
    return [host, f"https://{host}", f"http://{host}"]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _bad(path, f"cannot be read: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(k, {}), dict) for k in ("auths", "credHelpers")):
        raise _bad(path, "is not Docker's configuration: 'auths' and 'credHelpers' are objects")
    return config


def _decoded(entry: Mapping[str, Any], path: Path) -> Credentials:
    identity = str(entry.get("identitytoken") or "")
    try:
        user, _, password = base64.b64decode(str(entry.get("auth") or ""), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise _bad(path, "'auth' is not NAME:PASSWORD in base64") from None
    return Credentials(user or str(entry.get("username", "")), password or str(entry.get("password", "")), identity)


def _ask(helper: str, name: str) -> Credentials | None:
    """What ``docker-credential-HELPER get`` says; None where it knows of nothing."""
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run([program, "get"], input=name, capture_output=True, text=True, timeout=_HELPER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{program} does not answer: {error}", where=name, code=ExitCode.REGISTRY) from None
    if done.returncode:
        return None
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        raise ToolchainError(f"{program} gave no credentials", where=name, code=ExitCode.REGISTRY) from None
    return Credentials(identity=secret) if user == "<token>" else Credentials(user, secret)


def _bad(path: Path, what: str) -> ToolchainError:
    return ToolchainError(what, where=str(path), hint="log in again: docker login HOST", code=ExitCode.REGISTRY)
