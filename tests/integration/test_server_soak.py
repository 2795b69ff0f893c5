"""The soak of the server, short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_serve.py"


@pytest.mark.slow
@pytest.mark.xdist_group("server_versions")
def test_every_answer_is_right_while_versions_change_workers_die_and_clients_misbehave() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "20"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 wrong or lost" in result.stdout
