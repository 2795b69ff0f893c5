"""Where a device is: ``TARGET=[user@]host[:port]``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from toolchain.errors import ExitCode, ToolchainError

FORM = "[user@]host[:port]"
# No name may begin with a dash, which ssh would take for an option; an IPv6 address stands in brackets.
_ADDRESS = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_.][A-Za-z0-9_.\-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.\-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.\-]+)?\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A device's address; ``user`` and ``port`` are empty where ssh's own configuration is to decide."""

    host: str
    user: str = ""
    port: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    @property
    def destination(self) -> str:
        """As ssh takes it, without the port."""
        return (f"{self.user}@" if self.user else "") + self.host


def parse_address(text: str, where: str) -> Address:
    """Parse ``[user@]host[:port]``.

    Raises:
        ToolchainError: USAGE.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"] or 22) < 65536:
        raise ToolchainError(
            f"got {text!r}; allowed: {FORM}, e.g. pi@192.168.1.7 or a Host of ~/.ssh/config",
            where=where,
            code=ExitCode.USAGE,
        )
    return Address(match["host"].strip("[]"), match["user"] or "", match["port"] or "")


def parse_devices(given: Iterable[str], where: str = "--device") -> dict[str, Address]:
    """Target name -> address, from texts such as ``"cortex-a76=pi@192.168.1.7"``.

    Raises:
        ToolchainError: USAGE.
    """
    devices: dict[str, Address] = {}
    for text in given:
        target, equals, address = text.partition("=")
        if not equals or not target:
            raise ToolchainError(f"got {text!r}; allowed: TARGET={FORM}", where=where, code=ExitCode.USAGE)
        if target in devices:
            raise ToolchainError(f"two devices are given for {target}", where=where, code=ExitCode.USAGE)
        devices[target] = parse_address(address, f"{where} {target}")
    return devices
