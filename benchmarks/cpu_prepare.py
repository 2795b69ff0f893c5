"""The benchmark's ONNX files: made once by the toolchain's own stages, kept in a cache folder.

``python cpu_prepare.py MODEL PRECISION PROFILE FOLDER DYNAMIC`` runs the stages that are missing and prints one line
of JSON: the folder of the result, or why there is none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_models import ROOT, Model, all_models

from toolchain.specs import Signature
from toolchain.stage import StageContext, StageResult
from toolchain.target import TargetProfile, load_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALIBRATION_BATCHES = 8
SEED = 7


class Refused(Exception):  # noqa: N818 - a result that the table shows
    """A stage has nothing to offer for this model."""


def prepared(model: Model, precision: str, profile: TargetProfile, work: Path) -> Path:
    """Folder with model.onnx and contract.json of ``model`` in ``precision``.

    Raises:
        Refused: the quantizer offers nothing.
    """
    from toolchain.stages import export, optimize

    base = work / "onnx" / f"{model.name}{'-dynamic' if model.dynamic else ''}-{_digest(model)}"
    source = export.Options(model.source, model.checkpoint, inputs=model.exported_inputs, dims=model.dims)
    exported = _stage(base / "export", export, source, {})
    folder = _stage(base / "fp32", optimize, optimize.Options(True, model.exported_inputs), {"onnx": exported})
    if precision == "fp32":
        return folder
    from toolchain.stages import quantize

    scheme = {f.name: getattr(profile.numerics, f.name) for f in fields(quantize.Options) if f.name in _scheme(profile)}
    options = quantize.Options(**scheme, precision=precision)
    named = f"{precision}-{hashlib.sha256(repr(options).encode()).hexdigest()[:8]}"
    inputs = {"onnx": folder}
    if precision == "int8-static":
        inputs["calibration"] = _calibration(base, model)
    return _stage(base / named, quantize, options, inputs)


def _scheme(profile: TargetProfile) -> set[str]:
    return set(type(profile.numerics).model_fields)


def _digest(model: Model) -> str:
    """Changes with the definition of the model and with what the files are made of."""
    text = repr(model).encode()
    for file in sorted((ROOT / Path(model.source.partition(":")[0])).parent.glob("*.py")):
        text += file.read_bytes()
    return hashlib.sha256(text).hexdigest()[:8]


def _stage(folder: Path, module: Any, options: Any, inputs: dict[str, Path]) -> Path:
    """Runs a stage unless its output is there already; a folder appears whole or not at all."""
    if (folder / "refused.txt").is_file():
        raise Refused((folder / "refused.txt").read_text())
    if not folder.is_dir():
        temporary = folder.with_name(folder.name + ".part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        result: StageResult = module.run(StageContext(inputs, options, temporary, ROOT))
        if result.refused:
            (temporary / "refused.txt").write_text(result.refused)
        temporary.rename(folder)
        if result.refused:
            raise Refused(result.refused)
    return folder / "onnx"


def _calibration(base: Path, model: Model) -> Path:
    """A dataset like the inputs that are timed: smooth images, random tokens and numbers."""
    from toolchain.data import Batch, write_batches

    folder = base / "calibration"
    if not (folder / "dataset.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        inputs = (sample(model, SEED + 1 + number) for number in range(CALIBRATION_BATCHES))
        batches: Iterator[Batch] = (Batch(arrays, size=1) for arrays in inputs)
        write_batches(folder, batches)
    return folder


def sample(model: Model, seed: int) -> dict[str, NDArray[Any]]:
    """Seeded inputs at the timed sizes."""
    import numpy as np

    from toolchain.graph.inputs import random_inputs

    signature = Signature.of(model.exported_inputs, model.dims)
    arrays = random_inputs(signature, model.sizes, np.random.default_rng(seed))
    if arrays.get("image", np.empty(0)).shape[1:] == (3, 224, 224):
        from recipes.vision.seeded import smooth_images

        arrays["image"] = smooth_images(len(arrays["image"]), 224, seed)
    return arrays


def write_sample(model: Model, folder: Path) -> Path:
    """The inputs that every contender is timed on, as an .npz by input name, made once."""
    from toolchain.data import write_npz

    path = folder / "inputs.npz"
    if not path.is_file():
        write_npz(path.with_suffix(".part"), sample(model, SEED))
        path.with_suffix(".part").rename(path)
    return path


def main() -> None:
    """See the module's docstring."""
    name, precision, profile, work, dynamic = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    model = all_models(dynamic == "dynamic")[name]
    precision = model.int8 if precision == "int8" else precision
    answer: dict[str, str]
    try:
        folder = prepared(model, precision, load_target(profile), Path(work))
        answer = {"folder": str(folder), "inputs": str(write_sample(model, folder.parents[1]))}
    except Refused as refused:
        answer = {"refused": str(refused)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
