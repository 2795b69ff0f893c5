"""Loop nests with a choice in them, named by what a choice depends on; and which choices one allows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from toolchain.tvm.loops import winograd
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.tiles import MAX_ROWS, MAX_VECTORS, Room, Tile, ceil_div

_WORDS = re.compile(
    r"(?P<kind>conv|dense) (?P<dtype>float32|float16) (?:(?P<layout>plain|blocked) )?"
    r"data (?P<data>(?:\?|[1-9]\d*)(?:x(?:\?|[1-9]\d*))*) weights (?P<weights>[1-9]\d*(?:x[1-9]\d*)*)"
    r"(?: stride (?P<stride>\d+x\d+) pad (?P<pad>\d+x\d+x\d+x\d+)"
    r" dilation (?P<dilation>\d+x\d+) groups (?P<groups>\d+))?"
    r" vector (?P<vector>\d+) registers (?P<registers>\d+)"
)
_CHOICE = re.compile(r"(?:(?P<winograd>winograd) )?(?P<rows>[1-9]\d*)x(?P<columns>[1-9]\d*) x (?P<vectors>[1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Choice:
    """A tile of ``rows`` image rows x ``columns`` single values x ``vectors`` vectors, and by which way.

    ``winograd``: whether a convolution takes the detour; the tile is then that of its products, of one row.
    """

    rows: int
    columns: int
    vectors: int
    winograd: bool = False

    @property
    def tile(self) -> Tile:
        """Columns and vectors, as loop nests take them."""
        return Tile(self.columns, self.vectors)

    def __str__(self) -> str:
        return f"{'winograd ' if self.winograd else ''}{self.rows}x{self.columns} x {self.vectors}"

    @classmethod
    def parse(cls, text: str) -> Choice | None:
        """What :meth:`__str__` writes; None for anything else."""
        found = _CHOICE.fullmatch(text)
        if found is None:
            return None
        rows, columns, vectors = (int(found[name]) for name in ("rows", "columns", "vectors"))
        return cls(rows, columns, vectors, found["winograd"] is not None)


@dataclass(frozen=True, slots=True)
class Nest:
    """A convolution or a product with constant weights on a machine with such registers.

    Attributes:
        dtype: ``"float32"`` or ``"float16"``.
        data: (n, ic, h, w), or (m, k); None for a size known only at run time.
        weights: (oc, ic/groups, kh, kw), or (k, n).
        conv: strides, padding and so on; None for a product.
        plain: whether the convolution reads a plain image, not one in blocks of channels.
        vector_bits: width of a vector register.
        registers: number of vector registers.
    """

    dtype: str
    data: tuple[int | None, ...]
    weights: tuple[int, ...]
    conv: Conv2d | None
    plain: bool
    vector_bits: int
    registers: int

    @classmethod
    def of(
        cls,
        dtype: str,
        data: Sequence[Any],
        weights: Sequence[int],
        conv: Conv2d | None,
        vector_bits: int,
        registers: int,
        *,
        plain: bool = False,
    ) -> Nest:
        """From shapes as a graph has them, symbolic sizes included."""
        sizes = tuple(size if isinstance(size, int) else None for size in data)
        return cls(dtype, sizes, tuple(int(size) for size in weights), conv, plain, vector_bits, registers)

    def __str__(self) -> str:
        words = ["dense" if self.conv is None else "conv", self.dtype]
        if self.conv is not None:
            words.append("plain" if self.plain else "blocked")
        words += ["data", "x".join("?" if size is None else str(size) for size in self.data)]
        words += ["weights", _joined(self.weights)]
        if self.conv is not None:
            words += ["stride", _joined(self.conv.strides), "pad", _joined(self.conv.padding)]
            words += ["dilation", _joined(self.conv.dilation), "groups", str(self.conv.groups)]
        return " ".join([*words, "vector", str(self.vector_bits), "registers", str(self.registers)])

    @classmethod
    def parse(cls, text: str) -> Nest | None:
        """What :meth:`__str__` writes; None for anything else."""
        found = _WORDS.fullmatch(text)
        if found is None:
            return None
        conv: Conv2d | None = None
        if found["stride"] is not None:
            stride, pad, dilation = (cast(Any, _sizes(found[name])) for name in ("stride", "pad", "dilation"))
            conv = Conv2d(stride, pad, dilation, int(found["groups"]))
        data = tuple(None if size == "?" else int(size) for size in found["data"].split("x"))
        weights, bits, registers = _sizes(found["weights"]), int(found["vector"]), int(found["registers"])
        nest = cls(found["dtype"], data, weights, conv, found["layout"] == "plain", bits, registers)
        return nest if nest._makes_sense() and str(nest) == text else None

    def _makes_sense(self) -> bool:
        ranks = len(self.data), len(self.weights)
        if self.conv is None:
            return ranks == (2, 2)
        groups, strides, dilation = self.conv.groups, self.conv.strides, self.conv.dilation
        if ranks != (4, 4) or min(groups, *strides, *dilation) < 1 or self.weights[0] % groups:
            return False
        return all(size is None or size >= 1 for size in self.output)

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return max(1, self.vector_bits // (32 if self.dtype == "float32" else 16))

    @property
    def depth(self) -> int:
        """Steps of the reduction of the direct form."""
        return self.weights[0] if self.conv is None else self.weights[1] * self.weights[2] * self.weights[3]

    @property
    def output(self) -> tuple[int | None, int | None]:
        """Height and width of what comes out; (1, rows) of a product."""
        if self.conv is None:
            return 1, self.data[0]
        _, _, height, width = self.data
        if height is None or width is None:
            return None, None
        down, across = self.conv.output(height, width, (self.weights[2], self.weights[3]))
        return down, across

    @property
    def vectors(self) -> int:
        """Vectors of output channels, of one group."""
        columns = self.weights[1] if self.conv is None else self.weights[0] // self.conv.groups
        return ceil_div(columns, self.lanes)

    @property
    def winograd_possible(self) -> bool:
        """Whether Winograd's algorithm applies."""
        return (
            self.conv is not None
            and not self.plain
            and self.dtype == "float32"
            and winograd.possible(self.conv, self.weights, self.output, self.lanes)
        )

    def problem(self, choice: Choice) -> str:
        """Why ``choice`` can't be made here; "" if it can."""
        rows, columns, vectors = choice.rows, choice.columns, choice.vectors
        if not Room(self.registers).holds(rows * columns, vectors):
            needed = rows * columns * vectors + vectors + 1
            return f"needs {needed} vector registers, there are {self.registers}"
        if rows * columns > MAX_ROWS:
            return f"has {rows * columns} single values, at most {MAX_ROWS} are allowed"
        if vectors > min(self.vectors, MAX_VECTORS):
            return f"has {vectors} vectors, at most {min(self.vectors, MAX_VECTORS)} are allowed"
        if choice.winograd:
            return self._winograd_problem(rows)
        height, width = self.output
        if rows > 1 and (self.conv is None or height is None or height % rows):
            return f"has {rows} image rows, which must divide the output's height"
        if width is not None and columns > width:
            return f"has {columns} columns, the output has {width}"
        if self.conv is not None and self.conv.groups > 1 and self.vectors % vectors:
            return f"has {vectors} vectors, which must divide the {self.vectors} of a group"
        return ""

    def _winograd_problem(self, rows: int) -> str:
        if not self.winograd_possible:
            return "takes Winograd's algorithm, which does not apply here"
        return "has several rows, Winograd's products have one" if rows > 1 else ""

    def choices(self, *, winograd: bool) -> Iterator[Choice]:
        """All that can be made, by one of the ways."""
        for rows in range(1, MAX_ROWS + 1):
            for columns in range(1, MAX_ROWS // rows + 1):
                for vectors in range(1, MAX_VECTORS + 1):
                    choice = Choice(rows, columns, vectors, winograd)
                    if not self.problem(choice):
                        yield choice


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))
