"""Follows a tag in a registry: serves the release that it names, and takes over the next one when it moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from toolchain.errors import ExitCode, ToolchainError
from toolchain.registry.client import Registry
from toolchain.registry.pull import Pulled, pull
from toolchain.registry.reference import parse_reference
from toolchain.runtime.server.settings import ServerSettings
from toolchain.runtime.server.traffic import version_key
from toolchain.storage import default_folder, storage_errors

if TYPE_CHECKING:
    from toolchain.runtime.server.repository import Repository

_log = logging.getLogger("toolchain.serve")
_LONGEST_PAUSE = 300.0
_CURRENT = "current.json"
#: Releases that stay on the disk: the one that is served and the one before.
_KEPT = 2
_T = TypeVar("_T")


class Follower:
    """One reference.  :meth:`first` brings the release that the server starts with, :meth:`run` follows the tag.

    Releases are kept below ``settings.registry.folder``, so a server starts when the registry does not answer, too.

    Args:
        text: the reference, ``oci://HOST/REPOSITORY:TAG``; one with a digest is brought and not followed.
        settings: of the server.

    Raises:
        ToolchainError: USAGE, not a reference, or no public keys where a key to trust is set.
    """

    def __init__(self, text: str, settings: ServerSettings) -> None:
        self.reference = parse_reference(text)
        self._settings = settings
        base = settings.registry.folder
        folder = Path(base) if base else default_folder() / "served"
        self._folder = folder / re.sub(r"[^A-Za-z0-9.-]+", "_", text.partition("://")[2])
        self._trust: tuple[Any, ...] = ()
        if settings.trust_key:
            from toolchain.bundle.sign import read_trust

            self._trust = read_trust(Path(settings.trust_key))
        self._digest = ""
        self._loaded: tuple[str, str] | None = None
        self._failures = 0

    async def first(self) -> str:
        """The folder of the release that the tag names, or if the registry does not answer, named the last time.

        Raises:
            ToolchainError: it cannot be had.
        """
        try:
            pulled = await _aside(self._pull)
        except ToolchainError as error:
            standing = self._standing()
            if error.code is not ExitCode.REGISTRY or standing is None:
                raise
            _log.warning(
                "the registry does not answer; what it named the last time is served",
                extra={"facts": self._facts(error)},
            )
            return standing
        self._accept(pulled)
        return str(pulled.folder)

    async def run(self, repository: Repository) -> None:
        """Look at the tag until cancelled."""
        if self.reference.digest:
            return
        while True:
            pause = self._settings.registry.interval_s * 2**self._failures
            # Servers that start together do not ask together for ever.
            await asyncio.sleep(min(pause, max(_LONGEST_PAUSE, self._settings.registry.interval_s)) * _spread())
            try:
                await self.look(repository)
                self._failures = 0
            except ToolchainError as error:
                self._failures = min(self._failures + 1, 16)
                self._tell(repository, error)
            except Exception:
                self._failures = min(self._failures + 1, 16)
                _log.exception("the registry cannot be followed")

    async def look(self, repository: Repository) -> None:
        """Look once, and load what is new.

        Raises:
            ToolchainError: it cannot be had or loaded; what is served stays.
        """
        registry = Registry(self.reference, plain_http=self._settings.registry.plain_http)
        pulled = None
        if await _aside(lambda: registry.digest(self.reference.named)) != self._digest:
            pulled = await _aside(self._pull)
        if pulled is None or pulled.digest == self._digest:
            repository.forget_broken(*self._key)
            return
        await repository.add(str(pulled.folder))
        repository.forget_broken(*self._key)
        before, now = self._loaded, (pulled.name, pulled.version)
        self._accept(pulled)
        if before is not None and before[0] == now[0] and version_key(before[1]) > version_key(now[1]):
            # The tag was moved back: a newer version would keep the traffic.
            repository.remove(*before, f"{self.reference} names version {pulled.version} now")

    def _pull(self) -> Pulled:
        registry = self._settings.registry
        return pull(
            self.reference,
            self._folder,
            suitable=True,
            trust=self._trust,
            plain_http=registry.plain_http,
            say=_log.info,
        )

    def _accept(self, pulled: Pulled) -> None:
        self._digest = pulled.digest
        self._loaded = pulled.name, pulled.version
        note = {"reference": str(self.reference), "digest": pulled.digest, "folder": str(pulled.folder)}
        temporary = self._folder / f".{_CURRENT}"
        with storage_errors(self._folder):
            temporary.write_text(json.dumps(note))
            os.replace(temporary, self._folder / _CURRENT)
        others = [p.parent for p in self._folder.glob("*/*/index.json") if p.parent != pulled.folder]
        for old in sorted(others, key=_age)[_KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)

    def _standing(self) -> str | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            folder = Path(json.loads((self._folder / _CURRENT).read_text())["folder"])
            if folder.is_dir():
                self._loaded = folder.parent.name, folder.name
                return str(folder)
        return None

    def _tell(self, repository: Repository, error: ToolchainError) -> None:
        if error.code is ExitCode.REGISTRY:
            _log.warning("the registry does not answer", extra={"facts": self._facts(error)})
            return
        repository.note_broken(*self._key, error.what)
        _log.error("release cannot be loaded", extra={"facts": self._facts(error)})

    @property
    def _key(self) -> tuple[str, str]:
        """Under which name and version the index says that what the tag names cannot be served."""
        name = self._loaded[0] if self._loaded else self.reference.repository.rpartition("/")[2]
        return name, self.reference.named

    def _facts(self, error: ToolchainError) -> dict[str, object]:
        return {"reference": str(self.reference), "reason": error.render()}


def _spread() -> float:
    return random.uniform(0.9, 1.1)


def _age(folder: Path) -> float:
    """Sorts the latest first."""
    try:
        return -folder.stat().st_mtime
    except OSError:
        return 0.0


async def _aside(call: Callable[[], _T]) -> _T:
    """Run something that waits for the network; the server does not wait for it when it ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, problem = None, None
        try:
            result = call()
        except Exception as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=work, name="registry", daemon=True).start()
    return await done
