"""What the edge benchmark measures: engines, bundles of them, and ONNX Runtime's C library on the same models."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_children import Failed, Workshop, child
from cpu_models import ROOT, Model

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    """One model in one precision for one profile.

    Attributes:
        onnx: the folder of model.onnx and contract.json, from which ONNX Runtime runs.
        folder: ours, with model.so and for ARM the executable ``probe``.
        facts: bytes of weights, arena, and the least that any arena of the plan needs.
    """

    model: Model
    precision: str
    profile: str
    onnx: Path
    folder: Path
    facts: dict[str, Any]

    @property
    def contract(self) -> dict[str, Any]:
        """Inputs and outputs."""
        contract: dict[str, Any] = json.loads((self.onnx / "contract.json").read_text())
        return contract

    def onnxruntime_arguments(self, library: Path, threads: int, runs: int) -> list[str]:
        """Arguments of the program ``edge_ort``."""
        specs = self.contract["inputs"]
        inputs = [f"{s['name']}={s['dtype']}:{'x'.join(str(size) for size in s['shape'])}" for s in specs]
        output = self.contract["outputs"][0]["name"]
        return [str(library), str(self.onnx / "model.onnx"), str(threads), str(runs), output, *inputs]


class Parts:
    """Makes everything once, in a folder.

    Args:
        work: the folder; None: in the user's cache.
    """

    def __init__(self, work: Path | None) -> None:
        from platformdirs import user_cache_path

        self.work = (work or user_cache_path("toolchain") / "bench-edge").absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        edge = ROOT / "toolchain" / "runtime" / "edge"
        linked = [edge / "src" / name for name in ("engine.c", "engine.h", "threads.c")]
        probe = [HERE / name for name in ("edge_build.py", "edge_probe.c", "edge_fill.h")]
        compiler = [*(ROOT / "toolchain" / "tvm").rglob("*.py"), *(ROOT / "targets").glob("*.toml")]
        self._engine_sources = _digest(*compiler, *linked, edge / "include" / "toolchain_model.h", *probe)
        self._runner_sources = _digest(edge / "build.py", *edge.rglob("*.[ch]"))
        self._program_sources = _digest(HERE / "edge_ort.c", HERE / "edge_fill.h", HERE / "edge_parts.py")

    def engine(self, model: Model, precision: str, profile: str) -> Engine:
        """Ours, built unless this compiler has already built this file.

        Raises:
            Failed: the model is refused.
        """
        onnx = Path(Workshop(self.work, profile, False).prepare(model, precision)["folder"])
        key = _digest(onnx / "model.onnx", extra=profile + self._engine_sources)
        folder = self.work / "engines" / f"{model.name}-{precision}-{profile}-{key}"

        def make(part: Path) -> None:
            facts = child("edge_build.py", str(onnx), profile, str(part))
            (part / "facts.json").write_text(json.dumps(facts))

        _once(folder, make)
        facts = json.loads((folder / "facts.json").read_text())
        if "refused" in facts:
            raise Failed(facts["refused"])
        return Engine(model, precision, profile, onnx, folder, facts)

    def runner(self, profile: str) -> dict[str, Path]:
        """The edge runtime for a profile's architecture and C library, as the runner stage builds it."""
        from toolchain.runtime.edge.build import build_runner
        from toolchain.target import load_target

        target = load_target(profile)
        libc = target.runtime.abi.libc + (f":{target.runtime.abi.min}" if target.runtime.abi.min else "")
        folder = self.work / "runners" / f"{target.arch}-{libc}-{self._runner_sources}"
        _once(folder, lambda part: build_runner(target.arch, libc, "zig", part))
        return {path.name: path for path in sorted(folder.iterdir())}

    def bundle(self, engine: Engine) -> Path:
        """A release with one bundle: the engine, its contract and the edge runtime."""
        from toolchain.bundle.manifest import BundleManifest, RuntimeNeed, TargetInfo, parse_engine
        from toolchain.bundle.pack import BundleSpec, pack_bundle, pack_release
        from toolchain.target import load_target

        target = load_target(engine.profile)
        folder = engine.folder / "bundle"
        variants = [{"file": "model.so", "sizes": {}}]
        info = {"schema": 1, "backend": "tvm", "precision": engine.precision, "device": "cpu", "form": "aot"}
        (engine.folder / "engine.json").write_text(json.dumps({**info, "variants": variants}))
        files = {
            "model.so": engine.folder / "model.so",
            "engine.json": engine.folder / "engine.json",
            "contract.json": engine.onnx / "contract.json",
            **{f"runner/{name}": path for name, path in self.runner(engine.profile).items()},
        }
        manifest = BundleManifest(
            name=engine.model.name.replace("_", "-"),
            version="1.0.0",
            target=TargetInfo(target.name, target.to_json()),
            requirements=target.requirements(),
            engine=parse_engine({**info, "variants": variants}, "engine.json"),
            runtime=RuntimeNeed("apache-tvm", ">=0.27,<0.28"),
            contract=engine.contract,
        )
        pack_release(manifest.name, manifest.version, [pack_bundle(BundleSpec(manifest, files))], folder)
        return folder

    def onnxruntime_program(self, arch: str) -> Path:
        """The program ``edge_ort`` for an architecture."""
        folder = self.work / "programs" / f"{arch}-{self._program_sources}"
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.2.28"]
        flags = ["-O2", "-std=c11", "-D_GNU_SOURCE", "-fno-sanitize=undefined", "-s", str(HERE / "edge_ort.c")]
        libraries = ["-ldl", "-o"]

        def make(part: Path) -> None:
            subprocess.run([*zig, *flags, *libraries, str(part / "edge_ort")], check=True, capture_output=True)

        _once(folder, make)
        return folder / "edge_ort"


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """Lets ``make`` fill the folder unless it is there; it appears whole or not at all."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(part)
        if not folder.is_dir():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def native_onnxruntime() -> Path:
    """The C library in this environment's wheel.

    Raises:
        Failed: the wheel has none.
    """
    import importlib.util

    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin or "").parent if spec else Path()
    return library_in(folder / "capi")


def library_in(folder: Path) -> Path:
    """ONNX Runtime's C library in the folder ``capi`` of its package.

    Raises:
        Failed: there is none.
    """
    found = sorted(folder.glob("libonnxruntime.so*"))
    if not found:
        raise Failed(f"no libonnxruntime.so in {folder}")
    return found[0]


def _digest(*files: Path, extra: str = "") -> str:
    digest = hashlib.sha256(extra.encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
