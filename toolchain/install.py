"""How this toolchain was installed, and so the command that installs one of its extras the same way.

No index need have it: it may come from a checkout, a wheel's file or a repository.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from toolchain.version import __version__

NAME = "toolchain"


def install_command(extra: str) -> str:
    """The command line that adds ``extra`` to this installation."""
    return command_for(extra, next(_direct_urls(), None), _checkout())


def public_requirement(extra: str) -> str:
    """A requirement that means the same on any machine, or "" when this installation names none (PEP 610)."""
    origin = next(_direct_urls(), None)
    return _from_repository(extra, origin) if origin and "vcs_info" in origin else ""


def command_for(extra: str, origin: Mapping[str, Any] | None, checkout: Path | None) -> str:
    """As :func:`install_command`.

    Args:
        extra: name of the extra.
        origin: content of the installation's ``direct_url.json`` (PEP 610), or None.
        checkout: folder of the source tree that the package is imported from, or None.
    """
    if origin and "vcs_info" in origin:
        return f"pip install {shlex.quote(_from_repository(extra, origin))}"
    if origin and origin["url"].startswith("file:"):
        path = unquote(urlsplit(origin["url"]).path)
        option = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"pip install {option}{shlex.quote(f'{path}[{extra}]')}"
    if origin:
        return f"pip install {shlex.quote(NAME + f'[{extra}] @ ' + origin['url'])}"
    if checkout:
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install '{NAME}[{extra}]=={__version__}'  # with the index or --find-links that {NAME} came from"


def _from_repository(extra: str, origin: Mapping[str, Any]) -> str:
    vcs = origin["vcs_info"]
    return f"{NAME}[{extra}] @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"


def _direct_urls() -> Iterator[dict[str, Any]]:
    # A checkout's own metadata may hide that of the installation, which alone knows where it came from.
    for distribution in importlib.metadata.distributions(name=NAME):
        if text := distribution.read_text("direct_url.json"):
            yield json.loads(text)


def _checkout() -> Path | None:
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None
