"""The plan in C: tables that describe the model, and a function that calls the kernels in order.

What it refers to is declared in ``toolchain/runtime/edge/src/engine.h``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from toolchain.tvm.aot.arena import Placed, place, place_guests
from toolchain.tvm.aot.kernels import PREFIX
from toolchain.tvm.aot.program import Call, Program, Tensor, Value
from toolchain.tvm.aot.sizes import Expression

_DTYPES = {
    "bool": "TC_BOOL",
    **{f"{kind}{bits}": f"TC_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TC_FLOAT{bits}" for bits in (16, 32, 64)},
}


def plan_text(
    program: Program,
    kernels: Mapping[str, Sequence[str]],
    weights: Sequence[int],
    weight_bytes: int,
    limits: Mapping[str, tuple[int, int | None]],
    workspaces: Mapping[str, int],
) -> tuple[str, int | None]:
    """The C source of ``program``'s plan, and its arena in bytes (None: it depends on the dimensions).

    Args:
        program: what runs.
        kernels: kernel -> C types of its parameters.
        weights: offset of each weight from the symbol ``tc_weights``.
        weight_bytes: bytes of all weights.
        limits: dimension -> least and largest size (None: no limit).
        workspaces: kernel -> bytes that it works in on one thread; at static sizes they lie in the arena too.
    """
    arena = None
    works: dict[int, tuple[int, int]] = {}
    parts = ['#include "engine.h"\n', _prototypes(program, kernels), _tensors("inputs", program.inputs)]
    parts += [_tensors("outputs", program.outputs), _dims(program, limits), _sizes(program)]
    if program.static:
        lives = [(buffer.first, buffer.last) for buffer in program.buffers]
        sizes = [int(buffer.size) for buffer in program.buffers]
        steps = [step for step, call in enumerate(program.calls) if call.kernel in workspaces]
        sizes += [workspaces[program.calls[step].kernel] for step in steps]
        lives += [(step, step) for step in steps]
        offsets, arena = place(sizes, lives)
        count = len(program.buffers)
        works = dict(zip(steps, zip(offsets[count:], sizes[count:], strict=True), strict=True))
        parts.append(_input_places(program, list(zip(offsets, sizes, lives, strict=True)), arena))
    else:
        offsets = []
        parts.append(_lives(program))
    parts += [_run(program, kernels, weights, offsets, works), _model(program, weight_bytes, arena)]
    return "\n".join(part for part in parts if part), arena


def _prototypes(program: Program, kernels: Mapping[str, Sequence[str]]) -> str:
    used = sorted({call.kernel for call in program.calls if call.kernel})
    return "".join(f"int32_t {PREFIX}{name}({', '.join(kernels[name])});\n" for name in used)


def _tensors(table: str, tensors: Sequence[Tensor]) -> str:
    lines = []
    for index, tensor in enumerate(tensors):
        sizes = ", ".join(_axis(size) for size in tensor.shape) or "0"
        lines.append(f"static const int64_t {table}_shape_{index}[] = {{{sizes}}};")
    lines.append(f"static const tc_tensor {table}[] = {{")
    for index, tensor in enumerate(tensors):
        name, rank = _quoted(tensor.name), len(tensor.shape)
        lines.append(f"  {{{name}, {_DTYPES[tensor.dtype]}, {rank}, {table}_shape_{index}}},")
    return "\n".join([*lines, "};", ""])


def _axis(size: Expression) -> str:
    if isinstance(size, int):
        return f"INT64_C({size})"
    return f"-{int(size[1:]) + 1}" if re.fullmatch(r"d\d+", size) else "TC_COMPUTED"


def _quoted(text: str) -> str:
    """A C string literal: JSON's escapes, without those that C lacks."""
    plain = text.encode()
    if all(32 <= byte < 127 for byte in plain):
        return json.dumps(text)
    return '"' + "".join(f"\\{byte:03o}" for byte in plain) + '"'


def _dims(program: Program, limits: Mapping[str, tuple[int, int | None]]) -> str:
    if program.static:
        return ""
    lines = ["static const tc_dim dims[] = {"]
    for name in program.dims:
        least, most = limits.get(name, (1, None))
        lines.append(f"  {{{_quoted(name)}, {least}, {'INT64_MAX' if most is None else f'INT64_C({most})'}}},")
    return "\n".join([*lines, "};", ""])


def _declare(program: Program, expressions: Sequence[Expression]) -> list[str]:
    """Declarations of the dimensions that ``expressions`` use."""
    text = " ".join(e for e in expressions if isinstance(e, str))
    used = sorted({int(number) for number in re.findall(r"\bd(\d+)\b", text)})
    return [f"  const int64_t d{number} = d[{number}];" for number in used]


def _sizes(program: Program) -> str:
    """What depends on the dimensions: bytes of inputs, outputs and buffers, and outputs' shapes."""
    lines = []
    groups = {
        "input_bytes": [tensor.size for tensor in program.inputs],
        "output_bytes": [tensor.size for tensor in program.outputs],
        "buffer_bytes": [buffer.size for buffer in program.buffers],
    }
    for name, sizes in groups.items():
        lines.append(f"static void {name}(const int64_t *d, uint64_t *bytes) {{")
        lines += _declare(program, sizes)
        if not any(isinstance(size, str) for size in sizes):
            lines.append("  (void)d;")
        lines += [f"  bytes[{i}] = (uint64_t)({_c(size)});" for i, size in enumerate(sizes)] or ["  (void)bytes;"]
        lines += ["}", ""]
    shapes = [size for tensor in program.outputs for size in tensor.shape]
    lines.append("static void output_shape(uint32_t output, const int64_t *d, int64_t *shape) {")
    lines += _declare(program, shapes)
    if not any(isinstance(size, str) for size in shapes):
        lines.append("  (void)d;")
    lines.append("  switch (output) {")
    for index, tensor in enumerate(program.outputs):
        stores = " ".join(f"shape[{axis}] = {_c(size)};" for axis, size in enumerate(tensor.shape)) or "(void)shape;"
        lines.append(f"    case {index}: {stores} break;")
    return "\n".join([*lines, "    default: break;", "  }", "}", ""])


def _c(size: Expression) -> str:
    return f"INT64_C({size})" if isinstance(size, int) else size


def _lives(program: Program) -> str:
    first = ", ".join(str(buffer.first) for buffer in program.buffers) or "0"
    last = ", ".join(str(buffer.last) for buffer in program.buffers) or "0"
    return f"static const uint32_t first[] = {{{first}}};\nstatic const uint32_t last[] = {{{last}}};\n"


def _input_places(program: Program, placed: Sequence[Placed], arena: int) -> str:
    """Where in the arena a caller may leave each input until the last kernel that reads it."""
    last = [0] * len(program.inputs)
    for step, call in enumerate(program.calls):
        for argument in call.arguments:
            if isinstance(argument, Value) and argument.place == "input":
                last[argument.index] = step
    guests = [(int(tensor.size), (0, end)) for tensor, end in zip(program.inputs, last, strict=True)]
    places = ["TC_NO_PLACE" if place is None else str(place) for place in place_guests(guests, placed, arena)]
    return f"static const uint64_t input_places[] = {{{', '.join(places) or '0'}}};\n"


def _run(
    program: Program,
    kernels: Mapping[str, Sequence[str]],
    weights: Sequence[int],
    offsets: Sequence[int],
    works: Mapping[int, tuple[int, int]],
) -> str:
    lines = ["static int32_t run(const tc_frame *f) {"]
    every = [a for call in program.calls for a in call.arguments if not isinstance(a, Value)]
    declared = _declare(program, every)
    lines += [line.replace("d[", "f->dims[") for line in declared]
    for index, call in enumerate(program.calls):
        step = _step(call, kernels, weights, offsets if program.static else None)
        if index in works:
            offset, size = works[index]
            step = f"  tc_threads_workspace(TC_ARENA({offset}), {size});\n{step}\n  tc_threads_workspace(NULL, 0);"
        lines.append(step)
    return "\n".join([*lines, "  return 0;", "}", ""])


def _step(
    call: Call, kernels: Mapping[str, Sequence[str]], weights: Sequence[int], offsets: Sequence[int] | None
) -> str:
    given = [_pointer(a, weights, offsets) if isinstance(a, Value) else a for a in call.arguments]
    if not call.kernel:
        source, target, size = given
        return f"  memcpy({target}, {source}, (size_t)({_c(size)}));"
    types = kernels[call.kernel]
    if len(types) != len(given):
        raise AssertionError(f"{call.kernel} takes {len(types)} arguments, its call gives {len(given)}")
    texts = [
        str(value) if type_ == "void *" else f"({type_})({_c(value)})"
        for type_, value in zip(types, given, strict=True)
    ]
    return f"  if ({PREFIX}{call.kernel}({', '.join(texts)})) return 1;"


def _pointer(value: Value, weights: Sequence[int], offsets: Sequence[int] | None) -> str:
    if value.place == "input":
        return f"TC_INPUT({value.index})"
    if value.place == "output":
        return f"TC_OUTPUT({value.index})"
    if value.place == "weight":
        return f"TC_WEIGHT({weights[value.index]})"
    return f"TC_BUFFER({value.index})" if offsets is None else f"TC_ARENA({offsets[value.index]})"


def _model(program: Program, weight_bytes: int, arena: int | None) -> str:
    dims = "NULL" if program.static else "dims"
    lives = "NULL, NULL" if program.static else "first, last"
    places = "input_places" if program.static else "NULL"
    return "\n".join(
        [
            "const tc_plan tc_the_plan = {",
            f"  {len(program.inputs)}, {len(program.outputs)}, {len(program.dims)}, {len(program.buffers)},",
            f"  inputs, outputs, {dims}, {lives},",
            f"  UINT64_C({weight_bytes}), UINT64_C({arena or 0}), {int(program.static)},",
            f"  input_bytes, output_bytes, buffer_bytes, output_shape, run, {places},",
            "};",
            "",
        ]
    )
