"""Worker processes that start before it is known what they will run: while the server imports its own libraries.

Needs the standard library only, so that the first can be on its way before anything else is imported.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from typing import NamedTuple


class Spare(NamedTuple):
    """A process that waits for its first message, and our end of its socket."""

    process: subprocess.Popen[bytes]
    channel: socket.socket


_spares: list[Spare] = []


def prepare() -> None:
    """Start a process for the first worker to come."""
    _spares.append(_spawn())


def preload(backend: str) -> None:
    """Let the prepared processes import what engines of ``backend`` need."""
    for spare in _spares:
        with contextlib.suppress(OSError):
            spare.channel.send(json.dumps({"preload": backend}).encode())


def take() -> Spare:
    """A process that was prepared, or else a new one."""
    while _spares:
        spare = _spares.pop()
        if spare.process.poll() is None:
            return spare
        spare.channel.close()
    return _spawn()


def discard() -> None:
    """End the processes that nobody took."""
    while _spares:
        process, channel = _spares.pop()
        channel.close()
        process.kill()
        process.wait()


def _spawn() -> Spare:
    # Message boundaries are kept, and the end of the process shows as the end of the stream.
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.runtime.server.engine_process", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            # Standard output is the server's own.
            stdout=_errors(),
            pass_fds=[theirs.fileno()],
        )
    return Spare(process, channel)


def _errors() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
