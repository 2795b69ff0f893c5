"""Magika, Google's file-type model, as the installed package ``magika`` carries it.

The recipe's source, ``filetype/model.py:onnx_path``, is a function that returns the :class:`pathlib.Path` of an
``.onnx`` file in place of an ``nn.Module``: the file lies wherever the package is installed, which no fixed path
in a recipe could name.  A function may return the path of a ``.pt2`` file in the same way.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "magika"
MODEL = "standard_v3_3"


@dataclass(frozen=True)
class Config:
    """What the model's own configuration says.

    Attributes:
        begin, end: number of values taken from a file's beginning and end.
        block: bytes read there, before white space is stripped.
        padding: value that fills up a short file; bytes are 0 to 255.
        min_size: smaller files are not for the model, bytes.
        labels: the model's classes, in the order of its output.
        extensions: file name extension -> label, where there is only one.
    """

    begin: int
    end: int
    block: int
    padding: int
    min_size: int
    labels: tuple[str, ...]
    extensions: dict[str, str]


def package_folder() -> Path:
    """The folder of the installed package; its code is not run.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is not None and found.origin is not None and (Path(found.origin).parent / "models" / MODEL).is_dir():
        return Path(found.origin).parent
    raise ModuleNotFoundError(f"this recipe needs the package magika with its model {MODEL}: pip install magika==1.0.3")


def onnx_path() -> Path:
    """The model: int32 ``bytes`` [batch, 2048] to float32 ``target_label`` [batch, 214], probabilities."""
    return package_folder() / "models" / MODEL / "model.onnx"


def config() -> Config:
    """The model's configuration, read from the package.

    Raises:
        ValueError: the model takes features that this recipe doesn't extract.
    """
    folder = package_folder()
    model = json.loads((folder / "models" / MODEL / "config.min.json").read_text(encoding="utf-8"))
    if model["mid_size"] or model["use_inputs_at_offsets"]:
        raise ValueError(f"the model {MODEL} takes more than a file's beginning and end")
    types = json.loads((folder / "config" / "content_types_kb.min.json").read_text(encoding="utf-8"))
    by_extension: dict[str, list[str]] = {}
    for label in model["target_labels_space"]:
        for extension in types[label]["extensions"]:
            by_extension.setdefault(extension, []).append(label)
    return Config(
        begin=model["beg_size"],
        end=model["end_size"],
        block=model["block_size"],
        padding=model["padding_token"],
        min_size=model["min_file_size_for_dl"],
        labels=tuple(model["target_labels_space"]),
        extensions={extension: labels[0] for extension, labels in by_extension.items() if len(labels) == 1},
    )
