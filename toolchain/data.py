"""Datasets on disk and in memory: one ``.npz`` per batch, with bytes that depend on the content alone.

A ``dataset`` folder holds ``batch-00000.npz`` ... with arrays named ``input:NAME`` and ``label:NAME``, and
``dataset.json``; a ``reference`` folder the same with ``output:NAME`` and ``reference.json``.  Readers and
writers hold one batch in memory at a time.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.artifact import canonical_json
from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.specs import DimSpec, InputSpec, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_NO_TIME = (1980, 1, 1, 0, 0, 0)
_LARGE = 1 << 31


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of one batch by name: the model's inputs, and labels (none: an empty mapping).

    Attributes:
        size: number of samples in it (1 where no axis is a batch axis).
    """

    inputs: dict[str, Array]
    labels: dict[str, Array] = field(default_factory=dict)
    size: int = 1


def write_batches(folder: Path, batches: Iterable[Batch], random: bool = False) -> dict[str, Any]:
    """Write a dataset folder; returns what dataset.json says: batches, samples, sizes, inputs, labels, random.

    Args:
        folder: exists already.
        batches: at least one.
        random: the inputs are not the user's but made from random numbers; whoever uses them must say so.

    Raises:
        ToolchainError: USER_CODE when there is no batch.
    """
    sizes: list[int] = []
    inputs: list[str] = []
    labels: list[str] = []
    for number, batch in enumerate(batches):
        inputs, labels = list(batch.inputs), list(batch.labels)
        arrays = {f"input:{name}": array for name, array in batch.inputs.items()}
        arrays |= {f"label:{name}": array for name, array in batch.labels.items()}
        write_npz(folder / f"batch-{number:05d}.npz", arrays)
        sizes.append(batch.size)
    if not sizes:
        raise ToolchainError("yielded no batches", code=ExitCode.USER_CODE)
    summary = {"batches": len(sizes), "samples": sum(sizes), "sizes": sizes, "inputs": inputs, "labels": labels}
    summary["random"] = random
    (folder / "dataset.json").write_bytes(canonical_json(summary))
    return summary


def is_random(folder: Path) -> bool:
    """Whether the inputs of a dataset folder were made from random numbers."""
    return bool(json.loads((folder / "dataset.json").read_text()).get("random", False))


def read_batches(folder: Path) -> Iterator[Batch]:
    """The batches of a dataset folder, in order."""
    sizes = json.loads((folder / "dataset.json").read_text())["sizes"]
    for number, size in enumerate(sizes):
        arrays = read_npz(folder / f"batch-{number:05d}.npz")
        inputs = {n.removeprefix("input:"): a for n, a in arrays.items() if n.startswith("input:")}
        labels = {n.removeprefix("label:"): a for n, a in arrays.items() if n.startswith("label:")}
        yield Batch(inputs, labels, size)


def write_outputs(folder: Path, outputs: Iterable[Mapping[str, Array]]) -> dict[str, Any]:
    """Write a reference folder; returns what reference.json says: batches and output names."""
    count, names = 0, []
    for count, arrays in enumerate(outputs, 1):
        names = list(arrays)
        write_npz(folder / f"batch-{count - 1:05d}.npz", {f"output:{name}": a for name, a in arrays.items()})
    summary = {"batches": count, "outputs": names}
    (folder / "reference.json").write_bytes(canonical_json(summary))
    return summary


def read_outputs(folder: Path) -> Iterator[dict[str, Array]]:
    """The outputs of a reference folder by name, batch by batch."""
    for number in range(json.loads((folder / "reference.json").read_text())["batches"]):
        arrays = read_npz(folder / f"batch-{number:05d}.npz")
        yield {name.removeprefix("output:"): array for name, array in arrays.items()}


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """An uncompressed ``.npz`` with fixed time stamps: equal arrays in equal order give equal bytes."""
    import numpy as np

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in arrays:
            info = zipfile.ZipInfo(name + ".npy", _NO_TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16
            array = np.asarray(arrays[name], order="C")
            with archive.open(info, "w", force_zip64=array.nbytes >= _LARGE) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an ``.npz``; pickled objects are refused."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def normalise(item: Any, signature: Signature, number: int) -> Batch:
    """A :class:`Batch` from what a user's data function yielded, checked against the declared inputs.

    Args:
        item: a dict of arrays by input name; one array, for a model with one input; or a tuple
            ``(inputs, labels)`` with labels an array or a dict of arrays.  torch tensors count as arrays.
        signature: the declared inputs; with none declared, ``item`` must hold a dict of arrays.
        number: the batch's index, for messages.

    Raises:
        ToolchainError: USER_CODE; names the batch, the input, what was got and what is allowed.
    """
    where = f"batch {number}"
    labels: Any = None
    if isinstance(item, tuple | list) and len(item) == 2:
        item, labels = item
    elif isinstance(item, tuple | list):
        kind = type(item).__name__
        raise _bad(where, f"a {kind} of {len(item)} elements; allowed: a dict, an array, (inputs, labels)")
    named = _named_inputs(item, signature, where)
    inputs = {name: _to_array(value, f"{where}, input {name!r}") for name, value in named.items()}
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        _check_input(inputs[spec.name], spec, signature.dims, sizes, f"{where}, input {spec.name!r}")
    for name, array in inputs.items():
        _check_finite(array, f"{where}, input {name!r}")
    if labels is None:
        labels = {}
    elif not isinstance(labels, Mapping):
        labels = {"label": labels}
    arrays = {str(name): _to_array(value, f"{where}, label {name!r}") for name, value in labels.items()}
    return Batch(inputs, arrays, sizes.get(signature.batch_dim or "", 1))


def limited(batches: Iterable[Batch], signature: Signature, limit: int | None) -> Iterator[Batch]:
    """``batches`` cut off after ``limit`` samples; the last one is cut along its batch axis."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        if batch.size > left:
            batch = _first_rows(batch, signature, left)
        yield batch
        left -= batch.size
        if left <= 0:
            return


def _first_rows(batch: Batch, signature: Signature, count: int) -> Batch:
    dim = signature.batch_dim
    inputs = dict(batch.inputs)
    for spec in signature.inputs:
        if dim in spec.shape:
            inputs[spec.name] = inputs[spec.name].take(range(count), axis=spec.shape.index(dim or ""))
    labels = {n: a[:count] if a.ndim and a.shape[0] == batch.size else a for n, a in batch.labels.items()}
    return Batch(inputs, labels, count)


def _named_inputs(item: Any, signature: Signature, where: str) -> dict[str, Any]:
    names = signature.names
    if isinstance(item, Mapping):
        got = {str(name): value for name, value in item.items()}
        if names and (unknown := [name for name in got if name not in names]):
            raise _bad(where, f"unknown input {unknown[0]!r}{did_you_mean(unknown[0], names)}; {_declared(names)}")
        if missing := [name for name in names if name not in got]:
            raise _bad(where, f"input {missing[0]!r} is missing; got: {', '.join(got) or 'nothing'}")
        if not got:
            raise _bad(where, "an empty dict")
        return {name: got[name] for name in names or got}
    if len(names) == 1:
        return {names[0]: item}
    if isinstance(item, tuple | list) and len(item) == len(names) and names:
        return dict(zip(names, item, strict=True))
    allowed = f"a dict by input name ({', '.join(names)})" if names else "a dict of arrays by input name"
    raise _bad(where, f"inputs given as {type(item).__name__}; allowed: {allowed}")


def _to_array(value: Any, where: str) -> Array:
    import numpy as np

    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            raise _bad(where, "a bfloat16 tensor; allowed: float32 or float16", "call .float() on it")
        value = value.numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise _bad(where, f"{type(value).__name__} that is not an array: {error}") from error
    if array.dtype.hasobject:
        raise _bad(where, f"{type(value).__name__} of Python objects; allowed: an array of numbers")
    plain = isinstance(value, list | tuple | int | float)
    # Python numbers carry no width of their own; float32 is what they mean here.
    return array.astype(np.float32) if plain and array.dtype == np.float64 else array


def _check_input(array: Array, spec: InputSpec, dims: Mapping[str, DimSpec], sizes: dict[str, int], where: str) -> None:
    import numpy as np

    expected = f"declared {spec.dtype}[{','.join(map(str, spec.shape))}]"
    got = f"{array.dtype}[{','.join(map(str, array.shape))}]"
    if array.dtype != np.dtype(spec.dtype):
        hint = f"call .astype({spec.dtype!r}) on it, or correct the recipe's dtype"
        raise _bad(where, f"got {got}; {expected}", hint)
    if array.ndim != len(spec.shape):
        raise _bad(where, f"got {got} with {array.ndim} axes; {expected} has {len(spec.shape)}")
    for axis, (size, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise _bad(where, f"got {got}; {expected}: axis {axis} must be {wanted}")
            continue
        dim = dims[wanted]
        if not dim.min <= size <= dim.max:
            hint = "yield batches within it, or " if dim.batch else ""
            hint += f"change min or max in [model.dims.{wanted}]"
            raise _bad(where, f"got {got}: {wanted!r} is {size}; allowed: {dim.min} to {dim.max}", hint)
        if sizes.setdefault(wanted, size) != size:
            raise _bad(where, f"got {got}: {wanted!r} is {size}, but {sizes[wanted]} in another input of this batch")
    _check_range(array, spec, where)


def _check_range(array: Array, spec: InputSpec, where: str) -> None:
    # A declared range binds integers (ids beyond a vocabulary crash a model); floats only draw from it.
    if not array.size or array.dtype.kind not in "iu":
        return
    low, high = int(array.min()), int(array.max())
    if (spec.low is not None and low < spec.low) or (spec.high is not None and high > spec.high):
        raise _bad(where, f"got values from {low} to {high}; declared: low = {spec.low}, high = {spec.high}")


def _check_finite(array: Array, where: str) -> None:
    import numpy as np

    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise _bad(where, f"{bad} of {array.size} values are NaN or infinite", "clean the data before yielding it")


def _declared(names: Sequence[str]) -> str:
    return "declared: " + ", ".join(names)


def _bad(where: str, what: str, hint: str = "") -> ToolchainError:
    return ToolchainError(what, where=where, hint=hint, code=ExitCode.USER_CODE)
