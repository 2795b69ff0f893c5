"""What the edge benchmark measures: engines, bundles of them, and ONNX Runtime's C library on the same models."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
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
        self._sources = _digest(
            *(ROOT / "toolchain" / "tvm").rglob("*.py"), *(ROOT / "targets").glob("*.toml"),
            *(ROOT / "toolchain" / "runtime" / "edge").rglob("*.[chp]*"), *HERE.glob("edge_*"),
        )  # fmt: skip

    def engine(self, model: Model, precision: str, profile: str) -> Engine:
        """Ours, built unless this compiler has already built this file.

        Raises:
            Failed: the model is refused.
        """
        onnx = Path(Workshop(self.work, profile, False).prepare(model, precision)["folder"])
        key = _digest(onnx / "model.onnx", extra=profile + self._sources)
        folder = self.work / "engines" / f"{model.name}-{precision}-{profile}-{key}"
        if not folder.is_dir():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            facts = child("edge_build.py", str(onnx), profile, str(part))
            (part / "facts.json").write_text(json.dumps(facts))
            part.rename(folder)
        facts = json.loads((folder / "facts.json").read_text())
        if "refused" in facts:
            raise Failed(facts["refused"])
        return Engine(model, precision, profile, onnx, folder, facts)

    def runner(self, profile: str) -> dict[str, Path]:
        """The edge runtime for a profile's architecture and C library, as the runner stage builds it."""
        from toolchain.runtime.edge.build import build_runner
        from toolchain.target import load_target

        target = load_target(profile)
        libc = f"{target.runtime.abi.libc}:{target.runtime.abi.min}"
        folder = self.work / "runners" / f"{target.arch}-{libc}-{self._sources}"
        if not folder.is_dir():
            build_runner(target.arch, libc, "zig", folder.with_name(folder.name + ".part"))
            folder.with_name(folder.name + ".part").rename(folder)
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
        folder = self.work / "programs" / f"{arch}-{self._sources}"
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "edge_ort"
        if not program.is_file():
            zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.2.28"]
            flags = ["-O2", "-std=c11", "-D_GNU_SOURCE", "-fno-sanitize=undefined", "-s"]
            sources = [str(HERE / "edge_ort.c"), "-o", str(program), "-ldl"]
            subprocess.run([*zig, *flags, *sources], check=True, capture_output=True)
        return program


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
