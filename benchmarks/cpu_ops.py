"""Where the time of our engine goes: every kernel call of the virtual machine timed.

``python cpu_ops.py REQUEST`` as :mod:`cpu_time`, from standard input; prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from typing import Any

from cpu_contenders import Task
from cpu_models import ROOT
from cpu_time import load

RUNS = 15


def profile(task: Task, runs: int = RUNS) -> list[dict[str, Any]]:
    """Kernels by time: name, shapes of the arguments (the output last), calls and milliseconds per run (median).

    The clock is read in the VM's instrument before and after each call, which adds a few microseconds to each.
    """
    from toolchain.tvm.library import load_tvm

    tvm = load_tvm()
    machine = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(str(task.library)), tvm.cpu())
    tensors = [tvm.runtime.tensor(array) for array in task.inputs.values()]
    clock = time.process_time if task.threads == 1 else time.perf_counter
    calls: list[tuple[str, str, float]] = []
    started = [0.0]

    def watch(_function: Any, name: str, before: bool, _result: Any, *arguments: Any) -> int:
        if before:
            started[0] = clock()
        else:
            passed = clock() - started[0]
            calls.append((name, _shapes(arguments), passed))
        return 0

    for _ in range(3):
        machine["main"](*tensors)
    machine.set_instrument(tvm.ffi.convert(watch) if hasattr(tvm, "ffi") else watch)
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = {}
    for _ in range(runs):
        calls.clear()
        machine["main"](*tensors)
        once: dict[tuple[str, str], list[float]] = defaultdict(list)
        for name, shapes, passed in calls:
            once[name, shapes].append(passed)
        for key, times in once.items():
            samples[key].append(sum(times))
            counts[key] = len(times)
    rows = [
        {"kernel": n, "shapes": s, "calls": counts[n, s], "ms": sorted(t)[len(t) // 2] * 1e3}
        for (n, s), t in samples.items()
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))


def _shapes(arguments: tuple[Any, ...]) -> str:
    shapes = [list(map(int, a.shape)) for a in arguments if hasattr(a, "shape") and hasattr(a, "dtype")]
    return " ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)


def main() -> None:
    """See the module's docstring."""
    sys.path.insert(0, str(ROOT))
    request = json.load(sys.stdin)
    if request["threads"] == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(profile(load(request))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
