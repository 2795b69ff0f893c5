"""Converters of ONNX operators to Relax that TVM lacks or has wrong; each module's ``CONVERTERS`` lists its own.

They stand beside TVM's own importer, which does the rest; a model's node asks here first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

from toolchain.tvm.operators.node import Converter, OpNode, Unsupported

MODULES = (
    "control",
    "elementwise",
    "integer",
    "normalization",
    "product",
    "recurrent",
    "reduction",
    "resize",
    "shaping",
    "window",
)


@functools.cache
def converters() -> Mapping[str, Converter]:
    """Operator -> its converter; operators outside the default domain are named ``domain.Operator``."""
    table: dict[str, Converter] = {}
    for name in MODULES:
        module = importlib.import_module(f"toolchain.tvm.operators.{name}")
        both = table.keys() & module.CONVERTERS.keys()
        assert not both, f"two converters for {sorted(both)}"
        table.update(module.CONVERTERS)
    return table


__all__ = ["Converter", "OpNode", "Unsupported", "converters"]
