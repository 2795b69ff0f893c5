"""Runs engines for other processors here, under QEMU's user-mode emulation, to check what they compute.

An engine ahead of time is linked with a small main program into a static executable, which needs nothing of the
other machine but its instructions; QEMU is told which processor to be, so that an instruction it lacks is a crash.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.tvm.aot.library import SOURCES, AheadOfTime, write_objects

if TYPE_CHECKING:
    import numpy as np

    from toolchain.tvm.link import Linker

_TIMEOUT_S = 900


class EmulatedLibrary:
    """An engine ahead of time as a static executable under emulation: what :class:`NativeEngine` is here."""

    def __init__(self, engine: AheadOfTime, linker: Linker, emulator: Sequence[str]) -> None:
        """Links the executable.

        Args:
            engine: for the other processor.
            linker: compiles C for it; its C library here is musl, from the ziglang package.
            emulator: the command that runs an executable, e.g. ``("qemu-aarch64-static", "-cpu", "cortex-a76")``.

        Raises:
            ToolchainError: COMPILE or MISSING_TOOL.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="toolchain-emulated-")
        self._engine, self._emulator = engine, list(emulator)
        folder = Path(self._folder.name)
        objects = write_objects(engine, linker, folder, static=True)
        (folder / "probe.c").write_bytes((SOURCES / "src" / "probe.c").read_bytes())
        linker.compile("probe.c", folder, static=True)
        linker.link_static(["probe.o", *objects], folder, "probe")
        self._program = folder / "probe"

    def close(self) -> None:
        """Removes the executable."""
        self._folder.cleanup()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs in order, for inputs in order.

        Raises:
            RuntimeError: the program crashed or failed; the text says how.
        """
        import numpy as np

        program = self._engine.program
        sizes = self._sizes(inputs)
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in inputs)
        command = [*self._emulator, str(self._program), *(str(sizes[name]) for name in program.dims)]
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(self._emulator)}: {_ending(done.returncode)}")
        outputs, start = [], 0
        scope = {f"d{i}": sizes[name] for i, name in enumerate(program.dims)}
        for tensor in program.outputs:
            shape = tuple(evaluate(size, scope) for size in tensor.shape)
            count = int(np.prod(shape, dtype=np.int64))
            outputs.append(np.frombuffer(done.stdout, tensor.dtype, count, start).reshape(shape))
            start += outputs[-1].nbytes
        if start != len(done.stdout):
            raise RuntimeError(f"the program wrote {len(done.stdout)} bytes instead of {start}")
        return outputs

    def _sizes(self, inputs: Sequence[np.ndarray]) -> dict[str, int]:
        sizes = {}
        for tensor, array in zip(self._engine.program.inputs, inputs, strict=True):
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, str) and size[1:].isdigit():
                    sizes[self._engine.program.dims[int(size[1:])]] = array.shape[axis]
        return sizes


def evaluate(size: int | str, scope: dict[str, int]) -> int:
    """A size from its C text and the dimensions ``d0``, ``d1``, ...: the operators mean the same in Python."""
    if isinstance(size, int):
        return size
    names = {
        "INT64_C": int, "tc_min": min, "tc_max": max,
        "tc_floor_div": lambda a, b: a // b, "tc_floor_mod": lambda a, b: a % b,
    }  # fmt: skip
    return int(eval(size, {"__builtins__": {}}, {**names, **scope}))  # our own text, from sizes.py


def _ending(status: int) -> str:
    if status >= 0:
        return f"it ended with {status}"
    name = signal.Signals(-status).name
    return f"it died of {name}" + (": an instruction that the processor lacks" if name == "SIGILL" else "")
