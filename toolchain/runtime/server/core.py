"""The serving core: what the front ends call (:class:`toolchain.runtime.server.api.Core`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.runtime.server import describe, metrics
from toolchain.runtime.server.api import IndexEntry, InferRequest, InferResponse, ModelMetadata, ServeError, Status
from toolchain.runtime.server.logs import RequestLog
from toolchain.runtime.server.repository import Repository
from toolchain.runtime.server.settings import ServerSettings
from toolchain.runtime.server.traffic import Traffic
from toolchain.runtime.server.version import ModelVersion
from toolchain.runtime.server.watch import Watcher

if TYPE_CHECKING:
    from toolchain.runtime.server.traces import Traces

#: A request that fails like this in a version on trial is answered by the trusted version instead.
_SERVERS_FAULT = (Status.INTERNAL, Status.UNAVAILABLE, Status.FULL)


class ServingCore:
    """Implements :class:`toolchain.runtime.server.api.Core`.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.repository = Repository(settings)
        self._log = RequestLog(settings.logs.success_share)
        self._traces: Traces | None = None
        if settings.logs.traces:
            from toolchain.runtime.server.traces import Traces

            self._traces = Traces()
        self._watching: asyncio.Task[None] | None = None
        self._started = False
        self._draining = False

    async def start(self, references: Sequence[str]) -> None:
        """Load the models; returns when all are ready.

        Raises:
            ToolchainError: one of ``references`` cannot be loaded, or the folder to watch does not exist.
        """
        folder = Path(self.settings.watch) if self.settings.watch else None
        if folder is not None and not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ToolchainError(what, where=f"--watch {folder}", code=ExitCode.USAGE)
        await self.repository.add_all(references)
        if folder is None:
            self._check_names()
        if folder is not None:
            watcher = Watcher(self.repository, folder, self.settings.watch_interval_s)
            while await watcher.look():
                pass
            self._watching = asyncio.create_task(watcher.run())
        self._started = True

    def _check_names(self) -> None:
        """Refuse settings of a model that is not there: most likely its name is misspelt.

        Raises:
            ToolchainError: USAGE.
        """
        for name in self.settings.models:
            if name not in self.repository.models:
                served = ", ".join(self.repository.models)
                what = f"there is no such model to serve{did_you_mean(name, self.repository.models)}; there is {served}"
                raise ToolchainError(what, where=f"settings: models.{name}", code=ExitCode.USAGE)

    def stop_accepting(self) -> None:
        """From now on the server says that it is not ready; what comes all the same is still answered."""
        self._draining = True

    async def close(self) -> None:
        """Answer what is in flight and end the workers."""
        self._draining = True
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self.repository.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def kill(self) -> None:
        """End the workers whatever they are at."""
        await asyncio.gather(*(version.kill() for version in self.repository.versions()))

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self._started and not self._draining and self.repository.ready()

    def model_ready(self, name: str, version: str = "") -> bool:
        traffic = self.repository.traffic(name)
        if version:
            if version not in traffic.versions:
                traffic.route(version)
            return traffic.versions[version].ready
        return traffic.stable is not None and traffic.stable.ready

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        return describe.metadata(*self._version(name, version))

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        return describe.config(*self._version(name, version))

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        if name and version:
            chosen = [self._version(name, version)[1]]
        elif name:
            chosen = list(self.repository.traffic(name).versions.values())
        else:
            chosen = list(self.repository.versions())
        return [v.statistics.to_json(v.name, v.version) for v in chosen]

    async def infer(self, request: InferRequest) -> InferResponse:
        arrived = request.arrived or time.monotonic_ns()
        traffic = self.repository.traffic(request.model)
        version = traffic.route(request.version)
        log = self._log
        try:
            if self._traces is None:
                response = await version.infer(request, arrived)
            else:
                with self._traces.span(request):
                    response = await version.infer(request, arrived)
        except ServeError as error:
            if error.status not in _SERVERS_FAULT:
                log.refused(request, version.version, error, arrived)
                error.logged = True
                raise
            response = await self._second_chance(traffic, version, request, error, arrived)
        if traffic.trial is not None:
            traffic.count(version, failed=response.version != version.version)
        if log.wants_success():
            log.answered(request, response.version, arrived)
        return response

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        traffic = self.repository.models.get(request.model)
        if traffic is None or traffic.trial is not None or self._traces is not None:
            return None
        version = traffic.versions.get(request.version) if request.version else traffic.stable
        if version is None or not version.ready:
            return None
        try:
            response = version.infer_now(request)
        except ServeError:
            return None
        if response is not None and self._log.wants_success():
            self._log.answered(request, response.version, request.arrived)
        return response

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        return [e for e in self.repository.index() if e.state == "READY" or not ready_only]

    async def load(self, name: str, parameters: Mapping[str, Any] | None = None) -> None:
        await self.repository.load(name, parameters or {})

    async def unload(self, name: str) -> None:
        await self.repository.unload(name)

    def metrics(self) -> bytes:
        return metrics.exposition(self.repository.versions())

    async def _second_chance(
        self, traffic: Traffic, version: ModelVersion, request: InferRequest, error: ServeError, arrived: int
    ) -> InferResponse:
        """Let the trusted version answer where one on trial could not.

        Raises:
            ServeError: ``error``, if the trusted version has failed itself or the client named the version.
        """
        self._log.refused(request, version.version, error, arrived)
        error.logged = True
        stable = traffic.stable
        on_trial = traffic.trial is not None and traffic.trial.version is version
        dropped = stable is not version and traffic.versions.get(version.version) is not version
        if request.version or stable is None or not (on_trial or dropped):
            traffic.count(version, failed=True)
            raise error
        return await stable.infer(request, arrived)

    def _version(self, name: str, version: str) -> tuple[Traffic, ModelVersion]:
        traffic = self.repository.traffic(name)
        if version:
            return traffic, traffic.versions.get(version) or traffic.route(version)
        return traffic, traffic.stable or traffic.route("")
