"""Machines of other architectures, emulated: programs run in QEMU's user mode with the CPU that is asked for.

    EmulatedMachine("cortex-a53").run(["./program", "argument"])          # a static aarch64 binary
    EmulatedMachine("cortex-a7", "arm").run(["./program"])
    EmulatedMachine(RISCV64, "riscv64").run(["./program"])
    EmulatedMachine("cortex-a76").python(["script.py"])                   # arm64 Python with numpy, tvm, onnxruntime
    EmulatedMachine("cortex-a53").instructions(["./program"])             # how many it executed

What it needs is fetched at the first use and kept (``emulator_packages.py``); ``make emulator`` does that alone.  An
instruction that the CPU doesn't have ends the program with :data:`ILLEGAL_INSTRUCTION`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.emulator_packages import (
    EmulatorError,
    cache_folder,
    counter_folder,
    python_of,
    qemu_folder,
    root_folder,
)

ILLEGAL_INSTRUCTION = -signal.SIGILL
"""Return code of a program that the CPU can't run: QEMU ends itself with the guest's signal."""

I8MM_CPU = "max,sve=off"
"""QEMU 7.2 has no CPU model with i8mm but ``max``; vectors of SVE are left out, as compiled code doesn't use them."""

RISCV64 = "rv64,v=true,vext_spec=v1.0"
"""RISC-V with the vector extension."""

_PARTS = {"cortex-a53": 0xD03, "cortex-a72": 0xD08, "cortex-a76": 0xD0B, "neoverse-n1": 0xD0C}
"""Part numbers in MIDR_EL1 (the CPUs' technical reference manuals); else that of a Neoverse V1, 0xd40."""

# Linux, arch/arm64/include/uapi/asm/hwcap.h and arch/arm64/kernel/cpuinfo.c: in the order of the bits.
_HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
_HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
    "dgh rng bti mte"
)
_READ_HWCAPS = """
import ctypes
read = ctypes.CDLL(None).getauxval
read.restype, read.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
print(read(16), read(26))
"""


@dataclass(frozen=True, slots=True)
class EmulatedMachine:
    """A machine with one CPU model.

    Attributes:
        cpu: QEMU's name of a CPU, with properties after commas; always given, as the default has every feature.
        arch: ``"aarch64"``, ``"arm"`` or ``"riscv64"``.

    Methods raise ``EmulatorError`` where QEMU or the root can't be set up; the message says what is missing.
    """

    cpu: str
    arch: str = "aarch64"

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a static program, or one that needs the libraries of the arm64 root (see :meth:`python`).

        The program sees ``env`` and nothing of this process's environment.
        """
        return _call([*self._qemu(), *command], cwd, env or {}, stdin, timeout)

    def python(
        self,
        arguments: Sequence[str | Path],
        *,
        path: Sequence[Path] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Runs arm64 Python with ``arguments``: a script and its own, or ``["-c", code]``.

        numpy, onnxruntime and TVM's runtime (not its compiler) can be imported, and what is in the folders ``path``.
        """
        sysroot = self.sysroot()
        qemu = [*self._qemu(), "-L", sysroot]
        command, full = _python_call(sysroot, arguments, path, env or {})
        return _call([*qemu, *command], cwd, full, stdin, timeout)

    def instructions(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> int:
        """How many instructions a program executes from start to end; exact with one thread.

        Raises:
            subprocess.CalledProcessError: the program fails.
        """
        return self._count([], command, cwd, env or {}, timeout)

    def python_instructions(
        self,
        arguments: Sequence[str | Path],
        *,
        path: Sequence[Path] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> int:
        """How many instructions arm64 Python executes (see :meth:`python`), its start included.

        The same from run to run but for some thousands: compare two numbers of repetitions, with one thread.

        Raises:
            subprocess.CalledProcessError: the script fails.
        """
        sysroot = self.sysroot()
        # Hashes would differ from run to run, and with them the work of Python's tables; numpy's threads wait actively.
        steady = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        command, full = _python_call(sysroot, arguments, path, {**steady, **(env or {})})
        return self._count(["-L", sysroot], command, cwd, full, timeout)

    def root_instructions(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float = 600
    ) -> int:
        """How many instructions a program executes that needs the arm64 root's libraries.

        Raises:
            subprocess.CalledProcessError: the program fails.
        """
        return self._count(["-L", self.sysroot()], command, None, env or {}, timeout)

    def _count(
        self,
        options: Sequence[str | Path],
        command: Sequence[str | Path],
        cwd: Path | None,
        env: Mapping[str, str],
        timeout: float,
    ) -> int:
        folder = counter_folder()
        # QEMU's own libraries, taken out of the environment of the program again.
        libraries = ":".join(str(path) for path in sorted((folder / "usr/lib").glob("*-linux-gnu")))
        qemu: list[str | Path] = [folder / f"usr/bin/qemu-{self.arch}", "-cpu", self.cpu, "-U", "LD_LIBRARY_PATH"]
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "count"
            plugin = ["-plugin", f"{folder / 'count.so'},out={out}", *options]
            full = {**env, "LD_LIBRARY_PATH": libraries}
            _call([*qemu, *plugin, *command], cwd, full, None, timeout).check_returncode()
            if not out.exists():
                raise EmulatorError(f"{qemu[0]} did not count: its plugin interface isn't version 1")
            return int(out.read_text())

    def features(self) -> frozenset[str]:
        """Features of an aarch64 CPU as ``/proc/cpuinfo`` names them."""
        text = (self.sysroot() / "proc/cpuinfo").read_text()
        return frozenset(text.partition("Features\t: ")[2].splitlines()[0].split())

    def sysroot(self) -> Path:
        """The arm64 root with a ``/proc/cpuinfo`` of this CPU: ONNX Runtime crashes on that of x86."""
        assert self.arch == "aarch64", "there is a root for aarch64 only"
        root = root_folder()
        folder = root.with_name(f"{root.name}.{self.cpu}")
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".sysroot-") as scratch:
                made = Path(scratch) / "sysroot"
                (made / "proc").mkdir(parents=True)
                for entry in root.iterdir():
                    (made / entry.name).symlink_to(Path("..") / root.name / entry.name)
                (made / "proc/cpuinfo").write_text(self._cpuinfo(root))
                try:
                    made.rename(folder)
                except OSError:
                    # Another process was first.
                    assert folder.is_dir()
        return folder

    def _qemu(self) -> list[str | Path]:
        program = qemu_folder() / f"qemu-{self.arch}"
        if not program.exists():
            raise EmulatorError(
                f"the QEMU in {program.parent} has no {program.name}; remove the folder to fetch it anew"
            )
        return [program, "-cpu", self.cpu]

    def _cpuinfo(self, root: Path) -> str:
        command, env = _python_call(root, ["-c", _READ_HWCAPS], (), {})
        done = _call([*self._qemu(), "-L", root, *command], None, env, None, 60)
        if done.returncode:
            raise EmulatorError(f"arm64 Python does not start with -cpu {self.cpu}: {done.stderr.strip()}")
        words = zip((_HWCAP, _HWCAP2), map(int, done.stdout.split()), strict=True)
        names = [name for table, bits in words for i, name in enumerate(table.split()) if bits >> i & 1]
        lines = [
            "BogoMIPS\t: 100.00", f"Features\t: {' '.join(names)}", "CPU implementer\t: 0x41", "CPU architecture: 8",
            "CPU variant\t: 0x0", f"CPU part\t: {_PARTS.get(self.cpu, 0xD40):#x}", "CPU revision\t: 0", "",
        ]  # fmt: skip
        count = len(os.sched_getaffinity(0))
        return "".join(f"{line}\n" for i in range(count) for line in [f"processor\t: {i}", *lines])


def _python_call(
    root: Path, arguments: Sequence[str | Path], path: Sequence[Path], env: Mapping[str, str]
) -> tuple[list[str | Path], dict[str, str]]:
    """Command and environment of arm64 Python."""
    python = {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": ":".join(str(folder) for folder in [*path, root / "site"]),
        "TVM_USE_RUNTIME_LIB": "1",
    }
    return [python_of(root), *arguments], {**python, **env}


def _call(
    command: Sequence[str | Path], cwd: Path | None, env: Mapping[str, str], stdin: str | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    # An empty standard input where none is given: subprocess closes it at once.
    return subprocess.run(
        command, cwd=cwd, env=dict(env), input=stdin or "", capture_output=True, text=True, timeout=timeout, check=False
    )


def main() -> None:
    """Sets everything up and says where and how long it took."""
    start = time.monotonic()
    try:
        for part in (qemu_folder, root_folder, counter_folder):
            print(part())
        for cpu in _PARTS:
            print(cpu, *sorted(EmulatedMachine(cpu).features()))
    except EmulatorError as error:
        sys.exit(f"emulator: {error}")
    print(f"set up in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
