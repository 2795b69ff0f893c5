"""Weights from a file into a module: safetensors, or a plain state dict; never a pickle that runs code."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.export.quiet import quiet
from toolchain.trace import announce

if TYPE_CHECKING:
    import torch

_SHOWN = 5
_NESTED = ("state_dict", "model_state_dict", "model")


def load_checkpoint(module: torch.nn.Module, path: Path, shown: str) -> None:
    """Load ``path`` into ``module``; every key and every shape must match.

    Raises:
        ToolchainError: BAD_RECIPE when the file is missing, unreadable, holds pickled code (which is
            not run), or does not fit the module; the first few differences are listed.
    """
    where = f"model.checkpoint = {shown!r}"
    if not path.is_file():
        similar = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise ToolchainError(f"the file does not exist{similar}", where=where, code=ExitCode.BAD_RECIPE)
    try:
        with open(path, "rb"):
            pass
    except PermissionError as error:
        hint = f"let this user read it: chmod u+r {path}"
        raise ToolchainError("this file may not be read", where=where, hint=hint, code=ExitCode.BAD_RECIPE) from error
    state = _read_safetensors(path, where) if path.suffix == ".safetensors" else _read_state_dict(path, where)
    _check_fit(module, state, where)
    module.load_state_dict(dict(state), strict=True)


def _read_safetensors(path: Path, where: str) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    announce(path)
    try:
        return load_file(path)
    except Exception as error:
        raise _unreadable(where, "safetensors file", error) from error


def _read_state_dict(path: Path, where: str) -> Mapping[str, torch.Tensor]:
    import torch

    announce(path)
    try:
        with quiet():
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        names = f"refers to Python code ({found.group(1)})" if found else "holds more than plain tensors, or is damaged"
        raise ToolchainError(
            f"the pickle {names}; loading it could run code, so it was not loaded",
            where=where,
            hint="save the weights alone: safetensors.torch.save_file(model.state_dict(), 'x.safetensors')",
            code=ExitCode.BAD_RECIPE,
            debug=traceback.format_exc(),
        ) from error
    except Exception as error:
        raise _unreadable(where, "state dict", error) from error
    for key in _NESTED:
        # Training scripts commonly wrap the state dict in a dict with the epoch and the optimizer.
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ToolchainError(
            f"holds {type(data).__name__}; allowed: a state dict (a dict of tensors)",
            where=where,
            hint="torch.save(model.state_dict(), path)",
            code=ExitCode.BAD_RECIPE,
        )
    return data


def _check_fit(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    details = [*_listed("missing", missing), *_listed("unexpected", unexpected), *_listed("shape differs", shapes)]
    if not details:
        return
    prefixed = unexpected and all(key.startswith("module.") for key in state)
    raise ToolchainError(
        f"does not fit the model: {len(missing)} keys missing, {len(unexpected)} unexpected, "
        f"{len(shapes)} with another shape",
        where=where,
        details=details,
        hint="the keys start with 'module.': save model.module.state_dict() of the DataParallel model"
        if prefixed
        else "build the model with the settings that it was trained with",
        code=ExitCode.BAD_RECIPE,
    )


def _listed(title: str, items: list[str]) -> list[str]:
    more = [f"{title}: ... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [f"{title}: {item}" for item in items[:_SHOWN]] + more


def _unreadable(where: str, kind: str, error: Exception) -> ToolchainError:
    reason = " ".join(str(error).split())
    return ToolchainError(
        f"can't be read as a {kind} (truncated or another format?): {type(error).__name__}: {reason[:160]}",
        where=where,
        hint="copy or save the file again",
        code=ExitCode.BAD_RECIPE,
        debug=traceback.format_exc(),
    )
