"""Small models of floating point, one or more for each family of CPU schedules, with inputs for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxconverter_common.float16 import convert_float_to_float16
from tvm_support import ONNX_TYPES, Graph

Shape = list[int | str]
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Case:
    """A model and what to expect of it.

    Attributes:
        model: in ONNX.
        feeds: several inputs where sizes are dynamic.
        rules: rules that some of its loop nests must take.
        kind: ``"float"``, ``"half"``: the tolerance of a build's check of fp32 and fp16; ``"steps"``: 8-bit outputs,
            one step; ``"network"``: several 8-bit operators after each other, or data quantized at run time, which may
            go either way in the middle between two steps: 2 % of the largest value.
    """

    model: onnx.ModelProto
    feeds: list[Feeds]
    rules: frozenset[str]
    kind: str = "float"


@dataclass
class Built:
    """What a function below gives: the last value, inputs by name with a size for each symbol, and the rules."""

    result: str
    inputs: Mapping[str, Shape]
    rules: Sequence[str]
    sizes: Sequence[Mapping[str, int]] = field(default_factory=lambda: [{}])


def separable(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(40, 24, 3, 3, scale=0.1), g.weight(40), pads=[1] * 4)
    y = g.add("Conv", g.add("Relu", x), g.weight(40, 40, 1, 1, scale=0.2), g.weight(40))
    return Built(g.add("Relu", g.add("Add", x, y)), {"x": ["n", 24, 11, 13]}, ["convolution"], [{"n": 1}, {"n": 3}])


def first_layer(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(20, 3, 7, 7, scale=0.1), g.weight(20), pads=[3] * 4, strides=[2, 2])
    return Built(g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2]), {"x": [1, 3, 31, 29]}, ["convolution"])


def strided_dilated_grouped(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(32, 16, 3, 3, scale=0.1), strides=[2, 1], pads=[1, 0, 2, 1])
    x = g.add("Conv", x, g.weight(64, 16, 3, 3, scale=0.1), g.weight(64), group=2, pads=[1] * 4)
    x = g.add("Conv", x, g.weight(7, 64, 3, 3, scale=0.1), g.weight(7), dilations=[2, 2], pads=[2] * 4)
    return Built(x, {"x": [2, 16, 15, 14]}, ["convolution"])


def depthwise(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(33, 1, 3, 3, scale=0.3), g.weight(33), group=33, pads=[1] * 4)
    x = g.add("Clip", x, g.constant(np.float32(0)), g.constant(np.float32(6)))
    x = g.add("Conv", x, g.weight(33, 1, 5, 5, scale=0.3), group=33, pads=[2] * 4, strides=[2, 2])
    return Built(x, {"x": [1, 33, 15, 17]}, ["depthwise"])


def winograd(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(64, 64, 3, 3, scale=0.05), g.weight(64), pads=[1] * 4)
    return Built(g.add("Relu", x), {"x": [1, 64, 28, 26]}, ["winograd input", "winograd product", "winograd output"])


def transposed(g: Graph) -> Built:
    weight = g.weight(16, 12, 3, 3, scale=0.2)
    x = g.add("ConvTranspose", "x", weight, g.weight(12), strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])
    return Built(x, {"x": [1, 16, 9, 8]}, ["convolution"])


def lines(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(24, 12, 5, scale=0.2), g.weight(24), dilations=[2], pads=[4, 4])
    return Built(g.add("AveragePool", x, kernel_shape=[3], strides=[2]), {"x": [2, 12, 40]}, ["convolution"])


def few_channels(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(33, 8, 1, 1, scale=0.2), g.weight(33))
    y = g.add("Conv", x, g.weight(3, 33, 5, 3, scale=0.1), g.weight(3), pads=[2, 1, 2, 1], strides=[1, 2])
    z = g.add("Conv", x, g.weight(1, 33, 5, 3, scale=0.1), pads=[2, 2, 2, 2], dilations=[1, 2], strides=[1, 2])
    return Built(g.add("Tanh", g.add("Add", y, z)), {"x": ["n", 8, 12, 13]}, ["few channels"], [{"n": 1}, {"n": 2}])


def volumes(g: Graph) -> Built:
    x = g.add(
        "Conv", "x", g.weight(12, 3, 3, 2, 3, scale=0.2), g.weight(12), pads=[1, 0, 1, 2, 1, 0], strides=[2, 1, 1]
    )
    x = g.add("Conv", g.add("Relu", x), g.weight(16, 6, 2, 3, 3, scale=0.2), group=2, dilations=[2, 1, 1], pads=[1] * 6)
    x = g.add("MaxPool", x, kernel_shape=[1, 2, 2], strides=[1, 2, 2])
    return Built(x, {"x": ["n", 3, 8, 7, 10]}, ["convolution"], [{"n": 1}, {"n": 3}])


def narrow_groups(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(32, 16, 1, 1, scale=0.2), g.weight(32))
    x = g.add("Conv", x, g.weight(64, 4, 3, 3, scale=0.2), g.weight(64), group=8, pads=[1] * 4, strides=[2, 2])
    x = g.add("Conv", g.add("Relu", x), g.weight(64, 8, 3, 3, scale=0.1), group=8, pads=[1] * 4)
    return Built(x, {"x": ["n", 16, 14, 11]}, ["convolution"], [{"n": 1}, {"n": 2}])


def instance_norm(g: Graph) -> Built:
    x = g.add("InstanceNormalization", "x", g.weight(5), g.weight(5), epsilon=1e-3)
    return Built(g.add("Relu", x), {"x": ["n", 5, 9, 13]}, ["rows"], [{"n": 1}, {"n": 3}])


def powers(g: Graph) -> Built:
    x = g.add("Pow", "x", g.constant(np.float32(3)))
    square = g.add("Pow", "x", g.constant(np.array([2.0], np.float32)))
    y = g.add("Log", g.add("Add", square, g.constant(np.float32(0.1))))
    return Built(g.add("Add", x, y), {"x": ["n", 3, 37]}, ["generic"], [{"n": 1}, {"n": 2}])


def dense(g: Graph) -> Built:
    x = g.add("Gemm", "x", g.weight(45, 67, scale=0.1), g.weight(45), transB=1)
    half, one = g.constant(np.float32(0.5)), g.constant(np.float32(1))
    erf = g.add("Erf", g.add("Mul", x, g.constant(np.float32(0.70710677))))
    x = g.add("Mul", g.add("Mul", x, half), g.add("Add", erf, one))
    x = g.add("Gemm", x, g.weight(45, 10, scale=0.1))
    return Built(x, {"x": ["n", 67]}, ["dense"], [{"n": 1}, {"n": 3}, {"n": 17}])


def projection(g: Graph) -> Built:
    x = g.add("Add", g.add("MatMul", "x", g.weight(33, 50, scale=0.2)), g.weight(50))
    return Built(x, {"x": ["n", 7, 33]}, ["dense"], [{"n": 1}, {"n": 3}])


def batched_product(g: Graph) -> Built:
    x = g.add("MatMul", "x", g.add("Transpose", "x", perm=[0, 1, 3, 2]))
    return Built(g.add("MatMul", x, "x"), {"x": ["n", 2, 13, 22]}, ["product"], [{"n": 1}, {"n": 3}])


def attention(g: Graph) -> Built:
    heads, depth = 3, 8
    split = g.constant(np.array([0, 0, heads, depth]))
    q, k, v = (
        g.add("Transpose", g.add("Reshape", name, split), perm=perm)
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
    )
    scores = g.add("Mul", g.add("MatMul", q, k), g.constant(np.float32(depth**-0.5)))
    scores = g.add("Softmax", g.add("Add", scores, "m"), axis=-1)
    x = g.add("Transpose", g.add("MatMul", scores, v), perm=[0, 2, 1, 3])
    x = g.add("Reshape", x, g.constant(np.array([0, 0, heads * depth])))
    inputs: dict[str, Shape] = {name: ["n", "s", heads * depth] for name in "qkv"}
    return Built(x, {**inputs, "m": ["n", 1, 1, "s"]}, ["attention"], [{"n": 1, "s": 5}, {"n": 2, "s": 19}])


def layer_norm(g: Graph) -> Built:
    x = g.add("LayerNormalization", "x", g.weight(45), g.weight(45), axis=-1)
    return Built(g.add("Add", x, "x"), {"x": ["n", 45]}, ["rows"], [{"n": 1}, {"n": 6}])


def group_norm(g: Graph) -> Built:
    x = g.add("Reshape", "x", g.constant(np.array([0, 4, -1])))
    x = g.add("InstanceNormalization", x, g.weight(4), g.weight(4))
    return Built(g.add("Reshape", x, g.constant(np.array([2, 12, 5, 7]))), {"x": [2, 12, 5, 7]}, [])


def rms_norm(g: Graph) -> Built:
    mean = g.add("ReduceMean", g.add("Mul", "x", "x"), g.constant(np.array([-1])))
    root = g.add("Sqrt", g.add("Add", mean, g.constant(np.float32(1e-5))))
    return Built(g.add("Mul", g.add("Div", "x", root), g.weight(37)), {"x": [3, 5, 37]}, ["rows"])


def softmax(g: Graph) -> Built:
    x = g.add("Softmax", g.add("LogSoftmax", "x", axis=-1), axis=1)
    return Built(x, {"x": [3, 7, 29]}, ["rows"])


def pools(g: Graph) -> Built:
    x = g.add("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=0)
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[1, 1])
    return Built(g.add("Flatten", g.add("GlobalAveragePool", x)), {"x": [2, 9, 14, 13]}, [])


def reductions(g: Graph) -> Built:
    axes = [g.constant(np.array(a)) for a in ([1], [0, 2], [2])]
    x = g.add("Add", g.add("ReduceMax", "x", axes[0]), g.add("ReduceL2", "x", axes[1]))
    x = g.add("Add", x, g.add("ReduceProd", "x", axes[2]))
    return Built(g.add("Add", x, g.add("ReduceLogSumExp", "x", axes[0])), {"x": [3, 5, 6]}, [])


def elementwise(g: Graph) -> Built:
    x = g.add("Mul", g.add("Tanh", "x"), g.add("Sigmoid", "x"))
    x = g.add("Add", x, g.add("Exp", g.add("Erf", "x")))
    x = g.add("Sub", x, g.add("Sqrt", g.add("Abs", "x")))
    x = g.add("Where", g.add("Greater", x, "x"), x, g.add("Log", g.add("Softplus", "x")))
    return Built(g.add("LeakyRelu", g.add("Pow", x, g.constant(np.float32(3)))), {"x": ["n", 23]}, [], [{"n": 7}])


def embedding(g: Graph) -> Built:
    x = g.add("Gather", g.weight(50, 20), "ids")
    index = g.add("Unsqueeze", "ids", g.constant(np.array([2])))
    return Built(g.add("Add", x, g.add("GatherElements", x, index, axis=2)), {"ids": [6, 1]}, [])


def moves(g: Graph) -> Built:
    x = g.add("Transpose", "x", perm=[0, 2, 1])
    x = g.add("Concat", x, g.add("Pad", x, g.constant(np.array([0, 0, 1, 0, 0, 2]))), axis=2)
    x = g.add("Split", x, g.constant(np.array([4, 5])), axis=1, outputs=2)
    x = g.add("Slice", x, *(g.constant(np.array([v])) for v in (1, 15, 2, 2)))
    return Built(g.add("Tile", x, g.constant(np.array([2, 1, 1]))), {"x": [2, 8, 9]}, [])


def resize(g: Graph) -> Built:
    x = g.add("Resize", "x", "", g.constant(np.array([1, 1, 2, 1.5], np.float32)), mode="linear")
    x = g.add("Resize", x, "", g.constant(np.array([1, 1, 0.5, 2], np.float32)), mode="nearest")
    return Built(x, {"x": [1, 5, 6, 8]}, [])


def lstm(g: Graph) -> Built:
    weights = [g.weight(2, 4 * 9, 7, scale=0.3), g.weight(2, 4 * 9, 9, scale=0.3), g.weight(2, 8 * 9, scale=0.3)]
    return Built(g.add("LSTM", "x", *weights, hidden_size=9, direction="bidirectional"), {"x": [5, 2, 7]}, [])


def gru(g: Graph) -> Built:
    weights = [g.weight(1, 3 * 9, 7, scale=0.3), g.weight(1, 3 * 9, 9, scale=0.3), g.weight(1, 6 * 9, scale=0.3)]
    return Built(g.add("GRU", "x", *weights, hidden_size=9, linear_before_reset=1), {"x": [5, 2, 7]}, [])


def images_of_any_size(g: Graph) -> Built:
    x = g.add("Conv", "x", g.weight(18, 5, 3, 3, scale=0.2), g.weight(18), pads=[1] * 4)
    x = g.add("Conv", x, g.weight(18, 1, 3, 3, scale=0.3), group=18, pads=[1] * 4)
    x = g.add("Conv", g.add("Relu", x), g.weight(12, 18, 3, 3, scale=0.1), pads=[1, 1, 0, 2], strides=[2, 2])
    sizes = [{"h": 4, "w": 3}, {"h": 9, "w": 14}]
    return Built(g.add("GlobalAveragePool", x), {"x": [1, 5, "h", "w"]}, ["convolution", "depthwise"], sizes)


FLOAT: tuple[Callable[[Graph], Built], ...] = (
    separable, first_layer, strided_dilated_grouped, narrow_groups, few_channels, depthwise, winograd, transposed,
    lines, volumes, dense, projection, batched_product, attention, images_of_any_size, layer_norm, group_norm,
    instance_norm, rms_norm, softmax, pools, reductions, elementwise, powers, embedding, moves, resize, lstm, gru,
)  # fmt: skip


def float_case(build: Callable[[Graph], Built]) -> Case:
    g = Graph()
    built = build(g)
    types = {name: "int64" if name == "ids" else "float32" for name in built.inputs}
    values = [helper.make_tensor_value_info(n, ONNX_TYPES[types[n]], s) for n, s in built.inputs.items()]
    output = helper.make_tensor_value_info(built.result, TensorProto.FLOAT, None)
    graph = helper.make_graph(g.nodes, "model", values, [output], g.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    random = np.random.default_rng(1)
    feeds = []
    for sizes in built.sizes:
        shapes = {name: [sizes.get(str(s), s) for s in shape] for name, shape in built.inputs.items()}
        feeds.append({
            name: random.integers(0, 5, shape) if types[name] == "int64" else normal(random, shape)
            for name, shape in shapes.items()
        })  # fmt: skip
    return Case(onnx.shape_inference.infer_shapes(model), feeds, frozenset(built.rules))


def half_case(build: Callable[[Graph], Built]) -> Case:
    """The same in fp16, inputs and outputs in fp32."""
    case = float_case(build)
    with warnings.catch_warnings():
        # Weights below the least number of fp16 become it.
        warnings.simplefilter("ignore")
        model = convert_float_to_float16(case.model, keep_io_types=True)
    # Winograd's transforms lose too much of fp16; attention is products and a softmax in it.
    rules = case.rules & {"convolution", "depthwise", "dense", "product", "rows"}
    return Case(onnx.shape_inference.infer_shapes(model), case.feeds, rules, "half")


def normal(random: np.random.Generator, shape: Sequence[int | str]) -> np.ndarray:
    return random.standard_normal([int(size) for size in shape]).astype(np.float32)
