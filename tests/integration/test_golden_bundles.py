"""Bundles that earlier versions made are opened, run and served by this one."""

from __future__ import annotations

import asyncio
import io
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_support import ROOT, program
from helpers.edge_samples import Runtime

from tests.helpers.serving_core import serving
from toolchain.bundle.read import open_release
from toolchain.native_engine import ABI
from toolchain.runtime import load
from toolchain.runtime.edge.build import EDGE, RunnerFiles
from toolchain.runtime.server.api import InferRequest

GOLDEN = {(1, 1): "edge-schema-1", (1, 2): "edge-schema-1-abi-2"}
"""(Schema of the bundle, version of the engine's interface) -> the bundle's folder."""

PATHS = [pytest.param(ROOT / "tests" / "assets" / name, id=name) for name in GOLDEN.values()]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kept bundles are for x86_64")


def recorded(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    (bundle,) = open_release(path).bundles
    with np.load(io.BytesIO(bundle.read("selftest.npz"))) as file:
        arrays = dict(file)
    parts = [{n.partition(":")[2]: a for n, a in arrays.items() if n.startswith(kind)} for kind in ("input", "output")]
    return parts[0], parts[1]


def test_there_is_one_of_every_schema_and_every_interface() -> None:
    header = (EDGE / "src" / "internal.h").read_text()
    schema = int(re.search(r"#define TCR_SCHEMA (\d+)", header)[1])  # type: ignore[index]
    assert {s for s, _ in GOLDEN} == set(range(1, schema + 1)), "keep a bundle: tests/integration/golden_bundle.py"
    assert {abi for _, abi in GOLDEN} == set(range(1, ABI + 1)), "keep a bundle: tests/integration/golden_bundle.py"


@pytest.mark.parametrize("path", PATHS)
def test_the_edge_runtime_runs_it(built: RunnerFiles, runtime: Runtime, path: Path, tmp_path: Path) -> None:
    done = program(built, "self-test", path)
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr
    inputs, outputs = recorded(path)
    bundle = runtime.open(path)
    got = bundle.run(dict(inputs), tuple(outputs))
    for array, want in zip(got, outputs.values(), strict=True):
        np.testing.assert_allclose(array, want, atol=1e-5)
    bundle.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_python_loads_it(path: Path, threads: int) -> None:
    inputs, outputs = recorded(path)
    got = load(path, threads=threads).run(inputs)
    for name, want in outputs.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("execution", ["process", "inline"])
def test_the_server_serves_it(path: Path, tmp_path: Path, execution: str) -> None:
    inputs, outputs = recorded(path)
    release = tmp_path / "sample" / "1.0.0"
    release.parent.mkdir()
    release.symlink_to(path)

    async def main() -> dict[str, Any]:
        async with serving(release, execution=execution) as core:
            return (await core.infer(InferRequest("sample", "", inputs))).outputs

    got = asyncio.run(main())
    for name, want in outputs.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)
