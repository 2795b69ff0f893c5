"""Triton's classification extension: the highest values of an output, as ``"value:index[:label]"``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from toolchain.runtime.server.datatypes import invalid


def classify(name: str, array: np.ndarray, classes: int, labels: Sequence[str] = (), *, batched: bool) -> np.ndarray:
    """The ``classes`` highest values of each row.

    Args:
        name: of the output, for messages.
        array: the output; its first axis is the batch where ``batched``.
        classes: how many, at most as many as a row has.
        labels: names of the positions; may be shorter or empty.
        batched: whether rows are classified one by one.

    Returns:
        A BYTES tensor, shape [rows, classes] where ``batched``, else [classes].

    Raises:
        ServeError: INVALID, the output is BYTES.
    """
    if array.dtype.hasobject:
        invalid(f"output {name!r} is BYTES and can't be classified")
    rows = array.reshape(len(array) if batched else 1, -1) if array.size else array.reshape(len(array), 0)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, : min(classes, rows.shape[1])]
    result = np.empty(best.shape, np.object_)
    for row, indices in enumerate(best.tolist()):
        for column, index in enumerate(indices):
            text = f"{rows[row, index]:f}" if rows.dtype.kind == "f" else str(rows[row, index])
            label = f":{labels[index]}" if index < len(labels) else ""
            result[row, column] = f"{text}:{index}{label}".encode()
    return result if batched else result[0]
