"""Engines inside the server's own process: on the event loop (``inline``) or in threads.

Quicker than processes for tiny models.  What is lost: a crash of the engine is a crash of the server, a run that hangs
cannot be ended, and ``inline`` keeps everything else waiting during a run.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolchain.runtime.contract import Contract
from toolchain.runtime.server.batcher import Batcher, Job
from toolchain.runtime.server.checks import Fit
from toolchain.runtime.server.process_worker import Launch

if TYPE_CHECKING:
    import numpy as np

    from toolchain.runtime.engine import Engine
    from toolchain.runtime.server.slots import Shapes

_REMEMBERED = 256
_clock = time.monotonic_ns


class LocalPool:
    """See the module.

    Args:
        contract: of the model.
        launch: which engine, and how it is opened.
        instances: runs at the same time; with ``inline`` there is one.
        batcher: whose jobs are run.
        inline: run on the loop.
    """

    def __init__(self, contract: Contract, launch: Launch, instances: int, batcher: Batcher, *, inline: bool) -> None:
        self._contract = contract
        self._names = contract.input_names
        self._outputs = [spec.name for spec in contract.outputs]
        self._launch = launch
        self._batcher = batcher
        self._idle = instances
        self._engine: Engine | None = None
        self._threads = None if inline else ThreadPoolExecutor(instances, thread_name_prefix="engine")
        self._sizes: dict[Shapes, dict[str, int]] = {}
        self.facts: dict[str, float] = {}

    async def start(self) -> None:
        """Open the engine and run its self-test.

        Raises:
            ToolchainError: it cannot be opened, or the self-test fails.
        """
        from toolchain.runtime.server.engine_process import open_tested

        arguments = asdict(self._launch)
        self._engine, self.facts = await asyncio.to_thread(open_tested, arguments)

    def claim(self) -> LocalPool | None:
        """This pool, if a run may start now."""
        return self if self._idle else None

    def start_job(self, job: Job) -> None:
        """Run a job: before this returns with ``inline``, else soon."""
        arrays = self._merged(job)
        shapes = tuple([array.shape for array in arrays])
        named = dict(zip(self._names, arrays, strict=True))
        sizes = self._sizes.get(shapes)
        if sizes is None:
            if len(self._sizes) >= _REMEMBERED:
                self._sizes.clear()
            sizes = self._sizes[shapes] = self._contract.sizes_of(named)
        job.input_ns = _clock() - job.started
        if self._threads is None:
            self._finish(job, *self._run(named, sizes))
            return
        self._idle -= 1
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(self._returned, job, *self._run(named, sizes))

        self._threads.submit(work)

    def run_now(self, inputs: dict[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray] | None:
        """The outputs with ``inline``; None else, and where the engine fails."""
        if self._threads is not None or self._engine is None:
            return None
        try:
            return self._engine.run_checked(inputs, fit.sizes)
        except Exception:
            return None

    async def stop(self) -> None:
        """Let running threads end, and close the engine."""
        if self._threads is not None:
            await asyncio.to_thread(self._threads.shutdown)
        # Now, not when the garbage collector comes to the cycle of version, batcher and pool.
        self._engine = None

    def _merged(self, job: Job) -> list[np.ndarray]:
        members = job.members
        if len(members) == 1:
            return members[0].arrays
        import numpy as np

        axes = self._batcher.axes
        return [np.concatenate([m.arrays[i] for m in members], axis=axis) for i, axis in enumerate(axes)]

    def _run(self, arrays: dict[str, np.ndarray], sizes: dict[str, int]) -> tuple[list[np.ndarray], int, str]:
        """Outputs and nanoseconds, or what the engine said against these inputs."""
        started = _clock()
        assert self._engine is not None
        try:
            results = self._engine.run_checked(arrays, sizes)
        except Exception as error:
            return [], 0, getattr(error, "what", "") or f"{type(error).__name__}: {error}"
        return [results[name] for name in self._outputs], _clock() - started, ""

    def _returned(self, job: Job, *result: Any) -> None:
        self._idle += 1
        self._finish(job, *result)
        self._batcher.pump()

    def _finish(self, job: Job, outputs: list[np.ndarray], infer_ns: int, problem: str) -> None:
        if problem:
            self._batcher.failed(job, problem)
        else:
            self._batcher.done(job, outputs, infer_ns, owned=True)
