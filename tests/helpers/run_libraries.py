"""Runs compiled libraries where there is TVM's runtime and numpy only: a machine that is emulated, or this one.

``python run_libraries.py FOLDER``: for each ``NAME.so`` in it the inputs of ``NAME.npz`` (``INDEX/PARAMETER``), in the
order of the parameters' numbers; outputs go to ``NAME.out.npz`` (``INDEX/NUMBER``).  Each name is printed before its
library is opened, so that the last line says which one a crash belongs to.

``python run_libraries.py FOLDER RUNS`` runs each so many times, on one processor: for counts of instructions, as
threads that wait for work execute any number of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from toolchain.runtime.tvm_engine import aligned_copy, import_tvm_runtime, open_machine


def run(library: Path, tvm: object, runs: int) -> None:
    main = open_machine(library, tvm.cpu(0))["main"]  # type: ignore[attr-defined]
    feeds: dict[str, dict[int, np.ndarray]] = {}
    with np.load(library.with_suffix(".npz")) as stored:
        for key in stored.files:
            index, _, parameter = key.partition("/")
            feeds.setdefault(index, {})[int(parameter)] = stored[key]
    outputs = {}
    for index, arrays in feeds.items():
        tensors = [tvm.runtime.from_dlpack(aligned_copy(arrays[i])) for i in sorted(arrays)]  # type: ignore[attr-defined]
        for _ in range(runs):
            result = main(*tensors)
        for number, value in enumerate([result] if hasattr(result, "numpy") else result):
            outputs[f"{index}/{number}"] = value.numpy()
    np.savez(library.with_suffix(".out.npz"), **outputs)


def main(folder: Path, runs: int = 0) -> None:
    if runs:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tvm = import_tvm_runtime()
    for library in sorted(folder.glob("*.so")):
        print(library.stem, flush=True)
        run(library, tvm, runs or 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
