"""Which version of a model answers: the trusted one, or for a share of the traffic a newer one on trial."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from toolchain.runtime.server.api import ServeError, Status
from toolchain.runtime.server.settings import ModelSettings
from toolchain.runtime.server.version import ModelVersion

_log = logging.getLogger("toolchain.serve")
_FEW = 10

#: Told which version is not needed any more, and why.
Retire = Callable[[ModelVersion, str], None]


def version_key(version: str) -> tuple[object, ...]:
    """The order of semantic versions (semver.org, section 11)."""
    core, _, before = version.partition("+")[0].partition("-")
    numbers = tuple(int(part) for part in re.findall(r"\d+", core))
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in before.split(".") if before)
    # A release comes after its pre-releases.
    return numbers, not before, parts


@dataclass(slots=True)
class Trial:
    """A new version that has yet to prove itself."""

    version: ModelVersion
    share: float
    started: float
    answered: int = 0
    failed: int = 0
    _due: float = 0.0

    def takes(self) -> bool:
        """Whether the next request is its: exactly its share of them, evenly spread."""
        self._due += self.share
        if self._due >= 1.0 - 1e-9:
            self._due -= 1.0
            return True
        return False


class Traffic:
    """The versions of one model, and which of them answers.

    Args:
        name: of the model.
        settings: of the model.
        retire: see :data:`Retire`.
    """

    def __init__(self, name: str, settings: ModelSettings, retire: Retire) -> None:
        self.name = name
        self.settings = settings
        self._retire = retire
        self.versions: dict[str, ModelVersion] = {}
        self.stable: ModelVersion | None = None
        self.trial: Trial | None = None

    def route(self, version: str) -> ModelVersion:
        """The version that answers a request which asks for ``version`` ("": any).

        Raises:
            ServeError: NOT_FOUND, no such version; UNAVAILABLE, it is not ready.
        """
        if version:
            found = self.versions.get(version)
            if found is None:
                known = ", ".join(sorted(self.versions, key=version_key)) or "none"
                raise ServeError(Status.NOT_FOUND, f"model {self.name!r} has no version {version!r}; loaded: {known}")
        elif self.trial is not None and self.trial.version.ready and (self._lost() or self.trial.takes()):
            return self.trial.version
        else:
            found = self.stable or next(iter(self.versions.values()), None)
            if found is None:
                raise ServeError(Status.UNAVAILABLE, f"model {self.name!r} has no version that is loaded")
        if not found.ready:
            why = f": {found.reason}" if found.reason else ""
            text = f"model {self.name!r} version {found.version} is not ready ({found.state.lower()}{why})"
            raise ServeError(Status.UNAVAILABLE, text)
        return found

    def introduce(self, version: ModelVersion) -> None:
        """Let a version that is ready take its place."""
        old = self.versions.get(version.version)
        self.versions[version.version] = version
        if old is not None and old is not version:
            self._replace(old, version)
            return
        if self._lost():
            self._promote(version)
        elif self.stable and version_key(version.version) > version_key(self.stable.version):
            if self.trial is not None:
                self._drop_trial(f"version {version.version} came")
            if self.settings.trial_requests or self.settings.trial_s:
                self.trial = Trial(version, self.settings.canary_share, time.monotonic())
                self._note("version on trial", version, {"share": self.settings.canary_share})
            else:
                self._promote(version)

    def settle(self) -> None:
        """Trust the version on trial."""
        if self.trial is not None:
            self._promote(self.trial.version)

    def count(self, version: ModelVersion, *, failed: bool) -> None:
        """Note how a request to ``version`` ended; ends its trial when enough is known."""
        trial = self.trial
        if trial is None or trial.version is not version:
            return
        trial.failed += failed
        trial.answered += not failed
        total = trial.answered + trial.failed
        enough = total >= self.settings.trial_requests and time.monotonic() - trial.started >= self.settings.trial_s
        bad = trial.failed / total > self.settings.max_error_rate
        if bad and (enough or total >= min(_FEW, max(1, self.settings.trial_requests))):
            allowed = f"{self.settings.max_error_rate:.0%}"
            self._drop_trial(f"rolled back: {trial.failed} of {total} requests failed, allowed are {allowed}")
        elif enough and not bad:
            self._promote(version)

    def give_up(self, version: ModelVersion, reason: str) -> None:
        """Take traffic away from a version at once."""
        if self.trial is not None and self.trial.version is version:
            self._drop_trial(reason)
            return
        if self.versions.get(version.version) is version:
            del self.versions[version.version]
        if self.stable is version:
            ready = [v for v in self.versions.values() if v.ready]
            self.stable = max(ready, key=lambda v: version_key(v.version), default=None)
        self._retire(version, reason)

    def _lost(self) -> bool:
        """Whether the trusted version cannot answer."""
        return self.stable is None or not self.stable.ready

    def _replace(self, old: ModelVersion, version: ModelVersion) -> None:
        """The same version number with other content: it is taken at its word."""
        if self.stable is old or self.stable is None:
            self.stable = version
        if self.trial is not None and self.trial.version is old:
            self.trial.version = version
        self._note("version replaced", version, {})
        self._retire(old, "replaced by another bundle of the same version")

    def _promote(self, version: ModelVersion) -> None:
        old, self.stable, self.trial = self.stable, version, None
        self._note("version takes the traffic", version, {"before": old.version if old else None})
        ordered = sorted(self.versions.values(), key=lambda v: version_key(v.version), reverse=True)
        unpinned = [v for v in ordered if not v.pinned]
        for extra in unpinned[self.settings.keep_versions :]:
            if extra is not version:
                del self.versions[extra.version]
                self._retire(extra, f"version {version.version} took over")

    def _drop_trial(self, reason: str) -> None:
        trial, self.trial = self.trial, None
        assert trial is not None
        self.versions.pop(trial.version.version, None)
        self._note("version dropped", trial.version, {"reason": reason})
        self._retire(trial.version, reason)

    def _note(self, text: str, version: ModelVersion, facts: dict[str, object]) -> None:
        _log.info(text, extra={"facts": {"model": self.name, "version": version.version, **facts}})
