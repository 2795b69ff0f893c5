"""Value ranges of activations from calibration data, in memory that doesn't grow with the data.

ONNX Runtime's calibrators keep every intermediate output of all that their data reader yields, and its
histograms widen bin by bin when a later batch exceeds the first one's range: a first batch of tiny values
makes billions of bins.  Here each batch is collected and let go before the next one is read, and the
histogram methods read the data twice: the first pass finds each tensor's range, the second fills histograms
of a fixed number of bins over it.  The thresholds then depend neither on the batch size nor on the order.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data import read_batches
from toolchain.errors import ExitCode, ToolchainError
from toolchain.graph.numeric import session
from toolchain.quantize.model import MODEL, quiet, write_model
from toolchain.quantize.ranges import RangeFinder
from toolchain.quantize.scheme import INT8_OPS, Scheme

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

BINS = {"percentile": 4096, "entropy": 512}
"""Bins of the histograms.  Entropy's threshold search takes time with the square of their number."""

LARGEST = 1e8
"""Values beyond this are the fill of an attention mask: 256 levels up to them round all real scores to zero."""

_QUANTIZED_BINS = 128  # entropy: levels on which the distributions are compared, as in TensorRT's method


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration found.

    Attributes:
        ranges: ONNX Runtime's ``TensorsData``: lowest and highest value by tensor name.
        unusable: tensors that can't be quantized, with the reason: values that are not all finite, or beyond
            :data:`LARGEST`.
        method: as in :class:`Scheme`.
        samples, batches: how much data was read.
        outputs: the float model's outputs on the first batch.
    """

    ranges: Any
    unusable: Mapping[str, str]
    method: str
    samples: int
    batches: int
    outputs: Mapping[str, NDArray[Any]]

    def facts(self) -> dict[str, Any]:
        return {"method": self.method, "samples": self.samples, "batches": self.batches}


class _Reader:
    """The data reader of one batch."""

    def __init__(self, feed: dict[str, Any]) -> None:
        self._feed: dict[str, Any] | None = feed

    def get_next(self) -> dict[str, Any] | None:
        feed, self._feed = self._feed, None
        return feed


def calibrate(model: onnx.ModelProto, folder: Path, scheme: Scheme) -> Calibration:
    """Ranges of all float tensors around int8 operators.

    Args:
        model: prepared by :func:`toolchain.quantize.model.load_prepared`; not changed.
        folder: a ``dataset`` artifact.
        scheme: names the method.

    Raises:
        ToolchainError: QUANTIZE when the data is empty or the model doesn't run on it.
    """
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData

    with tempfile.TemporaryDirectory() as temporary:
        data, outputs, samples, batches = _extremes(model, folder, Path(temporary))
        largest = {n: float(np.max(np.maximum(np.abs(low), np.abs(high)))) for n, (low, high) in data.items()}
        unusable = {n: _unusable(value) for n, value in largest.items() if not value <= LARGEST}
        finite = {n: extremes for n, extremes in data.items() if n not in unusable}
        ranges = TensorsData(CalibrationMethod.MinMax, finite)
        if scheme.method != "minmax":
            copy = type(model)()
            copy.CopyFrom(model)
            ranges = _histogram_ranges(write_model(copy, Path(temporary)), folder, scheme, finite)
    return Calibration(ranges, unusable, scheme.method, samples, batches, outputs)


def _extremes(model: onnx.ModelProto, folder: Path, temporary: Path) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """(lowest, highest) by tensor, the outputs on the first batch, and how many samples and batches there are."""
    finder = RangeFinder(model, temporary)
    outputs: list[dict[str, Any]] = []

    def add(feed: dict[str, Any]) -> None:
        found = finder.add(feed)
        if not outputs:
            outputs.append(found)

    samples, batches = _each_batch(folder, finder.inputs, add)
    return finder.ranges(), outputs[0], samples, batches


def _unusable(largest: float) -> str:
    if math.isfinite(largest):
        return f"its values on the calibration data reach {largest:.2g}, like a mask's"
    return "its values on the calibration data are not all finite"


def _collector(path: Path, method: Any, extra: dict[str, Any]) -> Any:
    from onnxruntime.quantization.calibrate import create_calibrator

    with quiet():
        calibrator = create_calibrator(
            path,
            sorted(INT8_OPS),
            augmented_model_path=str(path.parent / f"augmented-{method.name}.onnx"),
            calibrate_method=method,
            use_external_data_format=(path.parent / f"{MODEL}.data").exists(),
            extra_options=extra,
        )
    # Its own session, with the same settings, has threads that spin between operators.
    calibrator.infer_session = session(Path(calibrator.augmented_model_path))
    return calibrator


def _each_batch(folder: Path, wanted: Collection[str], use: Callable[[dict[str, Any]], object]) -> tuple[int, int]:
    """Give the ``wanted`` inputs of each batch to ``use``: (samples, batches)."""
    samples = batches = 0
    for batch in read_batches(folder):
        feed = {name: array for name, array in batch.inputs.items() if name in wanted}
        with quiet():
            try:
                use(feed)
            except Exception as error:  # ONNX Runtime raises a class per status, all derived from Exception alone
                message = " ".join(str(error).split())
                raise ToolchainError(
                    f"the model does not run on calibration batch {batches}: {message}",
                    where="calibration",
                    hint="compare the batch's shapes and dtypes with the model's inputs",
                    code=ExitCode.QUANTIZE,
                ) from error
        samples, batches = samples + batch.size, batches + 1
    if not samples:
        raise ToolchainError(
            "the calibration data is empty; static int8 needs at least one batch",
            where="calibration",
            hint="let data.calibration yield some hundred samples like those the model will meet",
            code=ExitCode.QUANTIZE,
        )
    return samples, batches


def _histogram_ranges(path: Path, folder: Path, scheme: Scheme, finite: dict[str, Any]) -> Any:
    """Second pass: ONNX Runtime's histogram collector, its bins laid over the known ranges beforehand."""
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import HistogramCollector

    bins = BINS[scheme.method]
    method = {"percentile": CalibrationMethod.Percentile, "entropy": CalibrationMethod.Entropy}[scheme.method]
    extra = {"symmetric": False, "num_bins": bins, "num_quantized_bins": _QUANTIZED_BINS}
    calibrator = _collector(path, method, extra | {"percentile": scheme.percentile})
    calibrator.tensors_to_calibrate = calibrator.tensors_to_calibrate & finite.keys()
    collector = HistogramCollector(
        scheme.method, symmetric=False, num_bins=bins, num_quantized_bins=_QUANTIZED_BINS,
        percentile=scheme.percentile, scenario="same",
    )  # fmt: skip
    for name in sorted(calibrator.tensors_to_calibrate):
        low, high = (np.float32(np.min(v)) for v in finite[name])
        threshold = np.maximum(np.float32(1e-30), np.maximum(abs(low), abs(high)))
        edges = np.linspace(-threshold, threshold, bins + 1, dtype=np.float32)
        collector.histogram_dict[name] = (np.zeros(bins, np.int64), edges, low, high, threshold)
    calibrator.collector = collector
    wanted = {i.name for i in calibrator.infer_session.get_inputs()}
    _each_batch(folder, wanted, lambda feed: calibrator.collect_data(_Reader(feed)))
    with quiet():
        return calibrator.compute_data()
