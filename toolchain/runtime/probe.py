"""A process that opens one engine and times it on request: the far end of the measure stage.

Run as ``python -m toolchain.runtime.probe ENGINE SAMPLE.npz THREADS PROVIDER``.  It answers each line
on standard input with one line of JSON: ``run N`` with N latencies in milliseconds, ``end`` with the
peak memory.  Being a process of its own, its peak memory and load time are this engine's alone.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB (1e6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM in /proc/self/status")


def main() -> None:
    folder, sample, threads, provider = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    import numpy as np

    from toolchain.errors import ToolchainError
    from toolchain.runtime import open_engine

    with np.load(sample) as file:
        inputs = {name: file[name] for name in file.files}
    base = peak_mb()
    started = time.perf_counter()
    try:
        engine = open_engine(folder, threads=threads, provider=provider)
        loaded = time.perf_counter()
        engine.run(inputs)
        first = time.perf_counter()
    except ToolchainError as error:
        print(json.dumps({"error": error.to_json()}), flush=True)
        return
    print(json.dumps({"load_ms": (loaded - started) * 1e3, "first_ms": (first - loaded) * 1e3}), flush=True)
    gc.disable()
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "end":
            break
        times = []
        for _ in range(int(count)):
            started = time.perf_counter()
            engine.run(inputs)
            times.append((time.perf_counter() - started) * 1e3)
        print(json.dumps(times), flush=True)
    print(json.dumps({"peak_mb": peak_mb() - base, "process_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
