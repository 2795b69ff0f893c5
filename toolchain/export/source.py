"""What a recipe's ``model.source`` is: an ``nn.Module``, an exported program, or an ONNX file."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.export.quiet import quiet
from toolchain.specs import DimSpec, InputSpec
from toolchain.trace import announce
from toolchain.user_code import UserFunction, load_function

if TYPE_CHECKING:
    import torch

SEED = 0


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model: the options that the export and the reference stage share.

    Attributes:
        source: ``file.py:function``, ``x.pt2`` or ``x.onnx``; paths are relative to the repository's root.
        checkpoint: ``.safetensors`` file or a state dict of ``torch.save``; "" for none.
        example_inputs: ``file.py:function`` returning a tuple or dict of tensors; "" for none.
        inputs, dims: as the recipe declares them; no inputs: taken from the file or the example.
        outputs: names; () for the model's own.
    """

    source: str
    checkpoint: str = ""
    example_inputs: str = ""
    inputs: tuple[InputSpec, ...] = ()
    dims: tuple[DimSpec, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """The loaded source: exactly one of the three is set."""

    module: torch.nn.Module | None = None
    program: torch.export.ExportedProgram | None = None
    onnx: Path | None = None


def load_source(options: ModelOptions, root: Path) -> Source:
    """Load the model, on the CPU, in eval mode, with its checkpoint, from a fixed random seed.

    Raises:
        ToolchainError: BAD_RECIPE for a missing file, function or checkpoint; USER_CODE when the
            user's code raises or returns something else.
    """
    if options.source.rpartition(":")[0].endswith(".py"):
        return _from_function(options, root)
    return _from_file((root / options.source).resolve(), options, options.source)


def _from_function(options: ModelOptions, root: Path) -> Source:
    import torch

    torch.manual_seed(SEED)
    function = load_function(options.source, root, "model.source")
    result = function.call()
    if isinstance(result, Path):
        return _from_file((function.path.parent / result).resolve(), options, f"{options.source} -> {result.name}")
    if isinstance(result, type) and issubclass(result, torch.nn.Module):
        raise _wrong_type(function, f"the class {result.__name__}", "return an instance: call the class")
    if not isinstance(result, torch.nn.Module):
        raise _wrong_type(function, type(result).__name__, "")
    if options.checkpoint:
        from toolchain.export.checkpoint import load_checkpoint

        load_checkpoint(result, root / options.checkpoint, options.checkpoint)
    with quiet():
        return Source(module=result.cpu().eval().requires_grad_(False))


def _wrong_type(function: UserFunction, got: str, hint: str) -> ToolchainError:
    return ToolchainError(
        f"returned {got}; allowed: a torch.nn.Module, or a pathlib.Path of a .pt2 or .onnx file",
        where=f"model.source = {function.reference!r}",
        hint=hint or "return the model from the function",
        code=ExitCode.USER_CODE,
    )


def _from_file(path: Path, options: ModelOptions, shown: str) -> Source:
    where = f"model.source = {shown!r}"
    if path.suffix not in (".pt2", ".onnx"):
        raise _bad(where, f"got a {path.suffix or 'nameless'} file; allowed: file.py:function, .pt2 or .onnx")
    if not path.is_file():
        similar = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise _bad(where, f"the file does not exist{similar}")
    if options.checkpoint:
        raise _bad("model.checkpoint", f"a {path.suffix} file carries its own weights", "remove the checkpoint")
    announce(path)
    if path.suffix == ".onnx":
        return Source(onnx=path)
    return Source(program=_load_program(path, where))


def _load_program(path: Path, where: str) -> torch.export.ExportedProgram:
    import torch

    try:
        with quiet(), _weights_only():
            return torch.export.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())
        if "weights_only" in reason.lower() or "WeightsUnpickler" in reason:
            what, hint = "holds pickled Python objects, which could run code; it was not loaded", ""
        else:
            what, hint = f"can't be read as an exported program: {reason[:200]}", "write it again"
        raise ToolchainError(
            what,
            where=where,
            hint=(hint + " with torch.export.save(program, path)").strip(),
            code=ExitCode.BAD_RECIPE,
            debug=traceback.format_exc(),
        ) from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Within it every ``torch.load`` refuses pickled code: torch.export.load itself falls back to running it."""
    import torch

    original = torch.load

    def load(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **{**keywords, "weights_only": True})

    torch.load = load
    try:
        yield
    finally:
        torch.load = original


def _bad(where: str, what: str, hint: str = "") -> ToolchainError:
    return ToolchainError(what, where=where, hint=hint, code=ExitCode.BAD_RECIPE)
