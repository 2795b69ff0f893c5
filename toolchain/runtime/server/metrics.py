"""The counters in Prometheus' text format, under Triton's names where Triton has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from toolchain.runtime.server.version import ModelVersion

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _us(nanoseconds: int) -> int:
    return nanoseconds // 1000


#: name, type, help, value
_SIMPLE: tuple[tuple[str, str, str, Callable[[ModelVersion], float]], ...] = (
    (
        "nv_inference_request_success",
        "counter",
        "Number of successful inference requests",
        lambda v: v.statistics.success,
    ),
    (
        "nv_inference_count",
        "counter",
        "Number of inferences performed: rows of all successful requests",
        lambda v: v.statistics.inferences,
    ),
    (
        "nv_inference_exec_count",
        "counter",
        "Number of runs of the engine",
        lambda v: v.statistics.executions,
    ),
    (
        "nv_inference_request_duration_us",
        "counter",
        "Cumulative duration of successful requests in microseconds",
        lambda v: _us(v.statistics.success_ns),
    ),
    (
        "nv_inference_queue_duration_us",
        "counter",
        "Cumulative time in the queue in microseconds",
        lambda v: _us(v.statistics.queue_ns),
    ),
    (
        "nv_inference_compute_input_duration_us",
        "counter",
        "Cumulative time of handing inputs over in microseconds",
        lambda v: _us(v.statistics.input_ns),
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Cumulative time in the engine in microseconds",
        lambda v: _us(v.statistics.infer_ns),
    ),
    (
        "nv_inference_compute_output_duration_us",
        "counter",
        "Cumulative time of taking outputs over in microseconds",
        lambda v: _us(v.statistics.output_ns),
    ),
    (
        "nv_inference_pending_request_count",
        "gauge",
        "Requests that wait for a run",
        lambda v: v.batcher.queue.count,
    ),
    (
        "toolchain_running_batch_count",
        "gauge",
        "Runs that were handed to a worker and have not ended",
        lambda v: v.batcher.running,
    ),
    (
        "toolchain_worker_restart_count",
        "counter",
        "Worker processes that ended by themselves and were replaced",
        lambda v: v.statistics.restarts,
    ),
    (
        "toolchain_model_ready",
        "gauge",
        "1 if the version can answer",
        lambda v: int(v.ready),
    ),
)


def exposition(versions: Iterable[ModelVersion]) -> bytes:
    """The text that ``GET /metrics`` answers."""
    labelled = [(f'model="{_escaped(v.name)}",version="{_escaped(v.version)}"', v) for v in versions]
    lines: list[str] = []
    for name, kind, text, value in _SIMPLE:
        lines += _head(name, kind, text)
        lines += [f"{name}{{{labels}}} {value(version)}" for labels, version in labelled]
    name = "nv_inference_request_failure"
    lines += _head(name, "counter", "Number of failed inference requests")
    for labels, version in labelled:
        for reason, count in version.statistics.failures.items():
            lines.append(f'{name}{{{labels},reason="{reason}"}} {count}')
    name = "toolchain_batch_size"
    lines += _head(name, "histogram", "Rows of the runs of the engine")
    for labels, version in labelled:
        lines += _histogram(name, labels, version)
    return ("\n".join(lines) + "\n").encode()


def _histogram(name: str, labels: str, version: ModelVersion) -> list[str]:
    counts = {rows: batch.count for rows, batch in version.statistics.batches.items()}
    lines = []
    for bound in _SIZES:
        below = sum(count for rows, count in counts.items() if rows <= bound)
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {below}')
    total = sum(counts.values())
    lines.append(f'{name}_bucket{{{labels},le="+Inf"}} {total}')
    lines.append(f"{name}_sum{{{labels}}} {sum(rows * count for rows, count in counts.items())}")
    lines.append(f"{name}_count{{{labels}}} {total}")
    return lines


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
