"""Operators as loop nests of our own, each marked with the schedule rule that was made for it.

The mark is a block annotation, :data:`RULE`, with the tile's sizes beside it: annotations survive fusion, where
names and attributes of functions do not.
"""

from __future__ import annotations

RULE = "toolchain.rule"
ROWS = "toolchain.rows"
"""Image rows of a tile."""
COLUMNS = "toolchain.columns"
"""Single values (pixels of an image row, rows of a matrix) of a tile."""
VECTORS = "toolchain.vectors"
"""Vectors of output channels or matrix columns of a tile."""

REDUCTION = 3
"""TVM's ``kCommReduce``: element-wise work may be fused before it."""
OUT_FUSIBLE = 4
"""TVM's ``kOutEWiseFusable``: element-wise work may be fused after it."""
OPAQUE = 8
"""TVM's ``kOpaque``: nothing is fused with it."""
