"""The input/output contract of a model (``contract.json``), and the check of inputs against it.

Needs numpy only where arrays are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)

#: A fixed size, the name of a dynamic dimension, or None (unknown; outputs only).
Size = int | str | None


@dataclass(frozen=True, slots=True)
class ImageNote:
    """How an image file becomes this input: ``((inverted pixel) * scale - mean) / std``, pixels from 0 to 255.

    ``mean`` and ``std`` hold a value for each channel, or are empty.
    """

    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    invert: bool = False


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input.

    Attributes:
        pad: the value that fills it up to a bucket, if it may be filled up.
        low, high: inclusive range of the values of an input of whole numbers; None: not declared, or of another dtype.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    pad: float | None = None
    image: ImageNote | None = None
    low: int | None = None
    high: int | None = None

    def range_problem(self, array: np.ndarray) -> str:
        """What is wrong with the values of an array of this dtype: a line, or "" if they are all allowed."""
        if (self.low is None and self.high is None) or not array.size:
            return ""
        least, most = int(array.min()), int(array.max())
        if (self.low is None or least >= self.low) and (self.high is None or most <= self.high):
            return ""
        bounds = [f"{word} {bound}" for word, bound in (("from", self.low), ("to", self.high)) if bound is not None]
        got = str(least) if least == most else f"values from {least} to {most}"
        return f"input {self.name!r} must hold values {' '.join(bounds)}, got {got}"


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output: its dtype, its shape, and names of the positions of its last axis, if they have any."""

    name: str
    dtype: str
    shape: tuple[Size, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DimSpec:
    """A dynamic dimension.

    Attributes:
        min: least size.
        max: largest size, or None.
        batch: whether its rows are independent: rows may be added, and a run may be split.
        buckets: sizes that engines are compiled for where the backend cannot take any size.
    """

    min: int
    max: int | None
    batch: bool = False
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Contract:
    """What goes into a model and what comes out."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    dims: Mapping[str, DimSpec] = field(default_factory=dict)
    preprocessing: str = ""

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    def input(self, name: str) -> InputSpec:
        """The input of that name.

        Raises:
            ToolchainError: BAD_INPUT, no such input.
        """
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise bad_input(f"has no input {name!r}{did_you_mean(name, self.input_names)}", self._names())

    def check(self, inputs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Check inputs and say which size each dynamic dimension has in them.

        Arrays may be non-contiguous or of either byte order, and may hold NaN; dtypes are never converted.

        Returns:
            The arrays, contiguous and in native byte order, in the order of the contract; dimension -> size.

        Raises:
            ToolchainError: BAD_INPUT, with one line for each mistake.
        """
        problems = [f"unknown input {n!r}{did_you_mean(n, self.input_names)}" for n in inputs if n not in self.names]
        problems += [f"input {n!r} is missing" for n in self.input_names if n not in inputs]
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name in inputs:
                array, found = _check_array(spec, inputs[spec.name])
                found = found or [*self._check_sizes(spec, array, sizes), spec.range_problem(array)]
                problems += filter(None, found)
                arrays[spec.name] = array
        if problems:
            raise bad_input(problems[0] if len(problems) == 1 else "the inputs do not fit", self._names(), problems)
        return arrays, {symbol: size for symbol, (size, _) in sizes.items()}

    def sizes_of(self, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The size of each dynamic dimension in inputs that were checked before."""
        pairs = ((spec.shape, arrays[spec.name].shape) for spec in self.inputs)
        return {s: n for shape, got in pairs for s, n in zip(shape, got, strict=True) if isinstance(s, str)}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.input_names)

    def _names(self) -> str:
        return "the model takes " + ", ".join(f"{s.name}: {s.dtype}{shape_text(s.shape)}" for s in self.inputs)

    def _check_sizes(self, spec: InputSpec, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> list[str]:
        problems = []
        for axis, (size, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
            place = f"input {spec.name!r} axis {axis}"
            if isinstance(size, int):
                if got != size:
                    problems.append(f"{place} must have size {size}, got {got} (shape {shape_text(array.shape)})")
            elif isinstance(size, str):
                dim = self.dims[size]
                if got < dim.min or (dim.max is not None and got > dim.max):
                    problems.append(f"{place} ({size}) must have a size {range_text(dim)}, got {got}")
                first = sizes.setdefault(size, (got, place))
                if first[0] != got:
                    problems.append(f"{place} ({size}) has size {got}, but {first[1]} ({size}) has size {first[0]}")
        return problems


def _check_array(spec: InputSpec, value: Any) -> tuple[np.ndarray, list[str]]:
    """The value as a contiguous array, and what is wrong with its type, dtype or rank."""
    import numpy as np

    if not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        return np.empty(0), [f"input {spec.name!r} must be a numpy array, got {type(value).__name__}"]
    array = np.asarray(value)
    if array.dtype.name != spec.dtype:
        convert = f"convert it with .astype(numpy.{_numpy_name(spec.dtype)})"
        return array, [f"input {spec.name!r} must have dtype {spec.dtype}, got {array.dtype.name}; {convert}"]
    if array.ndim != len(spec.shape):
        problem = f"input {spec.name!r} must have {len(spec.shape)} dimensions {shape_text(spec.shape)}, "
        problem += f"got {array.ndim}: {shape_text(array.shape)}"
        if array.ndim == len(spec.shape) - 1 and spec.shape and isinstance(spec.shape[0], str):
            problem += f"; add the {spec.shape[0]} axis with array[None]"
        return array, [problem]
    # ascontiguousarray makes a scalar one-dimensional.
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return (native if native.flags.c_contiguous else np.ascontiguousarray(native)), []


def _numpy_name(dtype: str) -> str:
    return "bool_" if dtype == "bool" else dtype


def shape_text(shape: tuple[Size, ...]) -> str:
    """``[batch, 1, 8, 8]``; an unknown size is ``?``."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def range_text(dim: DimSpec) -> str:
    return f"of at least {dim.min}" if dim.max is None else f"from {dim.min} to {dim.max}"


def bad_input(what: str, hint: str = "", details: list[str] | None = None) -> ToolchainError:
    lines = details if details is not None and details != [what] else []
    return ToolchainError(what, where="inputs", hint=hint, code=ExitCode.BAD_INPUT, details=lines)


def parse_contract(data: Mapping[str, Any], where: Path | str) -> Contract:
    """The contract in parsed ``contract.json``.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, not of this form; INCOMPATIBLE_HOST, a newer schema.
    """
    from toolchain.bundle.check import damaged
    from toolchain.bundle.manifest import check_schema

    check_schema(data.get("schema"), SCHEMA, where)
    try:
        contract = Contract(
            tuple(_input(entry) for entry in data["inputs"]),
            tuple(OutputSpec(_name(e), _dtype(e), _shape(e), _labels(e)) for e in data["outputs"]),
            {str(name): _dim(dim) for name, dim in data.get("dims", {}).items()},
            str(data.get("preprocessing") or ""),
        )
        for spec in contract.inputs:
            for size in spec.shape:
                if size is None or (isinstance(size, str) and size not in contract.dims):
                    raise ValueError(f"input {spec.name!r} has the size {size!r}, which is not among the dims")
        if not contract.inputs or not contract.outputs or len(contract.names) != len(contract.inputs):
            raise ValueError("there must be inputs with different names, and outputs")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks the key {error}" if isinstance(error, KeyError) else str(error)
        raise damaged(f"is not a contract: {reason}", where) from None
    return contract


def _input(entry: Mapping[str, Any]) -> InputSpec:
    pad, dtype = entry.get("pad"), _dtype(entry)
    if pad is not None and not isinstance(pad, (int, float)):
        raise ValueError(f"pad must be a number or null, got {pad!r}")
    if pad is not None and not dtype.startswith("float") and (pad != int(pad) or (dtype[0] == "u" and pad < 0)):
        raise ValueError(f"pad {pad!r} is not of dtype {dtype}")
    return InputSpec(_name(entry), dtype, _shape(entry), pad, _image(entry.get("image")), *_range(entry, dtype))


def _range(entry: Mapping[str, Any], dtype: str) -> tuple[int | None, int | None]:
    """The range that binds: floats only draw random values from theirs."""
    low, high = entry.get("low"), entry.get("high")
    if "int" not in dtype:
        return None, None
    for bound in (low, high):
        if not (bound is None or type(bound) is int):
            raise ValueError(f"low and high must be whole numbers or null, got {bound!r}")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return low, high


def _image(entry: Mapping[str, Any] | None) -> ImageNote | None:
    if entry is None:
        return None
    scale = entry.get("scale")
    mean, std = (tuple(float(v) for v in entry.get(key) or ()) for key in ("mean", "std"))
    return ImageNote(None if scale is None else float(scale), mean, std, bool(entry.get("invert", False)))


def _name(entry: Mapping[str, Any]) -> str:
    name = entry["name"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name must be a non-empty string, got {name!r}")
    return name


def _dtype(entry: Mapping[str, Any]) -> str:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {entry['dtype']!r}")
    return str(entry["dtype"])


def _shape(entry: Mapping[str, Any]) -> tuple[Size, ...]:
    shape = tuple(entry["shape"])
    for size in shape:
        if not (size is None or isinstance(size, str) or (type(size) is int and size >= 0)):
            raise ValueError(f"a size must be a whole number, a name or null, got {size!r}")
    return shape


def _labels(entry: Mapping[str, Any]) -> tuple[str, ...]:
    labels, last = entry.get("labels", ()), (entry["shape"] or [1])[-1]
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be a list of strings")
    if labels and isinstance(last, int) and len(labels) != last:
        raise ValueError(f"output {entry['name']!r} has {last} classes and {len(labels)} labels")
    return tuple(labels)


def _dim(entry: Mapping[str, Any]) -> DimSpec:
    least, most = entry.get("min", 1), entry.get("max")
    if type(least) is not int or not (most is None or type(most) is int):
        raise ValueError(f"min and max must be whole numbers, got {least!r} and {most!r}")
    return DimSpec(least, most, bool(entry.get("batch", False)), tuple(int(b) for b in entry.get("buckets") or ()))
