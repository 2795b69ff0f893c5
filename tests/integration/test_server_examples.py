"""Triton's published example programs; they are not part of this repository, so their folder is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_examples.py"
FOLDER = "TRITON_CLIENT_EXAMPLES"


@pytest.mark.slow
@pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} names no folder of Triton's Python examples")
def test_published_examples_pass_unmodified_but_for_what_is_documented() -> None:
    words = [sys.executable, str(SCRIPT), os.environ[FOLDER], "--http-port", "0", "--grpc-port", "0"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("\npass") + result.stdout.startswith("pass") >= 24, result.stdout
