"""Trials of tuning candidates that go wrong; they run in worker children."""

from __future__ import annotations

import os
import signal
from typing import Any

from toolchain.tvm import tuning


def some_go_wrong(request: dict[str, Any]) -> dict[str, Any]:
    """Of a product's candidates those of one row crash, those of two are stuck, those of three fail; others run."""
    rows = request["choices"][1].partition(" x ")[0]
    if rows == "1x1":
        os.kill(os.getpid(), signal.SIGSEGV)
    if rows == "1x2":
        tuning.prepare({**request, "seconds": 0.2})
        while True:
            pass
    if rows == "1x3":
        raise ValueError("no such thing")
    return tuning.trial({**request, "measure": 0.01})
