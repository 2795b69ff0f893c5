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
import uuid
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from ray_calls import asked, refused, replicas

CLIENTS = 8


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
