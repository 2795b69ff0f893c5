"""The benchmark's tables as text."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TOOLS = ("apache-tvm", "onnxruntime", "openvino", "torch")


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    from toolchain.host import detect_host

    host = detect_host()
    versions = {}
    for tool in TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            versions[tool] = "not installed"
    return {"cpu": host.cpu_model, "cores": host.cores, "versions": versions, "python": platform.python_version()}


def heading(results: dict[str, Any]) -> str:
    """The first lines of the output."""
    about = results["machine"]
    tools = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    shapes = "dynamic" if results["dynamic"] else "static"
    return f"{about['cpu']}, {about['cores']} cores; {tools}; profile {results['profile']}, {shapes} shapes\n"


def peak(peaks: Mapping[str, float]) -> str:
    """What one core can do at most."""
    int8 = f", {peaks['int8_gops']:.1f} GOP/s (int8 dot products)" if "int8_gops" in peaks else ""
    return f"peak of one core: {peaks['gflops']:.1f} GFLOP/s (fp32 multiply-add){int8}\n"


class SpeedTable:
    """The lines of one precision and number of threads, and what they add up to."""

    def __init__(self, precision: str, threads: int, names: list[str], peaks: Mapping[str, float]) -> None:
        self.precision, self.threads, self.names = precision, threads, names
        self.peak = peaks.get("gflops" if precision == "fp32" else "int8_gops")
        self.ratios: list[float] = []
        self.refused: list[tuple[str, str, str]] = []

    def head(self) -> str:
        clock = "CPU ms" if self.threads == 1 else "wall ms"
        columns = "".join(f"{name:>14}" for name in self.names)
        peak = f"{'of peak':>9}" if self.peak else ""
        title = f"{self.precision}, {self.threads} thread{'s' if self.threads > 1 else ''}: median {clock}"
        title += "; ratio and max abs difference are ours against ONNX Runtime's"
        return f"{title}\n{'model':18}{columns}{'ours/ort':>10}{'max diff':>10}{peak}"

    def line(self, result: dict[str, Any]) -> str:
        """One model; notes what is missing for :meth:`foot`."""
        if "refused" in result:
            self.refused.append((result["model"], "", result["refused"]))
            return f"{result['model']:18}  -"
        times = result["cpu_ms" if self.threads == 1 else "wall_ms"]
        self.refused += [(result["model"], name, why) for name, why in result["missing"].items()]
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = "".join(f"{medians[name]:14.3f}" if name in medians else f"{'-':>14}" for name in self.names)
        end = f"{'-':>10}{'-':>10}"
        result["median_ms"] = medians
        if "ours" in medians and "onnxruntime" in medians:
            ratio = statistics.median(a / b for a, b in zip(times["ours"], times["onnxruntime"], strict=True))
            result["ratio"] = ratio
            self.ratios.append(ratio)
            error = result["max_abs_error"]["ours"]
            end = f"{ratio:10.3f}" + (f"{error:10.1e}" if error is not None else f"{'-':>10}")
        if self.peak and "ours" in medians:
            result["of_peak"] = result["gflops"] / (medians["ours"] / 1e3) / (self.peak * self.threads)
            end += f"{result['of_peak']:9.1%}"
        return f"{result['model']:18}{cells}{end}"

    def foot(self) -> str:
        """Geometric mean of the ratios, and the reason of each gap."""
        lines = []
        if self.ratios:
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in self.ratios))
            worst = max(self.ratios)
            lines.append(f"geometric mean of ours/ort over {len(self.ratios)} models: {mean:.3f}; worst {worst:.3f}")
        lines += [f"  {model}{': ' + who if who else ''}: {why}" for model, who, why in self.refused]
        return "\n".join([*lines, ""])


def costs_head(precision: str) -> str:
    """Title and columns of the table of costs."""
    columns = ("import", "passes", "codegen", "link", "build s", "nodes", "ms/node")
    sizes = ("code KB", "weights MB", ".so MB", "ours MB", "ort MB")
    title = f"{precision}: build of ours in CPU seconds, size, and peak memory of a process that runs the model"
    return f"{title}\n{'model':18}" + "".join(f"{name:>11}" for name in (*columns, *sizes))


def costs_line(line: dict[str, Any]) -> str:
    """One model's costs."""
    if "refused" in line:
        return f"{line['model']:18}  {line['refused']}"
    costs = dict(line["cpu_s"])
    total = sum(costs.values())
    ends = [costs.pop(name, 0.0) for name in ("import", "codegen", "link")]
    seconds = [ends[0], sum(costs.values()), ends[1], ends[2], total]
    sizes = [line["code_bytes"] / 1e3, line["weight_bytes"] / 1e6, line["library_bytes"] / 1e6]
    memory = [line.get("ours_peak_mb"), line.get("onnxruntime_peak_mb")]
    cells = "".join(f"{value:11.2f}" for value in seconds)
    cells += f"{line['nodes']:11}{total * 1e3 / line['nodes']:11.1f}"
    cells += f"{sizes[0]:11.0f}{sizes[1]:11.1f}{sizes[2]:11.1f}"
    return f"{line['model']:18}{cells}" + "".join(f"{m:11.0f}" if m else f"{'-':>11}" for m in memory)


def ops_table(title: str, rows: list[dict[str, Any]]) -> str:
    """Kernels by time."""
    total = sum(row["ms"] for row in rows)
    lines = [f"{title}: {total:.3f} ms in {len(rows)} kernels", f"{'ms':>9} {'share':>6} {'calls':>5}  kernel"]
    for row in rows:
        shapes = row["shapes"]
        lines.append(f"{row['ms']:9.3f} {row['ms'] / total:6.1%} {row['calls']:5}  {row['kernel']}  [{shapes}]")
    return "\n".join([*lines, ""])
