"""Releases of a small model that does what its inputs say: answers, takes its time, fails; and a core to serve it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.bundle_samples import bundle_spec, write_engine
from toolchain.bundle.pack import pack_bundle, pack_release
from toolchain.runtime.server.api import InferRequest
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.settings import load_settings

ROWS = 4
#: Turns of the loop that take about a tenth of a second.
TENTH = 40_000
CONTRACT: dict[str, Any] = {
    "schema": 1,
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": ["batch", "width"], "pad": None},
        {"name": "index", "dtype": "int64", "shape": ["batch"], "pad": None},
        {"name": "work", "dtype": "int64", "shape": ["batch"], "pad": None},
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "width"]}],
    "dims": {
        "batch": {"min": 1, "max": 64, "batch": True, "buckets": []},
        "width": {"min": 1, "max": 4096, "batch": False, "buckets": []},
    },
    "preprocessing": "",
}


def obedient_model(rows: int = ROWS, offset: float = 0.0) -> onnx.ModelProto:
    """y = x + offset + index, after ``max(work)`` turns of a loop; an index of ``rows`` or more is an error."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Softsign", ["v"], ["w"])],
        "turn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, []),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["work"], ["turns"], keepdims=0),
        helper.make_node("Loop", ["turns", "", "zero"], ["nothing"], body=body),
        helper.make_node("Gather", ["table", "index"], ["shift"]),
        helper.make_node("Add", ["x", "shift"], ["shifted"]),
        helper.make_node("Add", ["shifted", "nothing"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "obedient",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("work", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])],
        [
            numpy_helper.from_array(np.arange(rows, dtype=np.float32).reshape(-1, 1) + np.float32(offset), "table"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def obedient_release(
    folder: Path,
    version: str = "1.0.0",
    *,
    name: str = "obedient",
    rows: int = ROWS,
    offset: float = 0.0,
    recorded: float | None = None,
) -> Path:
    """A release ``folder/name/version`` with a self-test that expects ``recorded`` (the right offset by default)."""
    engine = folder / f".engine-{name}-{version}"
    write_engine(engine, CONTRACT, {"model.onnx": {}})
    onnx.save(obedient_model(rows, offset), engine / "model.onnx")
    inputs = inputs_of(0.5)
    expected = inputs["x"] + np.float32(offset if recorded is None else recorded)
    arrays = {f"input:{key}": value for key, value in inputs.items()} | {"output:y": expected}
    np.savez(engine / "selftest.npz", **arrays)  # type: ignore[arg-type]
    spec = bundle_spec(engine)
    spec = replace(spec, manifest=replace(spec.manifest, name=name, version=version))
    release = folder / name / version
    release.parent.mkdir(parents=True, exist_ok=True)
    pack_release(name, version, [pack_bundle(spec)], release)
    return release


def inputs_of(value: float, *, index: int = 0, work: int = 0, rows: int = 1, width: int = 4) -> dict[str, np.ndarray]:
    return {
        "x": np.full((rows, width), value, np.float32),
        "index": np.full((rows,), index, np.int64),
        "work": np.full((rows,), work, np.int64),
    }


def request_of(value: float, version: str = "", model: str = "obedient", **how: Any) -> InferRequest:
    settings = {key: how.pop(key) for key in ("priority", "timeout_us", "outputs", "id") if key in how}
    return InferRequest(model, version, inputs_of(value, **how), **settings)


@asynccontextmanager
async def serving(*releases: Path, watch: Path | None = None, **defaults: Any) -> AsyncIterator[ServingCore]:
    """A core that serves ``releases`` with these model settings."""
    overrides: Mapping[str, Any] = {f"defaults.{key}": value for key, value in {"threads": 1, **defaults}.items()}
    extra = {"watch": str(watch), "watch_interval_s": 0.05} if watch else {}
    core = ServingCore(load_settings(None, {**overrides, **extra}))
    try:
        await core.start([str(release) for release in releases])
        yield core
    finally:
        await asyncio.wait_for(core.close(), 20)
