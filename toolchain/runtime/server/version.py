"""One version of one model: loaded from a bundle, tested, and ready to answer."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.bundle.manifest import BundleManifest
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.contract import Contract, parse_contract
from toolchain.runtime.model import SELFTEST_NPZ, place
from toolchain.runtime.server import stats
from toolchain.runtime.server.api import InferRequest, InferResponse, ServeError, Status
from toolchain.runtime.server.batcher import Batcher
from toolchain.runtime.server.checks import RequestCheck
from toolchain.runtime.server.process_pool import ProcessPool
from toolchain.runtime.server.process_worker import Launch
from toolchain.runtime.server.settings import ModelSettings
from toolchain.runtime.server.stats import Statistics
from toolchain.runtime.server.waiting import Pending, Queueing

if TYPE_CHECKING:
    from toolchain.bundle.read import BundleRef
    from toolchain.runtime.server.local_pool import LocalPool

_log = logging.getLogger("toolchain.serve")
_CPU_PROVIDER = "CPUExecutionProvider"
MB = 1_000_000

LOADING, READY, UNLOADING, UNAVAILABLE = "LOADING", "READY", "UNLOADING", "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Placed:
    """A bundle that was checked against its digests and this machine, and its files."""

    manifest: BundleManifest
    contract: Contract
    folder: Path
    reference: str
    digest: str
    tested: bool


def place_bundle(reference: str, trust_key: Path | None = None) -> Placed:
    """Check a bundle, its signature too where there is a key to trust, and lay out its files; blocks.

    Raises:
        ToolchainError: as :func:`toolchain.runtime.load`.
    """
    bundle, folder = place(reference, trust_key=trust_key)
    try:
        return _placed(reference, bundle, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _placed(reference: str, bundle: BundleRef, folder: Path) -> Placed:
    manifest = bundle.manifest
    contract = parse_contract(manifest.contract, "bundle.json")
    tested = SELFTEST_NPZ in bundle.files and manifest.selftest is not None
    return Placed(manifest, contract, folder, reference, bundle.digest, tested)


def limited(contract: Contract, rows: int, name: str) -> Contract:
    """The contract with at most ``rows`` in a request.

    Raises:
        ServeError: INVALID, there is no batch, or the bundle takes none or fewer of that size.
    """
    for symbol, dim in contract.dims.items():
        if dim.batch:
            if dim.min <= rows and (dim.max is None or rows <= dim.max):
                return replace(contract, dims={**contract.dims, symbol: replace(dim, max=rows)})
            most = f"{dim.min} to {dim.max}" if dim.max is not None else f"at least {dim.min}"
            text = f"failed to load {name!r}: max_batch_size {rows} is not what the bundle takes, {most}"
            raise ServeError(Status.INVALID, text)
    raise ServeError(Status.INVALID, f"failed to load {name!r}: it has no batch, so that max_batch_size is 0")


class ModelVersion:
    """One version.  :meth:`load` it, ask it, :meth:`close` it; all on the loop's thread.

    Attributes:
        state: LOADING, READY, UNLOADING or UNAVAILABLE.
        reason: why it is UNAVAILABLE.
        pinned: whether it stays loaded when newer versions come.
    """

    def __init__(
        self, placed: Placed, settings: ModelSettings, *, pinned: bool = False, max_rows: int | None = None
    ) -> None:
        self.placed = placed
        self.settings = settings
        self.pinned = pinned
        self.name = placed.manifest.name
        self.version = placed.manifest.version
        self.state = LOADING
        self.reason = ""
        self.statistics = Statistics()
        contract = placed.contract if max_rows is None else limited(placed.contract, max_rows, self.name)
        self.check = RequestCheck(self.name, contract, [v.sizes for v in placed.manifest.engine.variants])
        most = self.check.max_rows
        self.max_batch = min(settings.max_batch_size, most) if most else settings.max_batch_size
        levels = settings.priorities
        queueing = Queueing(
            max_rows=self.max_batch,
            delay_ns=settings.queue_delay_us * 1000,
            size=settings.queue_size,
            nbytes=settings.queue_mb * MB,
            timeout_ns=int(settings.timeout_ms * 1e6),
            levels=levels,
            default_level=settings.default_priority or (levels + 1) // 2,
        )
        self.batcher = Batcher(queueing, self.check.batch_axes, self.check.output_axes, self.statistics)
        self._tensor_bytes = settings.tensor_mb * MB
        self._pool: ProcessPool | LocalPool | None = None
        self._closed: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.state == READY

    @property
    def threads(self) -> int:
        """Threads of each instance."""
        return self.settings.threads or max(1, len(os.sched_getaffinity(0)) // self.settings.instances)

    @property
    def pids(self) -> list[int]:
        """The processes that run its engines."""
        return [worker.pid for worker in self._pool.workers] if isinstance(self._pool, ProcessPool) else []

    async def load(self) -> None:
        """Start the workers; ready when the self-test has passed.

        Raises:
            ToolchainError: it cannot be loaded; the version is UNAVAILABLE, and its files are gone.
        """
        started = time.perf_counter()
        self._pool = self._make_pool()
        self.batcher.workers = self._pool
        try:
            await asyncio.wait_for(self._pool.start(), self.settings.load_timeout_s)
        except TimeoutError:
            await self._pool.stop()
            self._unavailable(f"loading and testing took longer than {self.settings.load_timeout_s:g} s")
            shutil.rmtree(self.placed.folder, ignore_errors=True)
            raise ToolchainError(self.reason, where=self.placed.reference, code=ExitCode.INTERNAL) from None
        except BaseException as error:
            await self._pool.stop()
            reason = error.what if isinstance(error, ToolchainError) else f"{type(error).__name__}: {error}"
            self._unavailable(reason)
            shutil.rmtree(self.placed.folder, ignore_errors=True)
            raise
        self.state = READY
        facts: dict[str, object] = {"model": self.name, "version": self.version}
        facts |= {
            "target": self.placed.manifest.target.name,
            "execution": self.settings.execution,
            "digest": self.placed.digest,
            **self._pool.facts,
        }
        facts["seconds"] = round(time.perf_counter() - started, 3)
        _log.info("model ready", extra={"facts": facts})
        if not self.placed.tested:
            _log.warning("the bundle holds no self-test", extra={"facts": {"model": self.name}})
        if self.settings.execution != "process":
            lost = "a crash of this engine ends the server, and a run that hangs cannot be ended"
            _log.warning(lost, extra={"facts": {"model": self.name, "execution": self.settings.execution}})

    async def infer(self, request: InferRequest, arrived: int) -> InferResponse:
        """Answer one request.

        Raises:
            ServeError: see :class:`toolchain.runtime.server.api.Core`.
        """
        try:
            arrays, fit = self.check.check(request)
            wanted = self.check.outputs(request.outputs)
            level = self.batcher.level(request.priority)
            if fit.nbytes > self._tensor_bytes:
                text = f"the inputs take {fit.nbytes} bytes; allowed: {self._tensor_bytes} (tensor_mb)"
                raise ServeError(Status.TOO_LARGE, text)
        except ServeError:
            self.statistics.fail(stats.OTHER, time.monotonic_ns() - arrived)
            raise
        outputs = await self.batcher.infer(Pending(arrays, fit, level, arrived), request.timeout_us * 1000)
        named = {name: outputs[index] for index, name in wanted}
        return InferResponse(self.name, self.version, request.id, named)

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Answer one request if nothing keeps it waiting; None: it has to go through :meth:`infer`.

        Raises:
            ServeError: its inputs don't fit; :meth:`infer` counts it and says the same.
        """
        _, fit = self.check.check(request)
        if request.priority:
            self.batcher.level(request.priority)
        wanted = self.check.outputs(request.outputs) if request.outputs else ()
        if fit.nbytes > self._tensor_bytes:
            return None
        outputs = self.batcher.infer_now(request.inputs, fit, request.arrived)
        if outputs is None:
            return None
        if wanted:
            outputs = {name: outputs[name] for _, name in wanted}
        return InferResponse(self.name, self.version, request.id, outputs)

    async def close(self, reason: str = "unloaded") -> None:
        """Answer what is in flight, then end the workers and remove the files.  May be called several times."""
        if self._closed is None:
            self.state = UNLOADING
            self._closed = asyncio.create_task(self._close(reason))
        await asyncio.shield(self._closed)

    async def kill(self) -> None:
        """End the workers whatever they are at, and remove the files."""
        if self._pool is not None:
            await self._pool.stop()
        shutil.rmtree(self.placed.folder, ignore_errors=True)
        self._unavailable("the server stops")

    async def _close(self, reason: str) -> None:
        await self.batcher.drained()
        if self._pool is not None:
            await self._pool.stop()
        shutil.rmtree(self.placed.folder, ignore_errors=True)
        self._unavailable(reason)
        _log.info("model unloaded", extra={"facts": {"model": self.name, "version": self.version, "reason": reason}})

    def _unavailable(self, reason: str) -> None:
        self.state = UNAVAILABLE
        self.reason = reason

    def _make_pool(self) -> ProcessPool | LocalPool:
        settings, placed = self.settings, self.placed
        tolerance = placed.manifest.selftest if placed.tested else None
        provider = placed.manifest.runtime.provider or _CPU_PROVIDER
        launch = Launch(placed.folder, provider, self.threads, self._tensor_bytes, tolerance)
        if settings.execution != "process":
            from toolchain.runtime.server.local_pool import LocalPool

            inline = settings.execution == "inline"
            return LocalPool(placed.contract, launch, settings.instances, self.batcher, inline=inline)
        return ProcessPool(
            placed.contract, launch, settings.instances, settings.run_timeout_s, self.batcher, self._health
        )

    def _health(self, problem: str) -> None:
        """What the pool says: why no worker is left, or that there is one again."""
        if self.state not in (READY, UNAVAILABLE):
            return
        if problem:
            self._unavailable(problem)
            error = ServeError(Status.UNAVAILABLE, f"model {self.name!r} version {self.version}: {problem}")
            self.batcher.fail_all(error)
            _log.error("model unavailable", extra={"facts": {"model": self.name, "reason": problem}})
        elif self.state == UNAVAILABLE:
            self.state, self.reason = READY, ""
            _log.info("model available again", extra={"facts": {"model": self.name, "version": self.version}})
