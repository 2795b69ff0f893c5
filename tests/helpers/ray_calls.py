"""Asks an application of the sample bundle on Ray Serve, and finds the processes of its replicas; needs no Ray."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path


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
