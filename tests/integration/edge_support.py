"""What the tests of the edge runtime share: bundles, a runtime for this machine, and calls of it."""

from __future__ import annotations

import atexit
import functools
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bundle_samples import (
    bundle_spec,
    sample_release,
)
from helpers.edge_samples import EdgeError, Runtime, matrix_engine, selftest_file, tokens_engine

from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
from toolchain.runtime.edge.build import RunnerFiles, build_runner

ROOT = Path(__file__).parents[2]


@functools.cache
def native_runner() -> RunnerFiles:
    """The runtime for this machine, built once in a process."""
    folder = tempfile.TemporaryDirectory(prefix="edge-runner-")
    atexit.register(folder.cleanup)
    return build_runner(platform.machine(), "glibc", "cc", Path(folder.name))


def sample_engines(folder: Path) -> Mapping[str, Path]:
    """Engines of the small models: of any batch size, of one, with buckets; of tokens with buckets, and of any size."""
    return {
        "any": matrix_engine(folder / "any"),
        "one": matrix_engine(folder / "one", 3),
        "buckets": matrix_engine(folder / "buckets", 1, 8),
        "tokens": tokens_engine(folder / "tokens", ((1, 8), (1, 16), (4, 8), (4, 16))),
        "tokens-any": tokens_engine(folder / "tokens-any", ((0, 0),)),
    }


def release_with_selftest(engine: Path, folder: Path) -> Path:
    """A release of one bundle, with a self-test."""
    spec = bundle_spec(engine, selftest_npz=selftest_file(folder / "selftest.npz"))
    return packed(folder / "r", spec)


def image(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)


def refusal(runtime: Runtime, path: Path | str, **options: Any) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        runtime.open(path, **options)
    return caught.value


def packed(folder: Path, spec: BundleSpec) -> Path:
    pack_release("sample", "1.0.0", [pack_bundle(spec)], folder)
    return folder


def program(built: RunnerFiles, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(built.program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def patched(offset: int, value: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:offset] + value + data[offset + len(value) :])

    return change


def library_of(engine: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(engine, folder / "changed")
    change(folder / "changed" / "b0.so")
    return sample_release(folder / "r", folder / "changed")


def in_threads(work: Callable[[], object], count: int = 2) -> list[object]:
    results: list[object] = [None] * count
    start = threading.Barrier(count)

    def one(index: int) -> None:
        start.wait()
        try:
            results[index] = work()
        except EdgeError as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
