"""Runs stages of the export side directly on the repository of small models in tests/assets/export_repo."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from toolchain.data import Batch, write_batches
from toolchain.specs import DimSpec, InputSpec
from toolchain.stage import StageContext
from toolchain.stages import export, reference

ASSETS = Path(__file__).parent.parent / "assets" / "export_repo"
BATCH = DimSpec("batch", 1, 64, batch=True)
IMAGE = InputSpec("image", "float32", ("batch", 1, 8, 8))


def repository(folder: Path) -> Path:
    """A copy of the small models' repository in ``folder``."""
    # A stage has a process of its own in a build; here the helper module of an earlier copy must go.
    sys.modules.pop("blocks", None)
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_stage(stage: ModuleType, options: Any, out: Path, root: Path, **inputs: Path) -> dict[str, Any]:
    """Facts of one stage, run in this process; they must be JSON."""
    out.mkdir(parents=True)
    result = stage.run(StageContext(inputs=inputs, options=options, out=out, root=root))
    return json.loads(json.dumps(result.facts, allow_nan=False))


@dataclass
class Exported:
    facts: dict[str, Any]
    folder: Path
    root: Path
    options: export.Options

    @property
    def contract(self) -> dict[str, Any]:
        return json.loads((self.folder / "contract.json").read_text())

    def outputs(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(self.folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def original(self, tmp_path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The reference stage's outputs for one batch."""
        from toolchain.data import read_outputs

        dataset = tmp_path / "one-batch"
        dataset.mkdir()
        write_batches(dataset, [Batch(inputs)])
        o = self.options
        options = reference.Options(o.source, o.checkpoint, o.example_inputs, o.inputs, o.dims, o.outputs)
        run_stage(reference, options, tmp_path / "reference-run", self.root, evaluation=dataset)
        return next(iter(read_outputs(tmp_path / "reference-run" / "reference")))


def export_model(tmp_path: Path, source: str, *, root: Path | None = None, **options: Any) -> Exported:
    """Export ``nets/models.py:source`` (or a file) of a fresh copy of the repository."""
    root = root or repository(tmp_path / "repo")
    full = source if "." in source else f"nets/models.py:{source}"
    made = export.Options(source=full, **options)
    facts = run_stage(export, made, tmp_path / "export", root)
    return Exported(facts, tmp_path / "export" / "onnx", root, made)
