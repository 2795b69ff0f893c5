"""Runs an exported Ray Serve application on a local cluster, kills replicas of its engine under load, and counts.

    python ray_driver.py PORT REQUESTS KILLS

with the application's folder on PYTHONPATH.  Prints one JSON line: requests answered rightly, those lost, replicas
killed, the most replicas seen, and the status of a request that does not fit.
"""

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray import serve

CLIENTS = 8


def replicas(application: str) -> set[int]:
    """Processes that run the engine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if words.startswith(f"ray::ServeReplica:{application}:engine".encode()):
            found.add(int(path.parent.name))
    return found


def asked(address: str, value: float) -> bool:
    """Whether a request was answered rightly: scores = relu(image @ WEIGHTS), linear in a positive factor."""
    image = [value * x for x in (1.0, -2.0, 3.0, -4.0)]
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 4], "data": image}]}
    request = urllib.request.Request(f"{address}/v2/models/sample/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        data = json.loads(answer.read())["outputs"][0]["data"]
    weights = [[(3 * i + j) / 7 - 0.5 for j in range(3)] for i in range(4)]
    expected = [max(0.0, sum(image[i] * weights[i][j] for i in range(4))) for j in range(3)]
    return all(abs(a - b) < 1e-3 * value for a, b in zip(data, expected, strict=True))


def refused(address: str) -> int:
    """The status of a request that does not fit."""
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
    request = urllib.request.Request(f"{address}/v2/models/sample/infer", json.dumps(body).encode())
    try:
        urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def main(port: int, requests: int, kills: int) -> None:
    import app

    name = f"a{uuid.uuid4().hex[:8]}"
    address = f"http://127.0.0.1:{port}"
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app.application, name=name)
    lost: list[str] = []
    counts = {"answered": 0, "most": 0}
    lock = threading.Lock()

    def client(number: int) -> None:
        try:
            right = asked(address, 1.0 + number % 7)
        except OSError as error:
            right = False
            lost.append(repr(error))
        with lock:
            counts["answered"] += right

    killed: list[int] = []
    with ThreadPoolExecutor(CLIENTS) as threads:
        results = [threads.submit(client, number) for number in range(requests)]
        for turn in range(kills):
            while sum(r.done() for r in results) < requests * (turn + 1) // (kills + 2):
                time.sleep(0.02)
            alive = sorted(replicas(name) - set(killed))
            counts["most"] = max(counts["most"], len(alive))
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])
        for result in results:
            result.result()
    line = {**counts, "lost": lost, "killed": len(killed), "refused": refused(address)}
    serve.shutdown()
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        main(*map(int, sys.argv[1:]))
    finally:
        ray.shutdown()
