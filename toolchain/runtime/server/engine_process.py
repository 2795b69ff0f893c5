"""The process that runs one engine for the server; ``python -m toolchain.runtime.server.engine_process SOCKET``.

The first message on the socket says what it runs.  It opens the engine, runs the self-test where it is asked to, says
that it is ready, and then answers one message with one message until the server closes the socket.  Nothing of the
server's network is ever inherited or imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ToolchainError
from toolchain.runtime.server.slots import HEADER, MESSAGE_BYTES, Kind, Slot, TensorLayout

if TYPE_CHECKING:
    import numpy as np

    from toolchain.runtime.engine import Engine

_CACHED_REQUESTS = 64
_TEXT_BYTES = 8192
_MOST_SLOTS = 16
_OOM_SCORE = "500"


def main() -> None:
    """Serve one engine over the socket that the arguments name."""
    # Ctrl-C in a terminal reaches the whole group; the server decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _go_first()
    channel = socket.socket(fileno=int(sys.argv[1]))
    arguments, fds = _receive_launch(channel)
    if not arguments:
        return
    try:
        engine, facts = open_tested(arguments)
    except ToolchainError as error:
        _send(channel, HEADER.pack(Kind.REFUSED, 0, 0, 0) + _refusal(error))
        return
    if _send(channel, HEADER.pack(Kind.READY, 0, 0, 0) + json.dumps(facts).encode()):
        _serve(channel, engine, fds, arguments["tensor_bytes"])


def _receive_launch(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What to run, and the slots' files; nothing if the server has gone.

    This process may have been started before it is known for what, and be told to import something meanwhile.
    """
    while True:
        message, fds, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, _MOST_SLOTS)
        arguments: dict[str, Any] = json.loads(message or b"{}")
        if "preload" not in arguments:
            return arguments, fds
        # What is wrong with it is said when the engine is opened.
        with contextlib.suppress(ToolchainError, ImportError):
            if arguments["preload"] == "tvm":
                from toolchain.runtime.tvm_engine import import_tvm_runtime

                import_tvm_runtime()
            elif arguments["preload"] == "onnxruntime":
                import onnxruntime  # noqa: F401


def _go_first() -> None:
    """Let the system end this process rather than the server where memory runs out: it can be replaced."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _refusal(error: ToolchainError) -> bytes:
    """The error as JSON that fits into a message."""
    data = error.to_json()
    details = [line[: _TEXT_BYTES // 8] for line in data["details"][:8]]
    return json.dumps(data | {"what": data["what"][:_TEXT_BYTES], "details": details, "debug": ""}).encode()


def _send(channel: socket.socket, message: bytes) -> bool:
    """Whether the server is still there to be told."""
    try:
        channel.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def open_tested(arguments: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """The engine, with every variant open, and how long it took; with ``selftest`` it has passed its self-test.

    Raises:
        ToolchainError: the engine cannot be opened, or its outputs are not the recorded ones (DAMAGED_BUNDLE).
    """
    from toolchain.runtime.engine import open_engine

    folder = Path(arguments["folder"])
    started = time.perf_counter()
    engine = open_engine(folder, arguments["threads"], arguments["provider"], spinning=False)
    engine.open_all()
    opened = time.perf_counter()
    if arguments["selftest"] is not None:
        _selftest(engine, folder, arguments["selftest"])
    return engine, {"load_s": opened - started, "selftest_s": time.perf_counter() - opened}


def _selftest(engine: Engine, folder: Path, tolerance: dict[str, float | None]) -> None:
    from toolchain.bundle.check import damaged
    from toolchain.bundle.manifest import Tolerance
    from toolchain.runtime.selftest import run_selftest

    result = run_selftest(engine, folder / "selftest.npz", Tolerance(**tolerance))
    if not result.passed:
        raise damaged(f"the self-test failed: {'; '.join(result.problems)}", "selftest.npz")


def _serve(channel: socket.socket, engine: Engine, fds: list[int], limit: int) -> None:
    contract = engine.contract
    inputs = TensorLayout([(spec.dtype, len(spec.shape)) for spec in contract.inputs])
    outputs = TensorLayout([(spec.dtype, len(spec.shape)) for spec in contract.outputs])
    slots = [Slot(fd) for fd in fds]
    # The message of a run holds its slot and sizes and nothing else, so it names what was mapped for it before.
    known: dict[bytes, tuple[int, dict[str, Any], dict[str, int]]] = {}
    clock = time.monotonic_ns
    while message := channel.recv(MESSAGE_BYTES):
        index = HEADER.unpack_from(message)[1]
        slot = slots[index]
        try:
            entry = known.get(message)
            if entry is None or entry[0] != slot.generation:
                views = slot.views(inputs, inputs.unpack(message[HEADER.size :]))
                arrays = dict(zip(contract.input_names, views, strict=True))
                entry = slot.generation, arrays, contract.sizes_of(arrays)
                if len(known) >= _CACHED_REQUESTS:
                    known.clear()
                known[message] = entry
            started = clock()
            results = engine.run_checked(entry[1], entry[2])
            spent = clock() - started
            answer = _put(slot, index, outputs, [results[spec.name] for spec in contract.outputs], spent, limit)
        except Exception as error:
            # Whatever the engine's library raises is about this run: the process can go on.
            text = getattr(error, "what", "") or f"{type(error).__name__}: {error}"
            answer = HEADER.pack(Kind.FAILED, index, 0, 0) + text.encode()[:_TEXT_BYTES]
        if not _send(channel, answer):
            break


def _put(slot: Slot, index: int, layout: TensorLayout, values: list[np.ndarray], spent: int, limit: int) -> bytes:
    """Write the outputs over the inputs; returns the answer."""
    shapes = tuple(value.shape for value in values)
    for view, value in zip(slot.views(layout, shapes, limit), values, strict=True):
        view[...] = value
    return layout.pack(Kind.DONE, index, spent, shapes)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Engines' libraries may hang or crash in their own tear-down; there is nothing left to lose.
    os._exit(0)
