"""Bundles to export: small real engines of every kind, and the command line that exports them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx

from helpers.bundle_samples import (
    MATRIX_CONTRACT,
    TOKENS_CONTRACT,
    bundle_spec,
    matrix_engine,
    tokens_model,
    write_engine,
)
from helpers.edge_samples import matrix_engine as aot_matrix_engine
from helpers.edge_samples import selftest_file, tokens_engine
from toolchain.bundle.manifest import RuntimeNeed
from toolchain.bundle.pack import pack_bundle, pack_release

__all__ = [
    "MATRIX_CONTRACT",
    "TOKENS_CONTRACT",
    "aot_release",
    "exported",
    "files_of",
    "onnx_release",
    "tokens_release",
    "tvm_release",
]


def release_of(engine: Path, folder: Path, version: str = "1.2.3", **files: Path) -> Path:
    """A release with one bundle of this engine."""
    from dataclasses import replace

    spec = bundle_spec(engine, "any", **files)
    manifest = replace(spec.manifest, version=version)
    if manifest.engine.form == "aot":
        manifest = replace(manifest, runtime=RuntimeNeed("", ""))
    pack_release("sample", version, [pack_bundle(replace(spec, manifest=manifest))], folder)
    return folder


def aot_release(folder: Path, *batches: int, version: str = "1.2.3", **defines: object) -> Path:
    """scores = relu(image @ WEIGHTS) ahead of time, of any batch size or of these, with a self-test.

    ``defines`` are those of ``edge_model.c``.
    """
    engine = aot_matrix_engine(folder / "engine", *batches, **defines)
    return release_of(engine, folder / "release", version, selftest_npz=selftest_file(folder / "selftest.npz"))


def onnx_release(folder: Path, *batches: int, version: str = "1.2.3") -> Path:
    """The same as ONNX."""
    engine = matrix_engine(folder / "engine", batches)
    return release_of(engine, folder / "release", version, selftest_npz=selftest_file(folder / "selftest.npz"))


def tokens_release(folder: Path, sizes: tuple[tuple[int, int], ...] = ()) -> Path:
    """The tokens model: ONNX of any size, or ahead of time for each (batch, sequence)."""
    if sizes:
        return release_of(tokens_engine(folder / "engine", sizes), folder / "release")
    (folder / "engine").mkdir(parents=True)
    onnx.save(tokens_model("batch", "sequence"), folder / "engine" / "model.onnx")
    return release_of(write_engine(folder / "engine", TOKENS_CONTRACT, {"model.onnx": {}}), folder / "release")


def tvm_release(folder: Path) -> Path:
    """The matrix model for TVM's virtual machine, of any batch size."""
    from helpers.bundle_samples import matrix_model

    engine = write_engine(folder / "engine", MATRIX_CONTRACT, {"model.so": {}}, "tvm")
    build = "import sys, onnx, tvm; from tvm import relax; from tvm.relax.frontend.onnx import from_onnx\n"
    build += "module = from_onnx(onnx.load(sys.argv[1]), keep_params_in_input=False)\n"
    build += "tvm.compile(relax.transform.LegalizeOps()(module), 'llvm').export_library(sys.argv[2])\n"
    onnx.save(matrix_model("batch"), folder / "model.onnx")
    words = [sys.executable, "-W", "ignore", "-c", build, str(folder / "model.onnx"), str(engine / "model.so")]
    subprocess.run(words, check=True, capture_output=True)
    return release_of(engine, folder / "release", selftest_npz=selftest_file(folder / "selftest.npz"))


def exported(format_name: str, bundle: Path | str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What ``toolchain export`` did, in a process of its own."""
    command = [sys.executable, "-m", "toolchain.cli.main", "export", format_name, str(bundle), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
