"""Declared inputs and dimensions of a model: a recipe's ``[[model.inputs]]`` and ``[model.dims.NAME]`` tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ExitCode, ToolchainError

DTYPES = (
    "float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip
"""dtypes of inputs, outputs and labels that every runtime here can carry (numpy's names)."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How an image file becomes an input: ``((inverted pixel) * scale - mean) / std``, pixels from 0 to 255.

    Attributes:
        scale: None: 1/255 for floats, 1 for whole numbers.
        mean, std: one value, one for each channel, or none.
    """

    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    invert: bool = False

    def to_json(self) -> dict[str, Any]:
        """As in contract.json."""
        return {"scale": self.scale, "mean": list(self.mean), "std": list(self.std), "invert": self.invert}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """From an input's ``image`` in contract.json."""
        mean, std = (tuple(map(float, data.get(key) or ())) for key in ("mean", "std"))
        return cls(data.get("scale"), mean, std, bool(data.get("invert", False)))


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input.

    Attributes:
        shape: an int per fixed axis, the name of a dimension per dynamic one.
        pad: value with which rows or tokens may be filled up to a bucket, or None.
        low, high: inclusive range of random values; None: not declared.
        image: how an image file becomes this input, or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    pad: float | None = None
    low: float | None = None
    high: float | None = None
    image: ImageSpec | None = None

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with each named dimension replaced by its size in ``sizes``."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.shape)

    def to_json(self) -> dict[str, Any]:
        """As in contract.json: a range and an image only where one is declared."""
        known: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "pad": self.pad}
        number = float if self.dtype.startswith("float") else int
        known |= {k: number(v) for k, v in (("low", self.low), ("high", self.high)) if v is not None}
        return known if self.image is None else {**known, "image": self.image.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """From an entry of contract.json."""
        shape, image = tuple(data["shape"]), data.get("image")
        note = None if image is None else ImageSpec.from_json(image)
        return cls(data["name"], data["dtype"], shape, data.get("pad"), data.get("low"), data.get("high"), note)

    def describe(self) -> str:
        """E.g. ``image float32[batch,1,8,8]``."""
        return f"{self.name} {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class DimSpec:
    """A named dimension: its allowed sizes (inclusive), and whether its rows are independent of each other."""

    name: str
    min: int = 1
    max: int = 1
    batch: bool = False
    buckets: tuple[int, ...] = ()
    example: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As in contract.json."""
        return {"min": self.min, "max": self.max, "batch": self.batch, "buckets": list(self.buckets)}


@dataclass(frozen=True, slots=True)
class Signature:
    """All inputs of a model, in order, and the dimensions that their shapes name."""

    inputs: tuple[InputSpec, ...]
    dims: Mapping[str, DimSpec]

    @classmethod
    def of(cls, inputs: Sequence[InputSpec], dims: Sequence[DimSpec]) -> Signature:
        """Checked.

        Raises:
            ToolchainError: BAD_RECIPE for an unknown dtype or a shape that names an undeclared dimension.
        """
        by_name = {dim.name: dim for dim in dims}
        for spec in inputs:
            _check_spec(spec, by_name)
        return cls(tuple(inputs), by_name)

    @classmethod
    def from_contract(cls, contract: Mapping[str, Any]) -> Signature:
        """From the JSON of a contract.json."""
        dims = [
            DimSpec(name, d["min"], d["max"], d.get("batch", False), tuple(d.get("buckets") or ()))
            for name, d in contract["dims"].items()
        ]
        return cls.of([InputSpec.from_json(entry) for entry in contract["inputs"]], dims)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def used_dims(self) -> tuple[DimSpec, ...]:
        """Dimensions that occur in an input's shape, in order of first use."""
        names = dict.fromkeys(axis for spec in self.inputs for axis in spec.shape if isinstance(axis, str))
        return tuple(self.dims[name] for name in names)

    @property
    def batch_dim(self) -> str | None:
        """Name of the first dimension marked ``batch``, or None."""
        return next((dim.name for dim in self.used_dims if dim.batch), None)

    def example_sizes(self) -> dict[str, int]:
        """A size per dimension for tracing: at least 2 where allowed and all different where possible.

        torch.export treats sizes 0 and 1 as constants, and equal sizes as one dimension.
        """
        sizes: dict[str, int] = {}
        for dim in self.used_dims:
            if dim.example is not None:
                sizes[dim.name] = dim.example
                continue
            first = max(dim.min, 2 if dim.batch else min(8, max(2, dim.max)))
            free = [n for n in range(first, dim.max + 1) if n not in sizes.values()][:1]
            sizes[dim.name] = (free or [min(first, dim.max)])[0]
        return sizes

    def check_sizes(self) -> list[dict[str, int]]:
        """Sizes at which a converted model is compared with the one before: the example, then for each
        dynamic dimension its minimum and another size, the other dimensions staying at the example.
        """
        example = self.example_sizes()
        found = [example]
        for dim in self.used_dims:
            other = example[dim.name] + 1 if example[dim.name] < dim.max else example[dim.name] - 1
            for size in (dim.min, max(dim.min, other)):
                if (sizes := {**example, dim.name: size}) not in found:
                    found.append(sizes)
        return found


def _check_spec(spec: InputSpec, dims: Mapping[str, DimSpec]) -> None:
    if spec.dtype not in DTYPES:
        raise ToolchainError(
            f"got dtype {spec.dtype!r}; allowed: {', '.join(DTYPES)}",
            where=f"model.inputs {spec.name!r}",
            code=ExitCode.BAD_RECIPE,
        )
    for axis in spec.shape:
        if isinstance(axis, str) and axis not in dims:
            raise ToolchainError(
                f"the shape names the dimension {axis!r}, which has no range",
                where=f"model.inputs {spec.name!r}",
                hint=f"add [model.dims.{axis}] with min and max",
                code=ExitCode.BAD_RECIPE,
            )
