"""How a model is quantized, and which limits the result must hold."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.errors import ExitCode, ToolchainError, did_you_mean

_CHOICES = {
    "activation": ("u8", "s8"),
    "weight": ("s8",),
    "method": ("minmax", "percentile", "entropy"),
}

WEIGHTED_OPS = frozenset({"Conv", "MatMul", "Gemm"})
"""Operators whose int8 form saves time; the others follow to avoid converting back and forth."""

PASS_THROUGH_OPS = frozenset(
    {"AveragePool", "Clip", "Flatten", "MaxPool", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)
"""Operators that become int8 only when what feeds them is."""

INT8_OPS = (
    WEIGHTED_OPS
    | PASS_THROUGH_OPS
    | {"Add", "Concat", "Gather", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax"}
)
"""Operators that ONNX Runtime's CPU provider runs in int8 from the QDQ form.

Found by building a QDQ graph of each operator and reading ONNX Runtime 1.32's optimized graph.  Its quantizer
also accepts LayerNormalization, InstanceNormalization, ConvTranspose, Tanh, Div, Sub, Pad, Where, CumSum and
more; those run in float between two conversions, losing accuracy and time.  ArgMax is left out because
ties among quantized scores change its result.
"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """An int8 quantization scheme and its calibration.

    Attributes:
        activation: ``"u8"`` (x86 with VNNI) or ``"s8"`` (ARM).
        weight: ``"s8"``.
        per_channel: a scale per output channel of Conv, MatMul and Gemm weights.
        symmetric_activation, symmetric_weight: zero point in the middle of the range.
        reduce_range: 7-bit weights, needed for u8 x s8 on x86 without VNNI, where ``vpmaddubsw`` adds two
            products in 16 bits and saturates.
        method: how ranges follow from the calibration data.
        percentile: for ``"percentile"``: the share of values kept, in percent, half of the rest cut per side.
        exclude: names of nodes that stay float.
    """

    activation: str = "u8"
    weight: str = "s8"
    per_channel: bool = True
    symmetric_activation: bool = False
    symmetric_weight: bool = True
    reduce_range: bool = False
    method: str = "minmax"
    percentile: float = 99.99
    exclude: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse settings that don't exist.

        Raises:
            ToolchainError: QUANTIZE; names the setting, what was got and what is allowed.
        """
        for key, allowed in _CHOICES.items():
            if (got := getattr(self, key)) not in allowed:
                what = f"got {got!r}{did_you_mean(got, allowed)}; allowed: {', '.join(allowed)}"
                raise ToolchainError(what, where=f"quantize.{key}", code=ExitCode.QUANTIZE)
        if not 50 < self.percentile <= 100:
            what = f"got {self.percentile}; allowed: above 50, up to 100"
            raise ToolchainError(what, where="quantize.percentile", code=ExitCode.QUANTIZE)

    @property
    def name(self) -> str:
        """E.g. ``"u8s8 per channel"``."""
        granularity = "per channel" if self.per_channel else "per tensor"
        return f"{self.activation}{self.weight} {granularity}" + (", 7-bit weights" if self.reduce_range else "")


@dataclass(frozen=True, slots=True)
class AccuracyLimits:
    """Limits on fidelity and accuracy; None: not checked.

    Attributes:
        cosine, agreement: lowest allowed, over all outputs (see :class:`toolchain.fidelity.Fidelity`).
        max_abs_error, max_rel_error: largest allowed, over all outputs.
        accuracy_drop: largest allowed loss of the metric against the original, in the metric's unit.
        min_accuracy: worst allowed value of the metric (the lowest one, or the highest one for a metric where
            lower is better).
    """

    cosine: float | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    agreement: float | None = None
    accuracy_drop: float | None = None
    min_accuracy: float | None = None
