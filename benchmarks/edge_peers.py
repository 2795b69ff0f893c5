"""mobilenet_v2 in ExecuTorch, where it installs, beside our engine ahead of time: size and CPU time on this machine.

``python benchmarks/edge_peers.py`` makes a virtual environment for it once, in the user's cache, exports the recipe's
model with the XNNPACK delegate (8-bit numbers by its own quantizer, calibrated on noise: times need no accuracy), and
runs both on one thread in processes that take turns.  Its wheel has a Python interface and no program in C, so starts
and memory, most of them Python's and PyTorch's, are not compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PINS = ("executorch==1.5.1", "torchao>=0.18,<0.19")
# What the export imports; PyTorch and the rest are this environment's, as is what it would need on other systems not.
NEEDED = ("flatbuffers", "pyyaml", "ruamel.yaml", "tabulate", "pandas", "parameterized", "py-cpuinfo", "expecttest")
BASICS = ("packaging", "sympy", "mpmath", "python-dateutil", "pytz", "tzdata", "six", "kgb")
SHAPE = (1, 3, 224, 224)
RUNS, WARMUP = 60, 5


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes of each, by turns")
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *rest = options.child
        {"export": export, "run": run, "ours": run_ours}[kind](*rest)
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from cpu_models import all_models
    from edge_parts import Parts

    parts = Parts(None)
    python = _environment(parts.work / "executorch")
    print("CPU time of one inference on one thread, and the model's file\n")
    print(f"{'':14}{'ours ms':>10}{'ExecuTorch ms':>15}{'ratio':>8}{'ours MB':>10}{'ExecuTorch MB':>15}")
    for precision in ("fp32", "int8-static"):
        ours = parts.engine(all_models()["mobilenet_v2"], precision, "host").folder / "model.so"
        theirs = parts.work / "executorch" / f"mobilenet_v2-{precision}.pte"
        if not theirs.is_file():
            _child(python, "export", precision, str(theirs))
        rows: dict[str, list[float]] = {"ours": [], "run": []}
        for _ in range(options.rounds):
            rows["ours"].append(_child(Path(sys.executable), "ours", str(ours)))
            rows["run"].append(_child(python, "run", str(theirs)))
        mine, other = (statistics.median(row) for row in rows.values())
        own_mb, their_mb = (path.stat().st_size / 1e6 for path in (ours, theirs))
        figures = f"{mine:>10.2f}{other:>15.2f}{mine / other:>8.2f}{own_mb:>10.2f}{their_mb:>15.2f}"
        print(f"{precision:14}{figures}", flush=True)
    folder = next(python.parent.parent.glob("lib/python*/site-packages/executorch/lib"))
    for path in sorted(folder.glob("libexecutorch_*.so")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _environment(folder: Path) -> Path:
    """The interpreter of ExecuTorch's environment, which sees this one's packages too."""
    done = folder / "installed"
    python = folder / "bin" / "python"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "own.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *PINS, *NEEDED, *BASICS], check=True)
        done.touch()
    return python


def _child(python: Path, *arguments: str) -> Any:
    """What a process of this file prints last, as JSON."""
    command = [str(python), "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def export(precision: str, output: str) -> None:
    """In ExecuTorch's environment: writes the model as a .pte file."""
    sys.path.append(str(ROOT))
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from recipes.vision.mobilenet import build

    model, sample = build().eval(), (torch.rand(*SHAPE),)
    if precision != "fp32":
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = xnnpack_quantizer.XNNPACKQuantizer()
        quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
        model = prepare_pt2e(torch.export.export(model, sample).module(), quantizer)
        for seed in range(8):
            model(torch.rand(*SHAPE, generator=torch.Generator().manual_seed(seed)))
        model = convert_pt2e(model)
    lowered = to_edge_transform_and_lower(torch.export.export(model, sample), partitioner=[XnnpackPartitioner()])
    Path(output).write_bytes(lowered.to_executorch().buffer)
    print("null")


def run(path: str) -> None:
    """In ExecuTorch's environment: prints CPU milliseconds of one inference."""
    import torch
    from executorch.runtime import Runtime

    torch.set_num_threads(1)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    image = torch.rand(*SHAPE)
    _print_time(lambda: method.execute([image]))


def run_ours(path: str) -> None:
    """Prints CPU milliseconds of one inference."""
    sys.path.append(str(ROOT))
    import numpy as np

    from toolchain.native_engine import NativeEngine

    engine = NativeEngine(Path(path), 1)
    image = np.random.default_rng(0).random(SHAPE, np.float32)
    _print_time(lambda: engine.run([image]))


def _print_time(call: Callable[[], object]) -> None:
    times = []
    for count in range(WARMUP + RUNS):
        start = time.process_time()
        call()
        if count >= WARMUP:
            times.append((time.process_time() - start) * 1e3)
    print(json.dumps(statistics.median(times)))


if __name__ == "__main__":
    sys.exit(main())
