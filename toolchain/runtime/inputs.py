"""Reads a model's inputs from files: ``.npy``, ``.npz``, images, JSON."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.runtime.contract import Contract, InputSpec, shape_text

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_ALLOWED = "allowed are .npy, .npz, .json and images (" + ", ".join(IMAGE_SUFFIXES) + ")"
_KEY_PREFIX = "input:"


def read_inputs(arguments: Sequence[str], contract: Contract) -> Arrays:
    """Read inputs for a model.

    Args:
        arguments: ``FILE`` or ``NAME=FILE`` each.  A ``.npz`` or ``.json`` file without a name holds arrays by the
            inputs' names; any other file without a name is the model's single input.  JSON lists take the input's
            dtype, if they can without loss; arrays are taken as they are.
        contract: the model's.

    Returns:
        Input name -> array; whether they fit is checked when the model runs.

    Raises:
        ToolchainError: BAD_INPUT, a file cannot be read or does not hold such inputs; MISSING_TOOL, an image is
            given and Pillow is not installed.
    """
    inputs: Arrays = {}
    for argument in arguments:
        name, path = _split(argument, contract)
        for key, array in _read(path, name, contract).items():
            if key in inputs:
                raise _bad(path, f"input {key!r} is given twice")
            inputs[key] = array
    return inputs


def _split(argument: str, contract: Contract) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return "", Path(argument)
    if name not in contract.names:
        raise _bad(
            argument,
            f"the model has no input {name!r}{did_you_mean(name, contract.input_names)}; "
            f"it has {', '.join(contract.input_names)}",
        )
    return name, Path(path)


def _read(path: Path, name: str, contract: Contract) -> Arrays:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise _bad(path, "is not a file" if path.exists() else "does not exist")
    try:
        with open(path, "rb"):
            pass
    except PermissionError as error:
        raise _bad(path, "this file may not be read", f"let this user read it: chmod u+r {path}") from error
    if suffix == ".npz":
        return _read_npz(path, name, contract)
    if suffix == ".json":
        return _read_json(path, name, contract)
    if suffix != ".npy" and suffix not in IMAGE_SUFFIXES:
        raise _bad(path, f"cannot tell what a {suffix or 'suffixless'} file holds; {_ALLOWED}")
    spec = _single(path, name, contract)
    return {spec.name: _read_npy(path) if suffix == ".npy" else _read_image(path, spec, contract)}


def _single(path: Path, name: str, contract: Contract) -> InputSpec:
    """The input that a file holding one array is for."""
    if name:
        return contract.input(name)
    if len(contract.inputs) == 1:
        return contract.inputs[0]
    raise _bad(
        path,
        f"holds one array, but the model has {len(contract.inputs)} inputs: {', '.join(contract.input_names)}",
        f"say which: {contract.input_names[0]}={path}",
    )


def _read_npy(path: Path) -> np.ndarray:
    import numpy as np

    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _bad(path, f"is not a numpy array of numbers: {_line(error)}") from error
    if not isinstance(array, np.ndarray):
        raise _bad(path, "is an archive of arrays, not one array", "name it .npz")
    return array


def _read_npz(path: Path, name: str, contract: Contract) -> Arrays:
    import numpy as np

    try:
        # Opened here, since numpy leaves a file open that turns out to be no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise _bad(path, f"is not an archive of numpy arrays: {_line(error)}") from error
    if any(key.startswith(_KEY_PREFIX) for key in arrays):
        # A batch of a dataset or a self-test: it holds labels or outputs besides.
        arrays = {k.removeprefix(_KEY_PREFIX): a for k, a in arrays.items() if k.startswith(_KEY_PREFIX)}
    if name:
        if len(arrays) != 1:
            raise _bad(path, f"must hold one array for {name!r}, got {len(arrays)}: {', '.join(arrays)}")
        return {name: next(iter(arrays.values()))}
    _check_names(path, arrays, contract)
    return arrays


def _read_json(path: Path, name: str, contract: Contract) -> Arrays:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(path, f"is not JSON: {_line(error)}") from error
    if not isinstance(data, dict):
        data = {_single(path, name, contract).name: data}
    elif name:
        raise _bad(path, f"must hold a list for {name!r}, got an object", "leave the name out")
    _check_names(path, data, contract)
    return {key: _from_lists(path, contract.input(key), value) for key, value in data.items()}


def _from_lists(path: Path, spec: InputSpec, value: Any) -> np.ndarray:
    """Nested lists as an array of the input's dtype, without loss."""
    import numpy as np

    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise _bad(path, f"{spec.name!r} must be nested lists of equal lengths: {_line(error)}") from error
    want = np.dtype(spec.dtype)
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}[want.kind]
    if array.size and array.dtype.kind not in allowed:
        got = {"f": "fractions", "b": "booleans", "U": "text", "O": "something else"}.get(array.dtype.kind, "numbers")
        raise _bad(path, f"{spec.name!r} must hold {spec.dtype}, got {got}")
    if array.size and want.kind in "iu":
        limits = np.iinfo(want)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise _bad(path, f"{spec.name!r} must hold {spec.dtype} ({limits.min} to {limits.max})")
    return array.astype(want)


def _check_names(path: Path, got: dict[str, Any], contract: Contract) -> None:
    for key in got:
        if key not in contract.names:
            raise _bad(
                path,
                f"holds {key!r}, which is no input of the model{did_you_mean(key, contract.input_names)}; "
                f"it has {', '.join(contract.input_names)}",
            )


def _read_image(path: Path, spec: InputSpec, contract: Contract) -> np.ndarray:
    from toolchain.runtime.image import ImageMismatchError, image_array

    try:
        return image_array(path, spec, [symbol for symbol, dim in contract.dims.items() if dim.batch])
    except ImageMismatchError as error:
        raise _bad(path, f"{error}; input {spec.name!r} is {spec.dtype}{shape_text(spec.shape)}") from error


def _bad(where: Path | str, what: str, hint: str = "") -> ToolchainError:
    return ToolchainError(what, where=str(where), hint=hint, code=ExitCode.BAD_INPUT)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
