"""Bundles that were compiled ahead of time, served: answers, worker crashes, and what the server says of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bundle_samples import bundle_spec, expected_scores
from tests.helpers.edge_samples import matrix_engine, selftest_file
from tests.helpers.serving_core import serving
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.api import InferRequest, ServeError, Status


def release_of(folder: Path, *batches: int, error: float = 0.0) -> Path:
    engine = matrix_engine(folder / "engine", *batches)
    selftest_file(engine / "selftest.npz", error)
    spec = bundle_spec(engine)
    spec = replace(spec, manifest=replace(spec.manifest, name="matrix"))
    release = folder / "matrix" / spec.manifest.version
    release.parent.mkdir()
    pack_release("matrix", spec.manifest.version, [pack_bundle(spec)], release)
    return release


@pytest.mark.parametrize("execution", ["process", "thread", "inline"])
@pytest.mark.parametrize("batches", [(), (1, 8)], ids=["any size", "buckets"])
def test_an_engine_ahead_of_time_answers_rows_of_every_size(
    tmp_path: Path, execution: str, batches: tuple[int, ...]
) -> None:
    async def main() -> None:
        async with serving(release_of(tmp_path, *batches), execution=execution, max_batch_size=8) as core:
            sizes = [1, 2, 8, 9, 17, 64] + [1] * 40
            images = [
                np.random.default_rng(n).normal(size=(size, 4)).astype(np.float32) for n, size in enumerate(sizes)
            ]
            answers = await asyncio.gather(*[core.infer(InferRequest("matrix", "", {"image": i})) for i in images])
            for image, answer in zip(images, answers, strict=True):
                np.testing.assert_allclose(answer.outputs["scores"], expected_scores(image), rtol=1e-5, atol=1e-6)
            with pytest.raises(ServeError) as refused:
                await core.infer(InferRequest("matrix", "", {"image": np.zeros((65, 4), np.float32)}))
            assert refused.value.status is Status.INVALID
            assert core.metadata("matrix").properties["execution"] == execution

    asyncio.run(main())


@pytest.mark.parametrize("execution", ["process", "thread", "inline"])
def test_an_engine_ahead_of_time_with_wrong_answers_is_refused(tmp_path: Path, execution: str) -> None:
    release = release_of(tmp_path, error=1.0)

    async def main() -> None:
        with pytest.raises(ToolchainError, match="the self-test failed") as refused:
            async with serving(release, execution=execution):
                pass
        assert refused.value.code is ExitCode.DAMAGED_BUNDLE

    asyncio.run(main())
