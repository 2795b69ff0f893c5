"""Times all contenders of one model in one process, in turns.

``python cpu_time.py`` reads a task as JSON from its standard input and prints one line of JSON.

Method.  Every contender is loaded and warmed up; then, in each round, each contender gets a block of a few
consecutive runs.  The first run of a block is not counted: it finds the caches full of the contender before it,
and that one's threads may still be spinning (a pause of a few milliseconds before each block lets them stop).
Blocks rather than single runs, since an engine in use finds its weights where its last run left them; turns
rather than one contender after the other, since the machine's speed drifts.  A round's figure is the median of
the block, a contender's figure the median over the rounds, and a ratio the median of the rounds' own ratios.

Runs of far under a millisecond are repeated within one reading of the clock, which itself takes about one
microsecond.

Clock: CPU time of the process with one thread (wall time there would count what other processes take), wall
time with several.  Both are in the JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_contenders import Opened, Task, Unavailable, open_contender
from cpu_models import ROOT, all_models

if TYPE_CHECKING:
    import numpy as np

BLOCK = 5
PAUSE_S = 0.01
WARM_UP = 3
SHORTEST_S = 0.5e-3


def load(request: dict[str, Any]) -> Task:
    """The task of a request."""
    import numpy as np

    model = all_models(request["dynamic"])[request["model"]]
    with np.load(request["inputs"]) as file:
        inputs = {spec.name: np.ascontiguousarray(file[spec.name]) for spec in model.inputs}
    return Task(model, Path(request["folder"]), Path(request["library"]), inputs, request["threads"])


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Open, warm up and time the contenders of ``request["contenders"]``."""
    task = load(request)
    opened: dict[str, Opened] = {}
    missing: dict[str, str] = dict(request.get("missing", {}))
    results: dict[str, list[np.ndarray]] = {}
    for name in request["contenders"]:
        try:
            contender = open_contender(name, task)
            results[name] = contender.outputs()
            for _ in range(WARM_UP):
                contender.run()
            opened[name] = contender
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as error:  # whatever an engine raises is that engine's result
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    errors = {name: _error(results, name) for name in opened}
    rounds = _rounds(opened, request["rounds"], request["seconds"])
    return {"wall_ms": rounds["wall"], "cpu_ms": rounds["cpu"], "missing": missing, "max_abs_error": errors}


def _rounds(opened: dict[str, Opened], count: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Median milliseconds of each block, by clock and contender."""
    times: dict[str, dict[str, list[float]]] = {c: {name: [] for name in opened} for c in ("wall", "cpu")}
    repeats = {name: _repeats(contender) for name, contender in opened.items()}
    end = time.perf_counter() + seconds
    for number in range(count):
        if number >= 3 and time.perf_counter() > end:
            break
        for name, contender in opened.items():
            time.sleep(PAUSE_S)
            contender.run()
            wall, cpu = [], []
            for _ in range(BLOCK):
                start, start_cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats[name]):
                    contender.run()
                cpu.append((time.process_time() - start_cpu) / repeats[name])
                wall.append((time.perf_counter() - start) / repeats[name])
            times["wall"][name].append(statistics.median(wall) * 1e3)
            times["cpu"][name].append(statistics.median(cpu) * 1e3)
    return times


def _repeats(contender: Opened) -> int:
    """How many runs to time together."""
    start = time.perf_counter()
    contender.run()
    return max(1, math.ceil(SHORTEST_S / (time.perf_counter() - start)))


def _error(results: dict[str, list[np.ndarray]], name: str) -> float | None:
    """Largest absolute difference from ONNX Runtime over all outputs; None without it."""
    import numpy as np

    expected = results.get("onnxruntime")
    if expected is None or len(expected) != len(results[name]):
        return None
    pairs = zip(expected, results[name], strict=True)
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)) for a, b in pairs)


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """One contender alone, run a few times: peak memory of the process in MB."""
    contender = open_contender(request["contenders"][0], load(request))
    for _ in range(WARM_UP):
        contender.run()
    # Not getrusage: its peak begins with what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    return {"peak_mb": int(status.partition("VmHWM:")[2].split()[0]) / 1024}


def main() -> None:
    """See the module's docstring."""
    sys.path.insert(0, str(ROOT))
    request = json.load(sys.stdin)
    if request["threads"] == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # What engines print must not get between the lines of JSON.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    answer = probe(request) if request.get("probe") else measure(request)
    os.write(answer_to, (json.dumps(answer) + "\n").encode())
    sys.stdout.flush()
    # Thread pools of five engines do not always end in order.
    os._exit(0)


if __name__ == "__main__":
    main()
