"""Chooses the layout of images for the whole graph: channels in blocks of a vector, (n, c/v, h, w, v).

Convolutions produce blocked values; element-wise work, pooling, concatenation and averages keep them blocked;
whatever else reads one gets it in the plain layout.  Every blocked value has its plain twin in the graph, made
from it by an explicit change of layout: those that nothing reads are dropped as dead code, so changes of layout
remain only at the edges.  A plain image goes into its first convolution as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.blocked_float import Convolutions
from toolchain.tvm.graph.blocked_int8 import conv2d_blocked
from toolchain.tvm.graph.rewrite import Graph, graph_pass
from toolchain.tvm.graph.transposed import phases
from toolchain.tvm.graph.values import constant_of, dtype_of, ints, operator_of, shape_of
from toolchain.tvm.loops import OUT_FUSIBLE
from toolchain.tvm.loops.conv import Conv2d
from toolchain.tvm.loops.pool import max_pool2d, max_pool_fits
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import ceil_div

if TYPE_CHECKING:
    import numpy as np

FINITE_UNARY = frozenset({
    "relax.nn.relu", "relax.nn.relu6", "relax.nn.leakyrelu", "relax.nn.silu", "relax.nn.gelu", "relax.nn.gelu_tanh",
    "relax.sigmoid", "relax.tanh", "relax.clip", "relax.negative", "relax.abs", "relax.erf", "relax.round",
    "relax.floor", "relax.ceil", "relax.sin", "relax.cos",
})  # fmt: skip
"""Element-wise operators that give a finite value for a finite one.

The lanes beyond the last channel hold such values; the weights that meet them are zero, which an infinity would
turn into NaN.
"""
ANY_UNARY = FINITE_UNARY | {"relax.exp", "relax.log", "relax.sqrt", "relax.rsqrt", "relax.astype", "relax.nn.softplus"}
FINITE_BINARY = frozenset({"relax.add", "relax.subtract", "relax.multiply", "relax.maximum", "relax.minimum"})
ANY_BINARY = FINITE_BINARY | {"relax.divide", "relax.power"}


@dataclass(frozen=True, slots=True)
class Blocked:
    """A value in blocked layout: the variable, and how many of its lanes are channels."""

    value: Any
    channels: int

    @property
    def lanes(self) -> int:
        return int(shape_of(self.value)[-1])  # type: ignore[index]

    @property
    def ragged(self) -> bool:
        """Whether lanes beyond the last channel exist."""
        return self.channels % self.lanes != 0


def block_layouts(machine: Machine) -> Any:
    """The pass."""
    return graph_pass("block_layouts", lambda: _Layouts(machine))


class _Layouts:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._blocked: dict[Any, Blocked] = {}
        self._float = Convolutions(
            machine, lambda graph, v, lanes: self._block(graph, v, lanes).value, lambda v: v in self._blocked
        )

    def value(self, graph: Graph, _variable: Any, value: Any) -> Any:
        made = self._rule(graph, value)
        if made is None:
            return value
        if not isinstance(made, Blocked):
            return made
        twin = graph.emit(_to_plain(made))
        self._blocked[twin] = made
        return twin

    def _rule(self, graph: Graph, value: Any) -> Any:
        name = operator_of(value)
        if name == "relax.nn.conv2d":
            return self._conv2d(graph, value)
        if name == "relax.nn.conv2d_transpose":
            return self._transposed(graph, value)
        if name in ANY_UNARY:
            return self._unary(graph, value, name)
        if name in ANY_BINARY:
            return self._binary(graph, value, name)
        if name in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"):
            return self._pool(graph, value)
        if name in ("relax.mean", "relax.max", "relax.sum"):
            return self._reduce(graph, value, name)
        if name == "relax.concat":
            return self._concat(graph, value)
        if name in ("relax.reshape", "relax.nn.batch_flatten", "relax.flatten", "relax.squeeze"):
            return self._vector(graph, value)
        return None

    def _conv2d(self, graph: Graph, call: Any) -> Any:
        """Blocked, or plain where there are few output channels; None if it can't be."""
        attrs, weights = call.attrs, constant_of(graph.definition(call.args[1]))
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
        dtype = dtype_of(call.args[0])
        if layouts != ("NCHW", "OIHW", "NCHW") or weights is None:
            return None
        conv = _sizes(attrs)
        if dtype in ("int8", "uint8"):
            made = conv2d_blocked(graph, call, conv, self._machine, lambda v, lanes: self._block(graph, v, lanes).value)
            return None if made is None else Blocked(made, weights.shape[0])
        plain = self._float.few(graph, call.args[0], conv, weights)
        if plain is not None:
            return plain
        made = self._float.emit(graph, call.args[0], conv, weights)
        return None if made is None else Blocked(made, weights.shape[0])

    def _transposed(self, graph: Graph, call: Any) -> Blocked | None:
        """All phases in one convolution, whose blocks of channels then become pixels."""
        from tvm import relax

        weights, dtype = constant_of(graph.definition(call.args[1])), dtype_of(call.args[0])
        shape = shape_of(call.args[0])
        if weights is None or shape is None or dtype not in ("float32", "float16"):
            return None
        lanes = self._machine.lanes(dtype)
        form = phases(call.attrs, weights, lanes)
        made = None if form is None else self._float.emit(graph, call.args[0], form.conv, form.weights)
        if form is None or made is None:
            return None
        n, blocks, h, w, _ = shape_of(made)  # type: ignore[misc]
        s_y, s_x = form.strides
        per_phase = blocks // (s_y * s_x)
        split = graph.emit(_reshape(made, [n, s_y, s_x, per_phase, h, w, lanes]))
        moved = graph.emit(relax.op.permute_dims(split, [0, 3, 4, 1, 5, 2, 6]))
        whole = graph.emit(_reshape(moved, [n, per_phase, h * s_y, w * s_x, lanes]))
        ends = [
            begin + size * stride + extra
            for begin, size, stride, extra in zip(form.begin, shape[2:], form.strides, form.extra, strict=True)
        ]
        kept = relax.op.strided_slice(whole, axes=[2, 3], begin=list(form.begin), end=ends)
        return Blocked(graph.emit(kept), weights.shape[1])

    def _unary(self, graph: Graph, call: Any, name: str) -> Blocked | None:
        source = self._blocked.get(call.args[0])
        finite = name in FINITE_UNARY or (name == "relax.astype" and str(call.attrs.dtype) != "float16")
        if source is None or (source.ragged and not finite):
            return None
        from tvm import relax

        made = relax.Call(call.op, [source.value, *call.args[1:]], call.attrs, call.ty_args)
        return Blocked(graph.emit(made), source.channels)

    def _binary(self, graph: Graph, call: Any, name: str) -> Blocked | None:
        found = [self._blocked.get(a) for a in call.args]
        lead = next((f for f in found if f is not None), None)
        shape = shape_of(graph.builder.normalize(call))
        if lead is None or shape is None or len(shape) != 4 or shape[1] != lead.channels:
            return None
        if lead.ragged and name not in FINITE_BINARY:
            return None
        operands = [self._operand(graph, a, lead) for a in call.args]
        if None in operands:
            return None
        from tvm import relax

        return Blocked(graph.emit(relax.Call(call.op, operands, call.attrs, call.ty_args)), lead.channels)

    def _operand(self, graph: Graph, value: Any, lead: Blocked) -> Any:
        """``value`` so that it can be combined with ``lead``, or None."""
        if value in self._blocked:
            other = self._blocked[value]
            return other.value if (other.channels, other.lanes) == (lead.channels, lead.lanes) else None
        shape, constant = shape_of(value), constant_of(graph.definition(value))
        if shape is None or len(shape) > 4:
            return None
        if constant is not None:
            return _blocked_constant(constant, lead)
        if len(shape) == 4 and shape[1] == lead.channels:
            return self._block(graph, value, lead.lanes).value
        if len(shape) == 4 and shape[1] == 1:
            return graph.emit(_reshape(value, [shape[0], 1, shape[2], shape[3], 1]))
        return None

    def _pool(self, graph: Graph, call: Any) -> Blocked | None:
        source = self._blocked.get(call.args[0])
        if source is None or call.attrs.layout != "NCHW":
            return None
        from tvm import relax

        a, layout = call.attrs, f"NCHW{source.lanes}c"
        if operator_of(call) == "relax.nn.adaptive_avg_pool2d":
            made = relax.op.nn.adaptive_avg_pool2d(source.value, a.output_size, layout, layout)
        else:
            pool = relax.op.nn.max_pool2d if operator_of(call) == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
            sizes = [ints(v) for v in (a.pool_size, a.strides, a.padding, a.dilation)]
            window = (sizes[0][0], sizes[0][1])
            if pool is relax.op.nn.max_pool2d and max_pool_fits(window, _sizes(a), bool(a.ceil_mode)):
                return Blocked(graph.emit(_max_pool(graph, source.value, window, _sizes(a))), source.channels)
            made = pool(source.value, *sizes, bool(a.ceil_mode), bool(a.count_include_pad), layout, layout)
        return Blocked(graph.emit(made), source.channels)

    def _reduce(self, graph: Graph, call: Any, name: str) -> Any:
        source = self._blocked.get(call.args[0])
        if source is None or call.attrs.axis is None or sorted(a % 4 for a in ints(call.attrs.axis)) != [2, 3]:
            return None
        from tvm import relax

        function = {"relax.mean": relax.op.mean, "relax.max": relax.op.max, "relax.sum": relax.op.sum}[name]
        made = Blocked(graph.emit(function(source.value, [2, 3], keepdims=True)), source.channels)
        return made if call.attrs.keepdims else _reshape_plain(graph, made, graph.builder.normalize(call))

    def _concat(self, graph: Graph, call: Any) -> Blocked | None:
        from tvm import relax

        if not isinstance(call.args[0], relax.Tuple) or int(call.attrs.axis) not in (1, -3):
            return None
        parts = [self._blocked.get(part) for part in call.args[0].fields]
        known = [part for part in parts if part is not None]
        if len(known) != len(parts) or any(part.ragged for part in known) or len({p.lanes for p in known}) != 1:
            return None
        made = relax.op.concat([part.value for part in known], axis=1)
        return Blocked(graph.emit(made), sum(part.channels for part in known))

    def _vector(self, graph: Graph, call: Any) -> Any:
        """An image of one pixel becomes a vector without moving anything."""
        source = self._blocked.get(call.args[0])
        shape = shape_of(graph.builder.normalize(call))
        if source is None or shape is None or shape_of(call.args[0])[2:] != [1, 1]:  # type: ignore[index]
            return None
        if shape[-1] != source.channels or len(shape) != 2:
            return None
        return _reshape_plain(graph, source, graph.builder.normalize(call))

    def _block(self, graph: Graph, value: Any, lanes: int) -> Blocked:
        """``value`` in blocked layout, with a change of layout if it has none yet."""
        found = self._blocked.get(value)
        if found is not None and found.lanes == lanes:
            return found
        from tvm import relax

        n, c, h, w = shape_of(value)  # type: ignore[misc]
        source, blocks = value, ceil_div(c, lanes)
        if c % lanes:
            source = relax.op.nn.pad(value, [0, 0, 0, blocks * lanes - c, 0, 0, 0, 0])
        split = _reshape(graph.emit(source), [n, blocks, lanes, h, w])
        made = Blocked(graph.emit(relax.op.permute_dims(graph.emit(split), [0, 1, 3, 4, 2])), c)
        self._blocked[value] = made
        return made


def _max_pool(graph: Graph, value: Any, window: tuple[int, int], sizes: Conv2d) -> Any:
    return graph.builder.call_te(
        lambda x: max_pool2d(x, window, sizes),
        value,
        primfunc_name_hint="max_pool2d",
        primfunc_attrs={"op_pattern": OUT_FUSIBLE},
    )


def _sizes(attrs: Any) -> Conv2d:
    stride_y, stride_x = ints(attrs.strides)
    top, left, bottom, right = ints(attrs.padding)
    dilation_y, dilation_x = ints(attrs.dilation)
    groups = int(getattr(attrs, "groups", 1))
    return Conv2d((stride_y, stride_x), (top, left, bottom, right), (dilation_y, dilation_x), groups)


def _constant(value: np.ndarray) -> Any:
    from tvm import relax

    return relax.const(value, str(value.dtype))


def _reshape(value: Any, shape: list[Any]) -> Any:
    from tvm import relax

    return relax.op.reshape(value, relax.ShapeExpr(shape))


def _to_plain(blocked: Blocked) -> Any:
    """The value with its channels in order, (n, c, h, w)."""
    from tvm import relax

    n, blocks, h, w, lanes = shape_of(blocked.value)  # type: ignore[misc]
    moved = relax.op.permute_dims(blocked.value, [0, 1, 4, 2, 3])
    plain = _reshape(moved, [n, blocks * lanes, h, w])
    if blocked.ragged:
        plain = relax.op.strided_slice(plain, axes=[1], begin=[0], end=[blocked.channels])
    return plain


def _reshape_plain(graph: Graph, blocked: Blocked, call: Any) -> Any:
    """One pixel's channels, in order already, in the shape of ``call``."""
    from tvm import relax

    n, blocks, _, _, lanes = shape_of(blocked.value)  # type: ignore[misc]
    flat = _reshape(blocked.value, [n, blocks * lanes])
    if blocked.ragged:
        flat = relax.op.strided_slice(graph.emit(flat), axes=[1], begin=[0], end=[blocked.channels])
    return _reshape(graph.emit(flat), list(call.ty.shape))


def _blocked_constant(constant: np.ndarray, lead: Blocked) -> Any:
    """A scalar, or one value a channel, or None."""
    import numpy as np

    if constant.size == 1:
        return _constant(constant.reshape(()))
    wide = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
    if wide.shape[0] != 1 or wide.shape[1] not in (1, lead.channels):
        return None
    if wide.shape[1] == 1:
        return _constant(wide.reshape(1, 1, *wide.shape[2:], 1))
    blocks = ceil_div(lead.channels, lead.lanes)
    padded = np.zeros((1, blocks * lead.lanes, *wide.shape[2:]), constant.dtype)
    padded[:, : lead.channels] = wide
    split = padded.reshape(1, blocks, lead.lanes, *wide.shape[2:])
    return _constant(np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2)))
