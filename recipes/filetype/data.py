"""Real files, labelled by their extension: those that come with Python and with the packages of this project.

Pinned packages bring the same files to every machine.  At most 60 files of a type are taken, in the order of
their paths; those at even places evaluate, those at odd places calibrate.  Folders are listed by name, rather than
searched, to leave out those whose extensions say nothing (``scipy/spatial/tests/data`` calls its tables ``.txt``).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .model import Config, config

PER_LABEL = 60
BATCH = 32

STANDARD_LIBRARY = (
    ".", "asyncio", "concurrent/futures", "email", "html", "importlib", "json", "logging", "pydoc_data", "sqlite3",
    "unittest", "urllib", "venv/scripts/common", "venv/scripts/posix", "wsgiref", "xml/dom", "xml/etree",
)  # fmt: skip
PACKAGES = (
    "joblib/test/data",
    "networkx/drawing/tests/baseline",
    "numpy/_core/tests/data", "numpy/distutils/checks", "numpy/lib/tests/data", "numpy/random/tests/data",
    "numpy/f2py/tests/src/array_from_pyobj", "numpy/f2py/tests/src/crackfortran", "numpy/f2py/tests/src/kind",
    "numpy/f2py/tests/src/parameter", "numpy/f2py/tests/src/regression", "numpy/f2py/tests/src/string",
    "onnx", "onnx/common", "onnx/defs", "onnxruntime/datasets", "onnxruntime/tools/mobile_helpers",
    "pip/_vendor/certifi", "pip/_vendor/distlib",
    "scipy/fftpack/tests", "scipy/io/tests/data", "scipy/linalg/tests/data",
    "scipy/special/tests/data", "scipy/stats/tests/data",
    "setuptools", "setuptools/config",
    "sklearn/datasets/data", "sklearn/datasets/descr", "sklearn/datasets/images", "sklearn/utils/_repr_html",
    "sympy/plotting/tests/test_region_xor_images",
    "torch/_inductor/kernel/templates", "torch/share/cmake/Caffe2", "torch/share/cmake/Caffe2/public",
    "torch/utils/model_dump", "torchgen/packaged/ATen/native", "torchgen/packaged/ATen/templates",
    "torchgen/packaged/autograd", "torchgen/packaged/autograd/templates",
    "tvm/cmake/utils", "tvm/src/runtime", "tvm/src/runtime/vm", "tvm/web", "tvm/web/emcc", "tvm/web/src",
    "tvm/web/tests/node", "tvm/web/tests/python", "tvm_ffi/3rdparty/libbacktrace", "tvm_ffi/src/ffi",
    "ziglang/lib/compiler_rt", "ziglang/lib/libc/musl/src/math", "ziglang/lib/libc/musl/src/math/i386",
    "ziglang/lib/libc/musl/src/string", "ziglang/lib/libcxx/src", "ziglang/lib/docs",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One file: its path, its label's place in the model's output, and the model's input, int32 [2048]."""

    path: Path
    label: int
    features: NDArray[np.int32]


def folders() -> list[Path]:
    """The folders whose files are taken (not those below them), where they exist."""
    paths = sysconfig.get_paths()
    named = [Path(paths["stdlib"], name) for name in STANDARD_LIBRARY]
    named += [Path(paths["purelib"], name) for name in PACKAGES]
    return [folder for folder in named if folder.is_dir()]


def samples() -> tuple[list[Sample], list[Sample]]:
    """``(calibration, evaluation)``: no file is in both, nor are two files that look the same to the model."""
    settings = config()
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    taken: dict[str, int] = {}
    seen: set[bytes] = set()
    for path in (path for folder in folders() for path in sorted(folder.iterdir())):
        label = settings.extensions.get(path.suffix[1:].lower())
        if label is None or taken.get(label, 0) == PER_LABEL or not path.is_file():
            continue
        if path.stat().st_size < settings.min_size:
            continue
        values = features(path, settings)
        if values.tobytes() in seen:
            continue
        seen.add(values.tobytes())
        place = taken.get(label, 0)
        taken[label] = place + 1
        parts[place % 2 == 0].append(Sample(path, settings.labels.index(label), values))
    return parts


def features(path: Path, settings: Config) -> NDArray[np.int32]:
    """The model's input for a file, as the package makes it: version 2 of its feature extraction.

    The first and the last 4,096 bytes (or all, of a shorter file) are read; white space is stripped from the
    start of the former and from the end of the latter; 1,024 values of each remain, padded with 256.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(settings.block).lstrip()[: settings.begin]
        file.seek(max(0, size - settings.block))
        last = file.read(settings.block).rstrip()[-settings.end :]
    values = np.full(settings.begin + settings.end, settings.padding, np.int32)
    values[: len(first)] = list(first)
    values[len(values) - len(last) :] = list(last)
    return values


def calibration() -> Iterator[dict[str, NDArray[np.int32]]]:
    """The calibration files in batches of 32, without labels."""
    for inputs, _ in _batches(samples()[0]):
        yield inputs


def evaluation() -> Iterator[tuple[dict[str, NDArray[np.int32]], NDArray[np.int64]]]:
    """The evaluation files in batches of 32, with the places of their labels in the model's output."""
    return _batches(samples()[1])


def _batches(files: Sequence[Sample]) -> Iterator[tuple[dict[str, NDArray[np.int32]], NDArray[np.int64]]]:
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        yield {"bytes": np.stack([s.features for s in part])}, np.array([s.label for s in part], np.int64)
