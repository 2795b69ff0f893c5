"""Kernels as plain C functions: pointers and sizes in, a status out, and nothing of TVM's calling convention.

TVM's own convention (packed arguments, tensor headers, checks at every call) belongs to a run-time that finds
functions by name.  A plan knows every pointer and size, so its kernels take them as they are.
"""

from __future__ import annotations

from typing import Any

from toolchain.tvm.aot.arena import ALIGNMENT
from toolchain.tvm.aot.program import free_sizes
from toolchain.tvm.intrinsics import dot_products
from toolchain.tvm.library import Refusal, load_tvm, one_line
from toolchain.tvm.lookups import vector_lookups
from toolchain.tvm.machine import Machine
from toolchain.tvm.nan_order import nan_order
from toolchain.tvm.stack import stack_locals

PREFIX = "tck_"
"""Put before kernels' names, some of which are those of C functions ("exp")."""

_NOT_PACKED = ["tirx.MakePackedAPI", "tirx.FP8StorageLegalize", "tirx.BF16StorageLegalize"]
_CPU = 1
_ALLOCATES = "tirx.TVMBackendAllocWorkspace"


def kernels_object(module: Any, machine: Machine) -> tuple[bytes, Any]:
    """Machine code of every loop nest in ``module``.

    Args:
        module: an IRModule after the pipeline's phase ``dataflow``.
        machine: the target.

    Returns:
        The object file, and the module that code was generated from.

    Raises:
        Refusal: code generation failed.
    """
    tvm = load_tvm()
    target = machine.code_target()
    kernels = tvm.IRModule({v: f for v, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)})
    try:
        kernels = tvm.tirx.transform.BindTarget(tvm.target.Target(target).with_host(target))(kernels)
        passes, finalize, _device = tvm.tirx.get_tir_pipeline("default")
        with tvm.transform.PassContext(opt_level=3, disabled_pass=_NOT_PACKED):
            kernels = passes(kernels)
        kernels = stack_locals()(_plain_functions(kernels))
        kernels = vector_lookups(machine.lookup())(dot_products(machine.dot())(kernels))
        kernels = nan_order(machine.arch)(finalize()(kernels))
        # Without the attribute calls of the run-time go through pointers that a loader of TVM's would fill in.
        kernels = kernels.with_attr("system_lib_prefix", PREFIX)
        return _object_bytes(tvm.get_global_func("target.build.llvm")(kernels, target)), kernels
    except Exception as error:
        raise Refusal(f"TVM's code generation failed: {one_line(error)}") from error


def _object_bytes(module: Any) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="toolchain-kernels-") as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def _plain_functions(module: Any) -> Any:
    tvm = load_tvm()
    return tvm.IRModule({variable: _plain(variable.name_hint, f) for variable, f in module.functions_items()})


def _plain(name: str, function: Any) -> Any:
    """``function`` with a pointer for each buffer, its free sizes as further parameters, and a status."""
    import tvm_ffi

    tvm = load_tvm()
    tirx = tvm.tirx
    pointers = {p: _pointer(p) for p in function.params if hasattr(p.ty, "shape")}
    sizes = [function.params[parameter].ty.shape[axis] for parameter, axis in free_sizes(function)]

    def data_of(call: Any) -> Any:
        if getattr(call.op, "name", "") == "tirx.buffer_data":
            return pointers.get(call.args[0], call)
        return call

    # Parameters that may lie anywhere in a larger tensor begin at its start here.
    starts = [p.ty.elem_offset for p in pointers if isinstance(p.ty.elem_offset, tvm.ir.Var)]

    def start_of(variable: Any) -> Any:
        return tirx.const(0, str(variable.ty.dtype)) if variable in starts else variable

    body = tvm_ffi.structural_map(function.body, (tvm.ir.Call, data_of))
    if starts:
        body = tvm_ffi.structural_map(body, (tvm.ir.Var, start_of))
    for key, value in (("device_id", 0), ("device_type", _CPU)):
        body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
    body = tirx.SeqStmt([body, tirx.Return(tirx.const(0, "int32"))])
    parameters = [pointers.get(p, p) for p in function.params] + sizes
    plain = tirx.PrimFunc(parameters, body, tvm.ir.PrimType("int32"), function.attrs)
    return plain.with_attr("global_symbol", PREFIX + name)


def _pointer(parameter: Any) -> Any:
    tvm = load_tvm()
    return tvm.tirx.Var(parameter.name, tvm.ir.PointerType(parameter.ty.dtype, parameter.ty.storage_scope))


def workspaces(module: Any) -> dict[str, int]:
    """Kernel -> bytes that it works in on one thread, beside its arguments; none where that depends on sizes.

    Args:
        module: the second of :func:`kernels_object`'s results.
    """
    return {variable.name_hint: total for variable, f in module.functions_items() if (total := _allocated(f.body))}


def _allocated(body: Any) -> int:
    import tvm_ffi

    tvm = load_tvm()
    sizes: list[Any] = []

    def look(call: Any) -> Any:
        if getattr(call.op, "name", "") == _ALLOCATES:
            sizes.append(call.args[2])
        return call

    tvm_ffi.structural_map(body, (tvm.ir.Call, look))
    if not all(isinstance(size, tvm.tirx.IntImm) for size in sizes):
        return 0
    return sum(-(-int(size.value) // ALIGNMENT) * ALIGNMENT for size in sizes)


def scalar_types(module: Any) -> dict[str, tuple[str, ...]]:
    """Kernel -> the C type of each parameter: ``void *`` for a pointer, else ``int64_t`` or ``int32_t``.

    Args:
        module: the second of :func:`kernels_object`'s results.
    """
    tvm = load_tvm()
    types = {}
    for variable, function in module.functions_items():
        kinds = []
        for parameter in function.params:
            pointer = isinstance(parameter.ty, tvm.ir.PointerType)
            kinds.append("void *" if pointer else f"{parameter.ty.dtype}_t")
        types[variable.name_hint] = tuple(kinds)
    return types
