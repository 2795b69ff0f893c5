"""Loading TVM without torch, and the one exception with which this package declines a model."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any


class Refusal(Exception):  # noqa: N818 - not an error: a result that the stage reports
    """TVM has nothing to offer for this model; the message is one line for the report."""


class Mismatch(Refusal):
    """What TVM made runs, and computes something else than ONNX Runtime."""


def load_tvm() -> Any:
    """The ``tvm`` package.

    tvm_ffi imports torch when it finds it, which costs two seconds and 200 MB and gives nothing here, so
    torch is hidden while TVM is imported.
    """
    if "tvm.relax.frontend.onnx" not in sys.modules:
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            with warnings.catch_warnings():
                # Deprecations inside TVM's own modules are none of the caller's.
                warnings.simplefilter("ignore")
                import tvm.relax.frontend.onnx
        finally:
            if hidden:
                del sys.modules["torch"]
    import tvm

    _load_extra()
    _without_type_checks()

    return tvm


@functools.cache
def _load_extra() -> None:
    """TVM's sorting and random numbers, which it loads with the device backends that our workers do without."""
    import ctypes
    from pathlib import Path

    import tvm_ffi
    from tvm.base import _LOADED_LIBS

    extra = Path(_LOADED_LIBS["tvm_runtime"]._name).resolve().with_name("libtvm_runtime_extra.so")
    if tvm_ffi.get_global_func("tvm.contrib.sort.sort", allow_missing=True) is None and extra.is_file():
        ctypes.CDLL(str(extra))


@functools.cache
def _without_type_checks() -> None:
    """Schedule's methods as they are under the decorator that checks each argument against its annotation.

    The checks take longer than the methods; what they would find, mypy and the compiler's own checks find too.
    """
    from tvm.s_tir.schedule import Schedule

    for name, method in vars(Schedule).items():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and method.__module__ == plain.__module__ == Schedule.__module__:
            setattr(Schedule, name, plain)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The last non-empty line of an exception's text: TVM puts its stack before its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:limit]
