"""``toolchain serve`` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(*words: object) -> Iterator[tuple[str, str]]:
    """The addresses, ``HOST:PORT``, of REST and gRPC of a server with these arguments on free ports."""
    command = [sys.executable, "-m", "toolchain.cli.main", "serve", "--http-port=0", "--grpc-port=0", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        try:
            line = process.stdout.readline()
            found = re.match(r"ready: http://(\S+) grpc://(\S+) ", line)
            assert found, process.stderr.read()
            yield found[1], found[2]
        finally:
            process.terminate()
            process.communicate(timeout=20)
