"""The public Python API of toolchain: a PyTorch model and a recipe in, verified bundles out."""

from __future__ import annotations

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
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'toolchain' has no attribute {name!r}")
