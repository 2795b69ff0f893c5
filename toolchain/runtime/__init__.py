"""Loads and runs bundles; needs numpy and the engine's own runtime, never torch, onnx or a compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.runtime.contract import Contract, parse_contract
    from toolchain.runtime.engine import Engine, open_engine
    from toolchain.runtime.inputs import read_inputs
    from toolchain.runtime.model import Model, load
    from toolchain.runtime.selftest import SelfTest, run_selftest

__all__ = [
    "Contract",
    "Engine",
    "Model",
    "SelfTest",
    "load",
    "open_engine",
    "parse_contract",
    "read_inputs",
    "run_selftest",
]

_HOME = {
    "Contract": "contract",
    "parse_contract": "contract",
    "Engine": "engine",
    "open_engine": "engine",
    "read_inputs": "inputs",
    "Model": "model",
    "load": "model",
    "SelfTest": "selftest",
    "run_selftest": "selftest",
}


def __getattr__(name: str) -> Any:
    # Lazy: whoever needs the contract alone does not pay for the rest.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
