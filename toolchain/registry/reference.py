"""References to releases in registries: ``oci://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from toolchain.errors import ExitCode, ToolchainError

SCHEME = "oci://"
_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of the distribution specification, "Pulling manifests".
_REFERENCE = re.compile(
    rf"oci://(?P<host>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)/(?P<repository>{_WORD}(?:/{_WORD})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """A place in a registry; ``tag`` and ``digest`` may be empty."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        text = f"{SCHEME}{self.host}/{self.repository}"
        text += f":{self.tag}" if self.tag else ""
        return text + (f"@{self.digest}" if self.digest else "")

    @property
    def named(self) -> str:
        """What is asked for: the digest, else the tag, else ``latest``."""
        return self.digest or self.tag or "latest"

    @property
    def local(self) -> bool:
        """Whether the host is this machine, where encryption is not asked for."""
        name = self.host.rpartition(":")[0] if re.search(r":\d+$", self.host) else self.host
        name = name.strip("[]")
        if name == "localhost":
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def is_reference(text: str) -> bool:
    """Whether ``text`` means a release in a registry rather than a path."""
    return text.startswith(SCHEME)


def parse_reference(text: str) -> RegistryReference:
    """A reference out of its text.

    Raises:
        ToolchainError: USAGE, it is none.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise ToolchainError(
            f"got {text!r}; allowed: oci://HOST[:PORT]/REPOSITORY[:TAG] or ...@sha256:DIGEST, the repository in small "
            "letters",
            where="registry",
            code=ExitCode.USAGE,
        )
    return RegistryReference(found["host"], found["repository"], found["tag"] or "", found["digest"] or "")


def tag_of_version(version: str) -> str:
    """The tag of a release's version: ``+`` is not allowed in tags and becomes ``_``, as with Helm."""
    return version.replace("+", "_")
