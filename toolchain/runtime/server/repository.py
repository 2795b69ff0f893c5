"""The models of a server: where they come from, which versions are loaded, and how they come and go."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.runtime.server.api import IndexEntry, ServeError, Status
from toolchain.runtime.server.overrides import Overrides, parse_overrides
from toolchain.runtime.server.settings import ServerSettings
from toolchain.runtime.server.traffic import Traffic, version_key
from toolchain.runtime.server.version import ModelVersion, Placed, place_bundle

if TYPE_CHECKING:
    from toolchain.runtime.server.follow import Follower

_log = logging.getLogger("toolchain.serve")
#: Versions of one model that the index still tells of when they are gone.
_REMEMBERED = 32


@dataclass(frozen=True, slots=True)
class Source:
    """Where a version comes from, and whether it stays when newer ones come."""

    reference: str
    pinned: bool


class Repository:
    """All models.  Methods run on the loop's thread; only reading and hashing bundles happens elsewhere."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._trust = Path(settings.trust_key) if settings.trust_key else None
        self.models: dict[str, Traffic] = {}
        #: name -> version -> where it came from, also of what is not loaded at present
        self._sources: dict[str, dict[str, Source]] = {}
        #: (name, version) -> what to say of a version that is not loaded
        self._absent: dict[tuple[str, str], IndexEntry] = {}
        self._unloaded: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._overrides: dict[str, Overrides] = {}
        self._following: list[asyncio.Task[None]] = []

    async def add_all(self, references: Sequence[str]) -> None:
        """Load every reference, all at once, and follow those to registries; used at the start.

        Raises:
            ToolchainError: one of them cannot be loaded; nothing stays loaded then.
        """
        followers = {text: follower for text in references if (follower := self._follower(text)) is not None}
        brought = dict(zip(followers, await asyncio.gather(*(f.first() for f in followers.values())), strict=True))
        places = [brought.get(text, text) for text in references]
        placed = await _place_all(places, self._trust)
        versions = [self._make(one, pinned=text not in brought) for text, one in zip(references, placed, strict=True)]
        loads = [asyncio.ensure_future(version.load()) for version in versions]
        try:
            await asyncio.gather(*loads)
        except BaseException:
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
            await asyncio.gather(*(version.close() for version in versions if version.ready))
            raise
        for version in sorted(versions, key=lambda v: version_key(v.version)):
            self._traffic(version.name).introduce(version)
        # What is given at the start is all trusted: the latest version of each takes the traffic.
        for traffic in self.models.values():
            traffic.settle()
        self._following = [asyncio.create_task(follower.run(self)) for follower in followers.values()]

    async def add(self, reference: str, *, pinned: bool = False) -> ModelVersion:
        """Load one version beside what is there; it takes traffic as the model's settings say.

        Raises:
            ToolchainError: it cannot be loaded; nothing else has changed.
        """
        placed = await asyncio.to_thread(place_bundle, reference, self._trust)
        try:
            version = self._make(placed, pinned=pinned)
        except BaseException:
            shutil.rmtree(placed.folder, ignore_errors=True)
            raise
        key = version.name, version.version
        self._absent[key] = IndexEntry(*key, version.state)
        try:
            await version.load()
        except ToolchainError as error:
            self._absent[key] = IndexEntry(*key, version.state, version.reason)
            raise error
        self._absent.pop(key, None)
        self._unloaded.discard(version.name)
        self._traffic(version.name).introduce(version)
        return version

    def remove(self, name: str, version: str, reason: str) -> None:
        """Take one version out of service; what is in flight is answered."""
        self._sources.get(name, {}).pop(version, None)
        traffic = self.models.get(name)
        if traffic is not None and version in traffic.versions:
            traffic.give_up(traffic.versions[version], reason)

    async def load(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Load (again) the versions of a model whose sources are known.

        With a configuration in ``parameters`` all are loaded anew, served as it says until the next :meth:`load`.

        Raises:
            ServeError: NOT_FOUND, UNAVAILABLE; INVALID or UNSUPPORTED, what ``parameters`` ask for cannot be.
        """
        sources = self._sources.get(name)
        if not sources:
            raise ServeError(Status.NOT_FOUND, f"failed to load {name!r}: {self._unknown(name)}")
        async with self._lock(name):
            before = self._overrides.get(name)
            wanted = parse_overrides(name, parameters or {}, self.settings.model(name), self._config(name))
            loaded = self.models[name].versions if name in self.models else {}
            missing = [v for v in sorted(sources, key=version_key) if v not in loaded]
            if wanted != before and loaded:
                # What was replaced or rolled back stays away.
                missing = [v for v in sorted(loaded, key=version_key) if v in sources]
            self._override(name, wanted)
            for source in [sources[version] for version in missing]:
                try:
                    await self.add(source.reference, pinned=source.pinned)
                except ToolchainError as error:
                    self._override(name, before)
                    raise ServeError(Status.UNAVAILABLE, f"failed to load {name!r}: {error.what}") from error
                except ServeError:
                    self._override(name, before)
                    raise

    def _override(self, name: str, overrides: Overrides | None) -> None:
        if overrides is None:
            self._overrides.pop(name, None)
        else:
            self._overrides[name] = overrides

    def _config(self, name: str) -> Mapping[str, Any]:
        """The ModelConfig of a model that is loaded, else nothing."""
        from toolchain.runtime.server import describe

        traffic = self.models.get(name)
        return describe.config(traffic, traffic.stable) if traffic is not None and traffic.stable is not None else {}

    async def unload(self, name: str) -> None:
        """Take a model out of service and wait until what is in flight is answered.

        Raises:
            ServeError: NOT_FOUND.
        """
        traffic = self.models.get(name)
        if traffic is None:
            raise ServeError(Status.NOT_FOUND, self._unknown(name))
        async with self._lock(name):
            self._unloaded.add(name)
            versions = list(traffic.versions.values())
            for version in versions:
                traffic.give_up(version, "unloaded")
            await asyncio.gather(*(version.close() for version in versions))

    def traffic(self, name: str) -> Traffic:
        """The versions of a model.

        Raises:
            ServeError: NOT_FOUND.
        """
        found = self.models.get(name)
        if found is None:
            raise ServeError(Status.NOT_FOUND, self._unknown(name))
        return found

    def versions(self) -> Iterator[ModelVersion]:
        """Every loaded version."""
        for traffic in list(self.models.values()):
            yield from list(traffic.versions.values())

    def ready(self) -> bool:
        """Whether every model that was not unloaded on purpose can answer."""
        return all(
            traffic.stable is not None and traffic.stable.ready
            for name, traffic in self.models.items()
            if name not in self._unloaded
        )

    def index(self) -> list[IndexEntry]:
        """Every version that is or was there, and its state."""
        entries = dict(self._absent)
        for version in self.versions():
            key = version.name, version.version
            entries[key] = IndexEntry(*key, version.state, version.reason)
        return [entries[key] for key in sorted(entries, key=lambda k: (k[0], version_key(k[1])))]

    def note_broken(self, name: str, version: str, reason: str) -> None:
        """Say in the index why a version is not there."""
        self._absent[name, version] = IndexEntry(name, version, "UNAVAILABLE", reason)

    def forget_broken(self, name: str, version: str) -> None:
        """What was said by :meth:`note_broken` is over."""
        self._absent.pop((name, version), None)

    async def close(self) -> None:
        """Take everything out of service; what is in flight is answered."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await asyncio.gather(*(version.close("the server stops") for version in self.versions()), *self._closing)

    def _make(self, placed: Placed, *, pinned: bool) -> ModelVersion:
        name = placed.manifest.name
        overrides = self._overrides.get(name) or Overrides(self.settings.model(name))
        version = ModelVersion(placed, overrides.settings, pinned=pinned, max_rows=overrides.max_rows)
        self._sources.setdefault(version.name, {})[version.version] = Source(placed.reference, pinned)
        return version

    def _follower(self, text: str) -> Follower | None:
        if not text.startswith("oci://"):
            return None
        from toolchain.runtime.server.follow import Follower

        return Follower(text, self.settings)

    def _traffic(self, name: str) -> Traffic:
        if name not in self.models:
            self.models[name] = Traffic(name, self.settings.model(name), self._retire)
        return self.models[name]

    def _retire(self, version: ModelVersion, reason: str) -> None:
        key = version.name, version.version
        self._absent[key] = IndexEntry(*key, "UNLOADING", reason)
        task = asyncio.get_running_loop().create_task(self._close_version(version, reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_version(self, version: ModelVersion, reason: str) -> None:
        await version.close(reason)
        key = version.name, version.version
        if self._absent.get(key) == IndexEntry(*key, "UNLOADING", reason):
            del self._absent[key]  # to be the latest
            self._absent[key] = IndexEntry(*key, "UNAVAILABLE", reason)
            gone = [k for k, e in self._absent.items() if k[0] == version.name and e.state == "UNAVAILABLE"]
            for old in gone[:-_REMEMBERED]:
                del self._absent[old]

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _unknown(self, name: str) -> str:
        # Triton's words: published client programs look for them, as for "failed to load".
        return f"Request for unknown model: {name!r} is not found{did_you_mean(name, self._sources)}"


async def _place_all(references: Sequence[str], trust: Path | None) -> list[Placed]:
    """Lay out the files of every bundle, or of none.

    Raises:
        ToolchainError: one cannot be, or two are the same version of one model (USAGE).
    """
    tasks = (asyncio.to_thread(place_bundle, reference, trust) for reference in references)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    placed = [result for result in results if isinstance(result, Placed)]
    problem = next((result for result in results if isinstance(result, BaseException)), None)
    seen: dict[tuple[str, str], str] = {}
    for one in placed:
        other = seen.setdefault((one.manifest.name, one.manifest.version), one.reference)
        if other is not one.reference and problem is None:
            what = f"is {one.manifest.name} {one.manifest.version}, and so is {other}"
            problem = ToolchainError(what, where=one.reference, code=ExitCode.USAGE)
    if problem is not None:
        for one in placed:
            shutil.rmtree(one.folder, ignore_errors=True)
        raise problem
    return placed
