"""Counters of one model version: plain integers, written on the loop's thread only."""

from __future__ import annotations

import time
from typing import Any

#: Triton's reasons of ``nv_inference_request_failure``.
REJECTED, CANCELED, BACKEND, OTHER = "REJECTED", "CANCELED", "BACKEND", "OTHER"


class BatchCount:
    """Runs of one batch size: how many, and their nanoseconds."""

    __slots__ = ("count", "infer_ns", "input_ns", "output_ns")

    def __init__(self) -> None:
        self.count = self.input_ns = self.infer_ns = self.output_ns = 0


class Statistics:
    """What one model version did.  Times are in nanoseconds, summed over requests except in :attr:`batches`."""

    def __init__(self) -> None:
        self.success = 0
        self.success_ns = 0
        self.failures = {REJECTED: 0, CANCELED: 0, BACKEND: 0, OTHER: 0}
        self.failure_ns = 0
        self.queue_ns = 0
        self.input_ns = 0
        self.infer_ns = 0
        self.output_ns = 0
        self.inferences = 0
        self.executions = 0
        self.last_ns = 0
        self.restarts = 0
        self.batches: dict[int, BatchCount] = {}

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def run(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the engine."""
        self.executions += 1
        count = self.batches.get(rows)
        if count is None:
            count = self.batches[rows] = BatchCount()
        count.count += 1
        count.input_ns += input_ns
        count.infer_ns += infer_ns
        count.output_ns += output_ns

    def answered(self, rows: int, took_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one request that was answered."""
        self.success += 1
        self.success_ns += took_ns
        self.queue_ns += queue_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.inferences += rows
        self.last_ns = time.time_ns()

    def answered_now(self, rows: int, took_ns: int, infer_ns: int) -> None:
        """Count one request that was run alone and answered without waiting for anything."""
        self.success += 1
        self.success_ns += took_ns
        self.infer_ns += infer_ns
        self.inferences += rows
        self.executions += 1
        self.last_ns = time.time_ns()
        count = self.batches.get(rows)
        if count is None:
            count = self.batches[rows] = BatchCount()
        count.count += 1
        count.infer_ns += infer_ns

    def fail(self, reason: str, nanoseconds: int) -> None:
        """Count one request that was answered with an error, or not at all."""
        self.failures[reason] += 1
        self.failure_ns += nanoseconds

    def to_json(self, name: str, version: str) -> dict[str, Any]:
        """One entry of Triton's ``model_stats``."""
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ns // 1_000_000,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {
                "success": _duration(self.success, self.success_ns),
                "fail": _duration(self.failed, self.failure_ns),
                "queue": _duration(self.success, self.queue_ns),
                "compute_input": _duration(self.success, self.input_ns),
                "compute_infer": _duration(self.success, self.infer_ns),
                "compute_output": _duration(self.success, self.output_ns),
                "cache_hit": _duration(0, 0),
                "cache_miss": _duration(0, 0),
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(count.count, count.input_ns),
                    "compute_infer": _duration(count.count, count.infer_ns),
                    "compute_output": _duration(count.count, count.output_ns),
                }
                for rows, count in sorted(self.batches.items())
            ],
            "memory_usage": [],
            "response_stats": {},
        }


def _duration(count: int, nanoseconds: int) -> dict[str, int]:
    return {"count": count, "ns": nanoseconds}
