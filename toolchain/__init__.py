"""The public Python API of toolchain: a PyTorch model and a recipe in, verified bundles out."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from toolchain.version import __version__

if TYPE_CHECKING:
    from toolchain.build import BuildResult, build, plan
    from toolchain.errors import ExitCode, ToolchainError
    from toolchain.recipe import Recipe, load_recipe
    from toolchain.runtime import Model, load
    from toolchain.target import TargetProfile, load_target

__all__ = [
    "BuildResult",
    "ExitCode",
    "Model",
    "Recipe",
    "TargetProfile",
    "ToolchainError",
    "__version__",
    "build",
    "load",
    "load_recipe",
    "load_target",
    "plan",
]

# ONNX Runtime notes in the user's folders, for its makers, what runs; whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "BuildResult": "toolchain.build",
    "build": "toolchain.build",
    "plan": "toolchain.build",
    "ExitCode": "toolchain.errors",
    "ToolchainError": "toolchain.errors",
    "Recipe": "toolchain.recipe",
    "load_recipe": "toolchain.recipe",
    "Model": "toolchain.runtime",
    "load": "toolchain.runtime",
    "TargetProfile": "toolchain.target",
    "load_target": "toolchain.target",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import toolchain` and the command line stay quick.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'toolchain' has no attribute {name!r}")


class _Function:
    """A function of this package that has the name of a module in it: importing the module would hide it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, package: ModuleType, _kind: type) -> Any:
        return __getattr__(self._name)

    def __set__(self, package: ModuleType, module: ModuleType) -> None:
        """Python binds an imported module to its package; ``toolchain.build`` stays the function."""


class _Package(ModuleType):
    build = _Function("build")
    plan = _Function("plan")


sys.modules[__name__].__class__ = _Package
