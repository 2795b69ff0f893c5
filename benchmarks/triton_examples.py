"""Run the published example programs of Triton's Python client, unmodified, against this server.

    python benchmarks/triton_examples.py FOLDER

FOLDER is ``src/python/examples`` of a copy of the client's repository, which is not part of this one.  The examples ask
for models by name.  Those of numbers are ONNX models in bundles, served by the real core; bundles hold no models of
strings or of sequences, so these are functions here, behind the same front ends (marked ``front ends``).  Two
examples need what this server does not offer, and are expected to fail: see ``EXPECTED``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from serve_models import add_sub, classifier, identity, onnx_release

from toolchain.runtime.server.api import (
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ServeError,
    Status,
    TensorSpec,
)
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.frontend import FrontendSettings, Listen, start
from toolchain.runtime.server.settings import load_settings

_SECONDS = 60.0
#: What the server does not offer, by example.
EXPECTED = {
    "simple_grpc_custom_repeat": "a model that answers one request several times (decoupled)",
    "simple_grpc_model_control": "a repository of eight models, and INTERNAL for files that are not taken",
}
#: They ask for localhost:8000 and 8001 whatever they are told.
FIXED_PORTS = ("reuse_infer_objects_client", "memory_growth_test")
_LABELLED = "densenet_onnx"
_CLASSIFIED = ("image_client", "grpc_image_client")
#: Not counted: what they need is not on this machine (CUDA), or an ensemble of Triton's own.
_LEFT_OUT = ("simple_grpc_cudashm_client", "simple_http_cudashm_client", "ensemble_image_client")

Arrays = dict[str, np.ndarray]


class Function(NamedTuple):
    """A model that is a Python function of a request."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    call: Callable[[InferRequest], Arrays]


def _strings(request: InferRequest) -> Arrays:
    numbers = [np.vectorize(int, otypes=[np.int64])(request.inputs[name]) for name in ("INPUT0", "INPUT1")]
    results = (numbers[0] + numbers[1], numbers[0] - numbers[1])
    text = np.vectorize(lambda number: str(number).encode(), otypes=[np.object_])
    return {f"OUTPUT{index}": text(result) for index, result in enumerate(results)}


def _sequence(request: InferRequest) -> Arrays:
    """Triton's ``simple_sequence``: the value, and one more at a sequence's start."""
    return {"OUTPUT": request.inputs["INPUT"] + np.int32(bool(request.parameters.get("sequence_start")))}


FUNCTIONS = {
    "simple_string": Function(
        {"INPUT0": "BYTES", "INPUT1": "BYTES"}, {"OUTPUT0": "BYTES", "OUTPUT1": "BYTES"}, _strings
    ),
    "simple_identity": Function(
        {"INPUT0": "BYTES"}, {"OUTPUT0": "BYTES"}, lambda request: {"OUTPUT0": request.inputs["INPUT0"]}
    ),
    "simple_sequence": Function({"INPUT": "INT32"}, {"OUTPUT": "INT32"}, _sequence),
}


class ExampleCore(ServingCore):
    """The serving core, and functions beside its models."""

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        function = FUNCTIONS.get(name)
        if function is None:
            found = super().metadata(name, version)
            if name != _LABELLED:
                return found
            # The image clients want labels, which bundles do not hold.
            labels = tuple(f"label {index}" for index in range(10))
            return replace(found, outputs=tuple(replace(spec, labels=labels) for spec in found.outputs))
        specs = [
            tuple(TensorSpec(key, kind, (-1, -1)) for key, kind in tensors.items())
            for tensors in (function.inputs, function.outputs)
        ]
        return ModelMetadata(name, ("1",), "python", *specs)

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        return [*super().index(ready_only=ready_only), *(IndexEntry(name, "1", "READY") for name in FUNCTIONS)]

    async def infer(self, request: InferRequest) -> InferResponse:
        function = FUNCTIONS.get(request.model)
        if function is None:
            return await super().infer(request)
        if set(request.inputs) != set(function.inputs):
            raise ServeError(Status.INVALID, f"the inputs are {', '.join(function.inputs)}")
        outputs = function.call(request)
        return InferResponse(
            request.model, "1", request.id, {name: outputs[name] for name in request.outputs or outputs}
        )


class Result(NamedTuple):
    name: str
    passed: bool
    seconds: float
    last: str


def examples(folder: Path) -> list[str]:
    names = sorted(path.stem for path in folder.glob("*.py"))
    return [name for name in names if name not in _LEFT_OUT]


def _arguments(name: str, http: int, grpc: int, image: Path) -> list[str]:
    if name in FIXED_PORTS:
        return []
    address = f"127.0.0.1:{grpc if 'grpc' in name or name == 'image_client' else http}"
    if name in _CLASSIFIED:
        # Over HTTP image_client imports attrdict, which no longer runs on this Python.
        protocol = ["-i", "grpc"] if name == "image_client" else []
        return ["-m", _LABELLED, "-c", "3", "-u", address, *protocol, str(image)]
    return ["-u", address]


async def _one(folder: Path, name: str, arguments: list[str], *, whole: bool) -> Result:
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(folder / f"{name}.py"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": ""},
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _SECONDS)
    except TimeoutError:
        process.kill()
        return Result(name, False, _SECONDS, f"did not end within {_SECONDS:g} s")
    if whole:
        sys.stdout.buffer.write(output)
    lines = output.decode(errors="replace").strip().splitlines() or [""]
    return Result(name, process.returncode == 0, time.monotonic() - started, lines[-1][:90])


def _models(folder: Path) -> list[str]:
    models = {
        "simple": add_sub("int32"),
        "simple_int8": add_sub("int8"),
        "custom_identity_int32": identity("int32"),
        _LABELLED: classifier("data_0", "fc6_1", 10),
    }
    image_inputs = {_LABELLED: ("data_0",)}
    return [str(onnx_release(folder, name, model, images=image_inputs.get(name, ()))) for name, model in models.items()]


async def run(folder: Path, http_port: int, grpc_port: int, only: str = "") -> list[Result]:
    """Run the examples in ``folder`` one after the other against a server of their models."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "image.png"
        _draw(image)
        core = ExampleCore(load_settings(None, {"defaults.threads": 1}))
        await core.start(_models(Path(scratch)))
        settings = FrontendSettings(allow_admin=True, allow_shared_memory=True, server_name="triton")
        frontends = await start(core, settings, Listen("127.0.0.1", http_port, grpc_port))
        assert frontends.grpc_port is not None
        try:
            results = []
            for name in examples(folder):
                if only and name != only:
                    continue
                if name in FIXED_PORTS and (frontends.http_port, frontends.grpc_port) != (8000, 8001):
                    continue
                arguments = _arguments(name, frontends.http_port, frontends.grpc_port, image)
                result = await _one(folder, name, arguments, whole=bool(only))
                results.append(result)
                # Some unload the models that others ask for.
                await core.load("simple")
            return results
        finally:
            await frontends.drain(0.2)
            await core.close()


def _draw(path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--only", default="", help="one example, and its whole output")
    options = parser.parse_args()
    results = asyncio.run(run(options.folder, options.http_port, options.grpc_port, options.only))
    for result in results:
        backed = "front ends" if "string" in result.name or "sequence" in result.name else "core"
        backed = "front ends" if "byte" in result.name else backed
        why = "" if result.passed else EXPECTED.get(result.name, result.last)
        print(f"{'pass' if result.passed else 'FAIL'}  {result.name:42} {result.seconds:5.1f} s  {backed:10}  {why}")
    passed = sum(result.passed for result in results)
    print(f"{passed} of {len(results)} examples pass")
    if any(not result.passed and result.name not in EXPECTED for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
