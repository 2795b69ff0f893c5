"""The edge benchmark's tables as text, with the goals beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CODE_GOAL_KB = 100
BUNDLE_GOAL_MB = 5.0
START_GOAL_MS = 30.0
PEAK_GOAL = 1.2


def heading(machine: Mapping[str, Any]) -> str:
    """The first lines of the output."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores; apache-tvm {machine['versions']['apache-tvm']}, onnxruntime "
        f"{machine['versions']['onnxruntime']}; MB are 10^6 bytes, KB 10^3\n"
    )


def sizes_head() -> str:
    return (
        "Sizes: runtime, engine (kernels, weights and plan), whole bundle with its runtime; ONNX Runtime: C library + "
        "model\n"
        f"(goals: runtime code <= {CODE_GOAL_KB} KB, bundle of int8 mobilenet_v2 <= {BUNDLE_GOAL_MB:g} MB)\n\n"
        f"{'model':<14}{'precision':<13}{'profile':<14}{'library KB':>11}{'bundle-run KB':>14}{'engine MB':>11}"
        f"{'bundle MB':>11}{'ONNX Runtime MB':>17}  goals"
    )


def sizes_line(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return _refused(row)
    library, program = row["runtime_bytes"].values()
    goals = {"code": max(library, program) <= CODE_GOAL_KB * 1e3}
    if row["model"] == "mobilenet_v2" and row["precision"].startswith("int8"):
        goals["bundle"] = row["bundle_bytes"] <= BUNDLE_GOAL_MB * 1e6
    return (
        f"{_name(row)}{library / 1e3:>11.1f}{program / 1e3:>14.1f}{row['engine_bytes'] / 1e6:>11.2f}"
        f"{row['bundle_bytes'] / 1e6:>11.2f}{row['onnxruntime_bytes'] / 1e6:>17.2f}  {_goals(goals)}"
    )


def native_head(profile: str, threads: int) -> str:
    return (
        f"\nOn this machine, profile {profile}, {threads} thread(s); ours / ONNX Runtime's C library, medians of "
        "processes\n"
        f"(goals: start of mobilenet_v2 < {START_GOAL_MS:g} ms; peak memory, less that of a process that does nothing, "
        f"<= {PEAK_GOAL:g} x (weights + arena))\n\n"
        f"{'model':<14}{'precision':<13}{'start to first ms':>19}{'in CPU ms':>16}{'median ms':>18}{'peak MB':>16}"
        f"{'bare MB':>9}{'weights':>9}{'arena':>7}{'least':>7}{'peak/planned':>14}"
        "  goals"
    )


def native_line(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return _refused(row)
    ours, theirs = row["ours"], row["onnxruntime"]
    goals = {}
    if row["model"] == "mobilenet_v2":
        goals = {
            "start": ours["start_ms"] < START_GOAL_MS,
            "start in CPU time": ours["start_cpu_ms"] < START_GOAL_MS,
            "peak": row["peak_ratio"] <= PEAK_GOAL,
        }
    return (
        f"{row['model']:<14}{row['precision']:<13}{_pair(ours['start_ms'], theirs['start_ms'], 1):>19}"
        f"{_pair(ours['start_cpu_ms'], theirs['start_cpu_ms'], 1):>16}"
        f"{_pair(ours['median_ms'], theirs['median_ms'], 3):>18}"
        f"{_pair(ours['peak_kb'] / 976.5625, theirs['peak_kb'] / 976.5625, 1):>16}{row['bare_kb'] / 976.5625:>9.1f}"
        f"{row['weight_bytes'] / 1e6:>9.2f}{row['arena_bytes'] / 1e6:>7.2f}{row['least_arena_bytes'] / 1e6:>7.2f}"
        f"{row['peak_ratio']:>14.2f}  {_goals(goals)}"
    )


def instructions_head() -> str:
    return (
        "\nInstructions of one inference on one thread, in millions, counted under emulation (QEMU's user mode with "
        "the profile's CPU): no times\n\n"
        f"{'model':<14}{'precision':<13}{'profile':<14}{'ours':>11}{'ONNX Runtime':>14}{'ratio':>8}{'int8/fp32':>11}"
    )


def instructions_line(row: Mapping[str, Any], fp32: Mapping[str, Any] | None) -> str:
    """A line; ``fp32`` is that of the same model and profile in fp32, for an int8 one."""
    if "refused" in row or "failed" in row:
        return _refused(row)
    text = f"{_name(row)}{row['ours'] / 1e6:>11.2f}{row['onnxruntime'] / 1e6:>14.2f}"
    text += f"{row['ours'] / row['onnxruntime']:>8.2f}"
    return text + (f"{row['ours'] / fp32['ours']:>11.2f}" if fp32 and "ours" in fp32 and fp32 is not row else "")


def _refused(row: Mapping[str, Any]) -> str:
    return f"{_name(row)}  {row.get('refused') or row['failed']}"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']:<14}{row['precision']:<13}{row.get('profile', ''):<14}"


def _pair(one: float, other: float, digits: int) -> str:
    return f"{one:.{digits}f} / {other:.{digits}f}"


def _goals(goals: Mapping[str, bool]) -> str:
    return ", ".join(f"{name} {'met' if met else 'MISSED'}" for name, met in goals.items())
