"""The original that everything later is compared with: the PyTorch model, or the ONNX file unoptimized."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.export.locate import place_of_error
from toolchain.export.outputs import named_leaves, select
from toolchain.export.quiet import quiet
from toolchain.export.source import ModelOptions, load_source
from toolchain.export.unsound import unsound_weights
from toolchain.specs import DTYPES, InputSpec, Signature
from toolchain.user_code import load_function

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


class NotFiniteError(ToolchainError):
    """An output of the original holds NaN or infinity."""


class Original(Protocol):
    """A model that maps named arrays to named arrays."""

    @property
    def signature(self) -> Signature: ...

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by final name, each finite.

        Raises:
            ToolchainError: EXPORT when the model fails, or an output is not a tensor or not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class TorchOriginal:
    """A PyTorch module with its inputs bound to names.

    Attributes:
        positional: input names passed by position, in the order of the call; the others go by keyword.
        example: arrays of the user's example_inputs, or None.
        program: the exported program that ``module`` came from, or None.
    """

    module: torch.nn.Module
    signature: Signature
    positional: tuple[str, ...]
    outputs: tuple[str, ...]
    root: Path
    example: Arrays | None = None
    program: torch.export.ExportedProgram | None = None

    def arguments(self, inputs: Arrays) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """``(args, kwargs)`` of the call for ``inputs``."""
        import numpy as np
        import torch

        tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in inputs.items()}
        keywords = {name: tensors[name] for name in self.signature.names if name not in self.positional}
        return tuple(tensors[name] for name in self.positional), keywords

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self.run_named(inputs)[1]

    def run_named(self, inputs: Arrays) -> tuple[list[str], dict[str, NDArray[Any]]]:
        """The model's own names of everything that it returns, and what :meth:`run` gives."""
        leaves = self._leaves(inputs)
        names = [name for name, _ in leaves]
        kept = select(names, self.outputs)
        try:
            return names, {name: _checked(leaves[index][1], name) for index, name in kept}
        except NotFiniteError as error:
            if not (unsound := unsound_weights(self.module)):
                raise
            hint = "check the checkpoint, or the code that makes the weights"
            what = f"{unsound}, and so {error.where} is not finite"
            raise ToolchainError(what, where="the model's weights", hint=hint, code=ExitCode.EXPORT) from None

    def _leaves(self, inputs: Arrays) -> list[tuple[str, Any]]:
        import torch

        args, keywords = self.arguments(inputs)
        try:
            with quiet(), torch.no_grad():
                return named_leaves(self.module(*args, **keywords))
        except Exception as error:
            raise self._failure(error, inputs) from error

    def _failure(self, error: Exception, inputs: Arrays) -> ToolchainError:
        place, module = place_of_error(error, self.module, self.root)
        shapes = ", ".join(_described(name, array) for name, array in inputs.items())
        message = " ".join(str(error).split())
        hint = "correct the names, dtypes or shapes in [[model.inputs]], or the model at that line"
        if isinstance(error, IndexError):
            hint = "an index is too large or too small: give low and high (both included) in [[model.inputs]] that fit"
        return ToolchainError(
            f"the model{f', in module {module!r},' if module else ''} fails on its declared inputs ({shapes}): "
            f"{type(error).__name__}: {message[:300]}",
            where=place or "model.source",
            hint=hint,
            code=ExitCode.EXPORT,
            debug=traceback.format_exc(),
        )


@dataclass(frozen=True, slots=True)
class OnnxOriginal:
    """An ONNX file in ONNX Runtime with every graph optimization off."""

    path: Path
    signature: Signature
    outputs: tuple[str, ...]
    session: Any

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        names = [output.name for output in self.session.get_outputs()]
        kept = select(names, self.outputs)
        try:
            results = self.session.run([names[index] for index, _ in kept], dict(inputs))
        except Exception as error:
            message = " ".join(str(error).split())
            raise ToolchainError(
                f"ONNX Runtime fails on its declared inputs: {message[:300]}",
                where=self.path.name,
                hint="correct the shapes and ranges in [[model.inputs]] and [model.dims]",
                code=ExitCode.EXPORT,
                debug=traceback.format_exc(),
            ) from error
        return {name: _finite(array, name) for (_, name), array in zip(kept, results, strict=True)}


def open_original(options: ModelOptions, root: Path) -> TorchOriginal | OnnxOriginal:
    """Load the model of ``options`` and bind its inputs to names.

    Raises:
        ToolchainError: BAD_RECIPE or USER_CODE, as :func:`load_source`; BAD_RECIPE when the declared
            inputs don't fit the model's.
    """
    declared = Signature.of(options.inputs, options.dims)
    source = load_source(options, root)
    if source.onnx is not None:
        from toolchain.export.onnx_source import open_session, resolve_signature

        signature = resolve_signature(source.onnx, declared)
        return OnnxOriginal(source.onnx, signature, options.outputs, open_session(source.onnx))
    if source.program is not None:
        from toolchain.export.program_source import bind_program

        signature, positional = bind_program(source.program, declared)
        with quiet():
            unlifted = source.program.module()
        return TorchOriginal(unlifted, signature, positional, options.outputs, root, None, source.program)
    module = source.module
    assert module is not None
    example = _example(options, module, declared, root) if options.example_inputs else None
    signature = declared if declared.inputs else _derived(example, declared)
    return TorchOriginal(module, signature, _bind(module, signature.names), options.outputs, root, example)


def _bind(module: torch.nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Names to pass by position: all of them when none is a parameter of ``forward``; else those that
    form the beginning of its parameter list, the rest going by keyword.
    """
    parameters = inspect.signature(module.forward).parameters
    kinds = inspect.Parameter
    plain = [n for n, p in parameters.items() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    nameable = [n for n, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    many = any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values())
    anything = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    known = [name for name in names if name in nameable]
    if not known:
        _check_count(names, plain, parameters, many)
        return tuple(names)
    unknown = [name for name in names if name not in nameable]
    if unknown and not anything:
        raise _unfit(f"forward has no parameter {unknown[0]!r}{did_you_mean(unknown[0], nameable)}", parameters)
    needed = [n for n in nameable if parameters[n].default is kinds.empty and n not in names]
    if needed:
        raise _unfit(f"forward needs {needed[0]!r}, which is not declared", parameters)
    leading = []
    for name in plain:
        if name not in names:
            break
        leading.append(name)
    return tuple(leading)


def _check_count(
    names: Sequence[str], plain: Sequence[str], parameters: Mapping[str, inspect.Parameter], many: bool
) -> None:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs_value = [p for p in parameters.values() if p.default is p.empty and p.kind not in variadic]
    required = [p.name for p in needs_value]
    if (len(names) > len(plain) and not many) or len(names) < len(required):
        raise _unfit(f"{len(names)} inputs are declared ({', '.join(names)})", parameters)


def _unfit(what: str, parameters: Mapping[str, inspect.Parameter]) -> ToolchainError:
    shown = str(inspect.Signature(list(parameters.values())))
    return ToolchainError(
        what,
        where="model.inputs",
        hint=f"the model's signature is forward{shown}; name the inputs like its parameters",
        code=ExitCode.BAD_RECIPE,
    )


def _example(options: ModelOptions, module: torch.nn.Module, declared: Signature, root: Path) -> Arrays:
    import torch

    function = load_function(options.example_inputs, root, "model.example_inputs")
    result = function.call()
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, tuple | list):
        names = declared.names or tuple(inspect.signature(module.forward).parameters)
        if len(result) > len(names):
            raise _unfit(f"example_inputs gives {len(result)} tensors", inspect.signature(module.forward).parameters)
        result = dict(zip(names, result, strict=False))
    wrong = (
        next((v for v in result.values() if not hasattr(v, "numpy")), None) if isinstance(result, Mapping) else result
    )
    if wrong is not None or not result:
        raise ToolchainError(
            f"returned {'nothing' if wrong is None else type(wrong).__name__}; allowed: a tuple or dict of tensors",
            where=f"model.example_inputs = {options.example_inputs!r}",
            code=ExitCode.USER_CODE,
        )
    if declared.inputs:
        from toolchain.data import normalise

        return normalise(dict(result), declared, 0).inputs
    return {str(name): value.detach().cpu().numpy() for name, value in result.items()}


def _derived(example: Arrays | None, declared: Signature) -> Signature:
    if example is None:
        raise ToolchainError(
            "a PyTorch model needs declared inputs",
            where="model.inputs",
            hint="add [[model.inputs]] with name, dtype and shape, or model.example_inputs",
            code=ExitCode.BAD_RECIPE,
        )
    specs = [InputSpec(name, str(array.dtype), tuple(array.shape)) for name, array in example.items()]
    return Signature.of(specs, list(declared.dims.values()))


def _checked(leaf: Any, name: str) -> NDArray[Any]:
    import torch

    if not isinstance(leaf, torch.Tensor):
        raise ToolchainError(
            f"is {type(leaf).__name__}; allowed: a tensor",
            where=f"output {name!r}",
            hint="return tensors only, or select outputs with model.outputs",
            code=ExitCode.EXPORT,
        )
    dtype = str(leaf.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ToolchainError(
            f"has dtype {dtype}; allowed: {', '.join(DTYPES)}",
            where=f"output {name!r}",
            hint="convert it in forward, e.g. with .float() or torch.view_as_real",
            code=ExitCode.EXPORT,
        )
    return _finite(leaf.detach().numpy(), name)


def _described(name: str, array: NDArray[Any]) -> str:
    values = f" of {array.min()} to {array.max()}" if array.dtype.kind in "iu" and array.size else ""
    return f"{name} {array.dtype}{list(array.shape)}{values}"


def _finite(array: NDArray[Any], name: str) -> NDArray[Any]:
    import numpy as np

    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise NotFiniteError(
            f"the original's output holds NaN or infinity ({bad} of {array.size} values)",
            where=f"output {name!r}",
            hint="check the checkpoint, and divisions and logarithms in the model",
            code=ExitCode.EXPORT,
        )
    return array
