"""KServe's own clients, unmodified, against this server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.foreign_venv import foreign_python

from tests.helpers.served import served
from tests.helpers.serving_core import obedient_release

CLIENT = Path(__file__).parents[1] / "helpers" / "kserve_client.py"


@pytest.mark.slow
def test_kserves_clients_work_over_rest_and_grpc(tmp_path: Path) -> None:
    try:
        python = foreign_python("kserve", "kserve==0.21.0")
    except subprocess.CalledProcessError:
        pytest.skip("kserve 0.21.0 cannot be installed here")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with served(obedient_release(tmp_path), "--threads=1") as addresses:
        ran = subprocess.run([python, CLIENT, *addresses], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    answer = {"model": "obedient", "id": "7", "name": "y", "dtype": "float32"}
    answer |= {"values": [[0.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0]]}
    # KServe's client does not read the version out of JSON.
    rest, rpc = answer | {"version": None}, answer | {"version": "1.0.0"}
    health = {"live": True, "ready": True, "model": True}
    assert found["http"] == health | {"json": rest, "binary": rest, "unknown": 404}
    assert found["grpc"] == health | {"raw": rpc, "contents": rpc, "unknown": "NOT_FOUND"}
