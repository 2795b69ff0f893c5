"""Float convolutions in blocked layout: which loop nest a call becomes, with its weights packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.tvm.graph.rewrite import Graph
from toolchain.tvm.graph.values import dtype_of, shape_of
from toolchain.tvm.loops import OPAQUE, OUT_FUSIBLE, few, winograd
from toolchain.tvm.loops.conv import Conv2d, conv2d, depthwise2d, merge_groups, pack_depthwise, pack_weights
from toolchain.tvm.machine import Machine
from toolchain.tvm.tiles import Tile, ceil_div

if TYPE_CHECKING:
    import numpy as np

_MERGED = 4
"""Most groups computed as one, with zeros, where the data is in blocks already; half as many where it isn't.  Groups of
plain data run at about a quarter of the speed, and between blocks their layout is changed twice."""

_PLAIN_INPUT = 4
"""Most channels that are read in plain layout, one at a time; more are worth a change of layout."""


class Convolutions:
    """Emits the loop nests.

    Args:
        machine: the target.
        block: gives a value in blocks of so many lanes.
        is_blocked: whether a value is in blocks already.
    """

    def __init__(
        self, machine: Machine, block: Callable[[Graph, Any, int], Any], is_blocked: Callable[[Any], bool]
    ) -> None:
        self._machine, self._block, self._is_blocked = machine, block, is_blocked

    def emit(self, graph: Graph, source: Any, conv: Conv2d, weights: np.ndarray) -> Any:
        """The convolution of ``source`` with ``weights`` (oc, ic/groups, kh, kw), blocked; None if it can't be."""
        shape, dtype = shape_of(source), dtype_of(source)
        if shape is None or dtype not in ("float32", "float16"):
            return None
        lanes = self._machine.lanes(dtype)
        if conv.groups == weights.shape[0] > 1 and weights.shape[1] == 1:
            return self._depthwise(graph, source, conv, weights, lanes)
        if conv.groups > 1:
            merged = merge_groups(weights, conv, lanes, _MERGED if self._is_blocked(source) else _MERGED // 2)
            if merged is None:
                return None
            weights, conv = merged
        oc, per_group, kh, kw = weights.shape
        if not self._is_blocked(source) and per_group <= _PLAIN_INPUT:
            data, block = source, 1
        else:
            data, block = self._block(graph, source, lanes), lanes
        out = conv.output(shape[2], shape[3], (kh, kw))
        choice = self._machine.choose(dtype, shape, weights.shape, conv, plain=block == 1)
        if choice.winograd:
            return self._winograd(graph, data, conv, weights, out, choice.tile)
        return self._call(
            graph,
            "conv2d",
            lambda x, w: conv2d(x, w, conv, ceil_div(oc, lanes), choice.rows, choice.tile),
            data,
            pack_weights(weights, lanes, block, choice.vectors),
        )

    def few(self, graph: Graph, source: Any, conv: Conv2d, weights: np.ndarray) -> Any:
        """The same with its result in plain layout, where there are few output channels; else None."""
        lanes = self._machine.lanes("float32")
        if dtype_of(source) != "float32" or not few.pays(conv, weights.shape, lanes):
            return None
        columns = few.columns_for(weights.shape[0], self._machine.registers)
        data, packed = self._block(graph, source, lanes), few.pack_weights(weights, lanes)
        return self._call(graph, "conv2d_few", lambda x, w: few.conv2d_few(x, w, conv, columns), data, packed)

    def _depthwise(self, graph: Graph, source: Any, conv: Conv2d, weights: np.ndarray, lanes: int) -> Any:
        _, _, height, width = shape_of(source)  # type: ignore[misc]
        data = self._block(graph, source, lanes)
        _, across = conv.output(height, width, weights.shape[2:])
        # Half of the registers for accumulators, half for the row of data they share.
        most = max(1, min(14, self._machine.registers // 2 - 1))
        columns = ceil_div(across, ceil_div(across, most)) if isinstance(across, int) else 4
        packed = pack_depthwise(weights, lanes)
        return self._call(graph, "depthwise2d", lambda x, w: depthwise2d(x, w, conv, columns), data, packed)

    def _winograd(
        self, graph: Graph, data: Any, conv: Conv2d, weights: np.ndarray, out: tuple[int, int], tile: Tile
    ) -> Any:
        n, lanes = shape_of(data)[0], self._machine.lanes("float32")  # type: ignore[index]
        channels = ceil_div(weights.shape[0], lanes)
        before = self._call(
            graph, "winograd_input", lambda x: winograd.transform_input(x, conv, out), data, fusible=False
        )
        products = self._call(
            graph,
            "winograd_product",
            lambda x, w: winograd.products(x, w, channels, tile),
            before,
            winograd.pack_filters(weights, lanes, tile.vectors),
            fusible=False,
        )
        return self._call(graph, "winograd_output", lambda x: winograd.transform_output(x, n, out), products)

    def _call(
        self,
        graph: Graph,
        name: str,
        nest: Callable[..., Any],
        data: Any,
        packed: np.ndarray | None = None,
        *,
        fusible: bool = True,
    ) -> Any:
        from tvm import relax

        operands = [data] if packed is None else [data, relax.const(packed, str(packed.dtype))]
        attributes = {"op_pattern": OUT_FUSIBLE if fusible else OPAQUE}
        made = graph.builder.call_te(nest, *operands, primfunc_name_hint=name, primfunc_attrs=attributes)
        return graph.emit(made)
