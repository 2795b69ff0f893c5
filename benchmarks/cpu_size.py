"""Sizes of code and weights."""

from __future__ import annotations

import struct
from pathlib import Path


def text_bytes(library: Path) -> int:
    """Bytes of machine code: the .text section of a 64-bit little-endian ELF file."""
    data = library.read_bytes()
    table, (size, count, names_at) = struct.unpack_from("<Q", data, 0x28)[0], struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        if data[start : data.index(b"\0", start)] == b".text":
            return int(header[5])
    raise ValueError(f"{library} has no .text section")


def onnx_facts(path: Path) -> dict[str, int]:
    """``nodes`` of the graph, and ``weight_bytes`` of all initializers."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    return {
        "nodes": len(graph.node),
        "weight_bytes": sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer),
    }
