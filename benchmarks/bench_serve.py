"""Print what serving costs: this server and others, one load generator, the same ONNX file in ONNX Runtime.

    python benchmarks/bench_serve.py [--models tiny,mobilenet_v2,minilm] [--servers NAME,...] [--seconds 3]

Requests a second, latencies and the server's CPU time per request, at 1, 8 and 32 connections.  Generator and server
share the machine, so requests a second say little where it has few processors; CPU per request does.  Every engine has
one thread.  Peers are installed into folders of their own in the user's cache by ``--install``; those that are not
there are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serve_load import Load, LoadError, generate
from serve_models import onnx_release, tiny
from serve_servers import OWN, Running, Server, Workload, plain_json, plain_raw, v2_binary, v2_grpc, v2_json

CONCURRENCY = (1, 8, 32)
#: What `pip install` is given for each peer.
PACKAGES = {
    "mosec": "mosec==0.9.8",
    "mlserver": "mlserver==1.7.1",
    "pytriton": "nvidia-pytriton==0.7.0",
    "litserve": "litserve==0.2.19",
    "bentoml": "bentoml==1.4.40",
    "kserve": "kserve==0.21.0",
    "ray": "ray[serve]==2.60.0",
}
GOALS = (
    ("tiny", "json", 40.0, "server CPU at most 40 us per request"),
    ("mobilenet_v2", "binary", 1.05, "server CPU at most 1.05 times the bare engine's"),
)


def _v2(model: str) -> dict[str, object]:
    path = f"/v2/models/{model}/infer"
    return {"json": lambda w: v2_json(w, path), "binary": lambda w: v2_binary(w, path)}


def servers(model: str) -> list[Server]:
    """All servers; ours serve ``model`` under its name, the others under ``model``."""
    own = {**_v2(model), "grpc": lambda w: v2_grpc(w, model)}
    other = {**_v2("model"), "grpc": lambda w: v2_grpc(w, "model")}
    live = "/v2/health/ready"
    batching = ("--max-batch", "8")
    no_binary = {key: wire for key, wire in other.items() if key != "binary"}
    floor = {"json": lambda w: v2_json(w, "/"), "binary": lambda w: v2_binary(w, "/")}
    return [
        Server("HTTP alone", OWN, "floor_app.py", floor),
        Server("toolchain process", "", "process", own, live, batching),  # type: ignore[arg-type]
        Server("toolchain thread", "", "thread", own, live, batching),  # type: ignore[arg-type]
        Server("toolchain inline", "", "inline", own, live, batching),  # type: ignore[arg-type]
        Server("mosec (JSON)", "mosec", "mosec_app.py", {"json": lambda w: plain_json(w, "/inference")}),
        Server(
            "mosec (bytes)", "mosec", "mosec_app.py", {"binary": lambda w: plain_raw(w, "/inference")}, env={"RAW": "1"}
        ),
        Server("Triton", "pytriton", "triton_app.py", other, live),  # type: ignore[arg-type]
        Server("MLServer", "mlserver", "mlserver_app.py", no_binary, live),  # type: ignore[arg-type]
        Server("KServe", "kserve", "kserve_app.py", other, live),  # type: ignore[arg-type]
        Server("LitServe", "litserve", "litserve_app.py", {"json": lambda w: plain_json(w, "/predict")}, "/health"),
        Server("BentoML", "bentoml", "bentoml_app.py", {"json": _bento}, "/readyz"),
        Server("Ray Serve", "ray", "ray_app.py", {"json": lambda w: plain_json(w, "/")}),
    ]


def _bento(work: Workload) -> object:
    from serve_load import Http

    body = json.dumps({"inputs": {name: array.tolist() for name, array in work.inputs.items()}}).encode()
    return Http("/predict", body, {"Content-Type": "application/json"})


@dataclass(frozen=True)
class Row:
    server: str
    protocol: str
    connections: int
    load: Load
    cpu: float


def workload(name: str, folder: Path) -> Workload:
    """The model, its release and its request; made once, in the user's cache and ``folder``."""
    import onnx
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    if name == "tiny":
        path = folder / "tiny.onnx"
        onnx.save(tiny(), path)
        inputs = {"x": rng.normal(size=(1, 16)).astype(np.float32)}
    else:
        from cpu_children import Workshop
        from cpu_models import all_models

        wanted = {"minilm": "minilm_b1_s128"}.get(name, name)
        model = all_models()[wanted]
        path = Path(Workshop(None, "x86-64-v3", False).prepare(model, "fp32")["folder"]) / "model.onnx"
        if name == "minilm":
            tokens = rng.integers(1000, 20000, (1, 128))
            inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        else:
            inputs = {"image": rng.normal(size=(1, 3, 224, 224)).astype(np.float32)}
    release = onnx_release(folder, name, onnx.load(path))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs), strict=True))
    return Workload(name, path, release, inputs, outputs)


def bare_engine(work: Workload, seconds: float) -> float:
    """CPU seconds of one run of the engine alone, with one thread, in a process of its own."""
    code = (
        "import sys, time, json, numpy as np, onnxruntime as ort\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = o.inter_op_num_threads = 1\n"
        "s = ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider'])\n"
        "x = dict(np.load(sys.argv[2]))\n"
        "end = time.perf_counter() + float(sys.argv[3]) / 3\n"
        "while time.perf_counter() < end: s.run(None, x)\n"
        "n, c, end = 0, time.process_time(), time.perf_counter() + float(sys.argv[3])\n"
        "while time.perf_counter() < end: s.run(None, x); n += 1\n"
        "print((time.process_time() - c) / n)\n"
    )
    inputs = work.release.parent / "inputs.npz"
    np.savez(inputs, **work.inputs)  # type: ignore[arg-type]
    words = [sys.executable, "-c", code, str(work.model), str(inputs), str(seconds)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure(server: Server, running: Running, work: Workload, protocols: list[str], seconds: float) -> list[Row]:
    """All points of one running server."""
    rows = []
    for protocol in protocols:
        if protocol not in running.wires:
            continue
        port = running.grpc if protocol == "grpc" else running.http
        for connections in CONCURRENCY:
            wires = [running.wires[protocol](work) for _ in range(connections)]
            try:
                load, cpu = generate(port, wires, work.verify, seconds / 4, seconds, running.cpu)
            except LoadError as error:
                print(f"  {server.name:18} {protocol:7} {connections:3}  {str(error)[:120]}", flush=True)
                continue
            row = Row(server.name, protocol, connections, load, cpu / load.requests)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    p50, p99 = row.load.percentile(0.5) * 1e3, row.load.percentile(0.99) * 1e3
    figures = f"{row.load.rate:9.0f} {p50:9.2f} {p99:9.2f} {row.cpu * 1e6:11.1f}"
    return f"  {row.server:18} {row.protocol:7} {row.connections:3} {figures}"


def cold_start(work: Workload, execution: str) -> tuple[float, float]:
    """Seconds from the command to the line that says ready, and CPU seconds until then; medians of five."""
    times, costs = [], []
    words = [sys.executable, "-m", "toolchain.cli.main", "serve", str(work.release), "--http-port", "0"]
    words += ["--grpc-port", "0", "--threads", "1", "--execution", execution]
    for _ in range(5):
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        times.append(time.perf_counter() - started)
        process.terminate()
        usage = os.wait4(process.pid, 0)[2]
        costs.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(times), statistics.median(costs)


def install(folder: Path) -> None:
    """Install every peer into a virtual environment of its own; what cannot be installed is said."""
    for name, package in PACKAGES.items():
        if (folder / name / "bin" / "python").exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        pip = [
            str(folder / name / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            package,
            "onnxruntime",
            "numpy",
        ]
        if subprocess.run(pip).returncode:
            print(f"{package} cannot be installed here")


def report_goals(rows: list[Row], engines: dict[str, float], names: dict[int, str]) -> None:
    """The goals, with what was found beside."""
    print("\ngoals (toolchain, the best of its executions at 8 connections)")
    for model, protocol, goal, text in GOALS:
        found = {
            r.server: r.cpu
            for r in rows
            if names[id(r)] == model
            and r.protocol == protocol
            and r.connections == 8
            and r.server.startswith("toolchain")
        }
        if not found:
            continue
        best = min(found, key=found.__getitem__)
        value = found[best] / engines[model] if goal < 10 else found[best] * 1e6
        print(f"  {model} {protocol}: {text}: {value:.2f} ({best}) {'holds' if value <= goal else 'does not hold'}")


def main() -> None:
    from platformdirs import user_cache_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,mobilenet_v2,minilm")
    parser.add_argument("--servers", default="", help="names, or their beginnings, separated by commas")
    parser.add_argument("--protocols", default="json,binary,grpc")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each point")
    parser.add_argument("--venvs", type=Path, default=user_cache_path("toolchain") / "bench-serve")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--cold", type=Path, help="a release whose cold start is measured, besides")
    options = parser.parse_args()
    options.venvs.mkdir(parents=True, exist_ok=True)
    if options.install:
        install(options.venvs)
    wanted = tuple(name for name in options.servers.split(",") if name)
    rows: list[Row] = []
    names: dict[int, str] = {}
    engines: dict[str, float] = {}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models.split(","):
            work = workload(name, Path(scratch))
            engines[name] = bare_engine(work, options.seconds)
            protocols = [p for p in options.protocols.split(",") if name == "tiny" or p != "grpc"]
            if name == "mobilenet_v2":
                protocols = [p for p in protocols if p != "json"] or protocols
            print(f"\n{name}: the engine alone takes {engines[name] * 1e6:.1f} us of CPU")
            print(f"  {'server':18} {'':7} {'con':>3} {'req/s':>9} {'p50 ms':>9} {'p99 ms':>9} {'CPU us/req':>11}")
            for server in servers(name):
                if wanted and not server.name.startswith(wanted):
                    continue
                for row in _measured(server, work, protocols, options.venvs, options.seconds):
                    rows.append(row)
                    names[id(row)] = name
        if options.cold:
            work = Workload("cold", options.cold, options.cold, {}, {})
            for execution in ("process", "thread", "inline"):
                wall, cpu = cold_start(work, execution)
                print(f"cold start to ready, {execution}: {wall:.2f} s, {cpu:.2f} s of CPU (goal: 1 s)")
    report_goals(rows, engines, names)


def _measured(server: Server, work: Workload, protocols: list[str], venvs: Path, seconds: float) -> list[Row]:
    if server.venv not in ("", OWN) and not (venvs / server.venv / "bin" / "python").exists():
        print(f"  {server.name:18} not installed: --install")
        return []
    usable = [p for p in protocols if p in server.wires]
    if not usable and not (work.name == "mobilenet_v2" and "json" in server.wires):
        return []
    try:
        with server.running(work, venvs) as running:
            # Servers without binary tensors are sent JSON, whatever it costs them.
            return measure(server, running, work, usable or ["json"], seconds)
    except LoadError as error:
        print(f"  {server.name:18} {error}", flush=True)
        return []


if __name__ == "__main__":
    main()
