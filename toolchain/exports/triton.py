"""A model repository for Triton Inference Server.

::

    DIR/NAME/config.pbtxt
    DIR/NAME/warmup/input-0          recorded inputs, raw
    DIR/NAME/labels-0.txt            where labels were given
    DIR/NAME/NUMBER/model.onnx       for Triton's onnxruntime backend, or
    DIR/NAME/NUMBER/model.py         for its python backend: with toolchain_engine.py and engine/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.bundle.layout import Blob, blob_of_bytes
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.exports.files import Tree, text_file
from toolchain.exports.source import Source, numbered
from toolchain.exports.standalone import standalone_source
from toolchain.exports.triton_config import ONNXRUNTIME, PYTHON, Plan, Serving, config_text, largest_batch, warmup_files

if TYPE_CHECKING:
    import numpy as np

ENGINE_FOLDER = "engine"
ENGINE_MODULE = "toolchain_engine.py"


def triton_tree(
    source: Source,
    *,
    serving: Serving | None = None,
    response_cache: bool = False,
    python_backend: bool = False,
    labels: Sequence[str] = (),
    version_number: int | None = None,
) -> Tree:
    """The repository.

    Args:
        source: the bundle.
        serving: measured settings; one instance and no batching when not given.
        response_cache: let Triton answer equal requests from its cache.
        python_backend: run an ONNX model through the python backend too.
        labels: ``FILE`` or ``OUTPUT=FILE``, a label for each line; those of the bundle where none are given.
        version_number: of the version's folder; from the release's version when not given.

    Raises:
        ToolchainError: USAGE, the version cannot be numbered or labels do not fit; MISSING_TOOL, no protobuf.
    """
    serving = serving or Serving()
    number = numbered(source.manifest.version, version_number)
    named = {spec.name: list(spec.labels) for spec in source.contract.outputs if spec.labels}
    named |= dict(_labels(source, text) for text in labels)
    through_python = python_backend or not _plain_onnx(source)
    files = _python_files(source) if through_python else _onnx_files(source)
    recorded = _warmup(source)
    plan = Plan(
        PYTHON if through_python else ONNXRUNTIME,
        "model.py" if through_python else "model.onnx",
        serving,
        response_cache,
        recorded,
        {output: f"labels-{index}.txt" for index, output in enumerate(named)},
    )
    tree = {f"{source.name}/{number}/{name}": blob for name, blob in files.items()}
    tree[f"{source.name}/config.pbtxt"] = text_file(config_text(source, plan))
    for file, array in zip(warmup_files(source.contract), recorded.values(), strict=False):
        tree[f"{source.name}/warmup/{file}"] = blob_of_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
    for output, lines in named.items():
        tree[f"{source.name}/{plan.labels[output]}"] = text_file("\n".join(lines) + "\n")
    return tree


def triton_notes(source: Source, serving: Serving | None) -> list[str]:
    """What an operator should know of the repository, a sentence each."""
    notes = []
    most = largest_batch(source.contract)
    if serving is None:
        notes.append("no dynamic batching: nothing measured says that it pays (toolchain serve --tune, --settings)")
    elif serving.max_batch_size == 1:
        notes.append("no dynamic batching: the settings say that it does not pay")
    elif not most:
        notes.append("no dynamic batching: the first axes of inputs and outputs are not one bounded batch from 1")
    if source.engine.backend == "tvm" and source.engine.form == "vm":
        notes.append("the Python of Triton's python backend needs numpy and apache-tvm")
    return notes


def _plain_onnx(source: Source) -> bool:
    """Whether Triton's own backend can run it: one ONNX model of all sizes that the contract allows."""
    return source.engine.backend == "onnxruntime" and [dict(v.sizes) for v in source.engine.variants] == [{}]


def _onnx_files(source: Source) -> dict[str, Blob]:
    """External data keeps its name, by which the model finds it; Triton is told the model's name."""
    files = source.engine_files()
    model = source.engine.variants[0].file
    return {("model.onnx" if name == model else name): blob for name, blob in files.items()}


def _python_files(source: Source) -> dict[str, Blob]:
    template = resources.files("toolchain.exports") / "templates" / "triton_model.py"
    provider = source.manifest.runtime.provider
    engine = {**source.engine_files(), "engine.json": source.engine_json(), "contract.json": source.contract_json()}
    return {
        # Not beside model.py: Python would take a library model.so for it.
        **{f"{ENGINE_FOLDER}/{name}": blob for name, blob in engine.items()},
        "model.py": text_file(template.read_text(encoding="utf-8")),
        ENGINE_MODULE: text_file(standalone_source(source.engine.form, provider)),
    }


def _warmup(source: Source) -> Mapping[str, np.ndarray]:
    """The recorded inputs; the first row where Triton knows of batches."""
    arrays = source.recorded_inputs()
    if not arrays:
        return {}
    most = largest_batch(source.contract)
    return {spec.name: arrays[spec.name][:1] if most else arrays[spec.name] for spec in source.contract.inputs}


def _labels(source: Source, text: str) -> tuple[str, list[str]]:
    name, equals, file = text.partition("=")
    outputs = [spec.name for spec in source.contract.outputs]
    if not equals:
        name, file = outputs[0], text
    if name not in outputs:
        raise _bad_labels(f"the model has no output {name!r}{did_you_mean(name, outputs)}")
    if not equals and len(outputs) > 1:
        raise _bad_labels(f"the model has the outputs {', '.join(outputs)}; write OUTPUT=FILE")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_labels(f"{file} cannot be read: {error}") from error
    spec = source.contract.outputs[outputs.index(name)]
    classes = spec.shape[-1] if spec.shape else 1
    if isinstance(classes, int) and len(lines) != classes:
        raise _bad_labels(f"{file} has {len(lines)} lines, output {name!r} has {classes} classes")
    return name, lines


def _bad_labels(what: str) -> ToolchainError:
    return ToolchainError(what, where="--labels", code=ExitCode.USAGE)
