"""The emulated machines that other tests run compiled code on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.emulated import I8MM_CPU, ILLEGAL_INSTRUCTION, RISCV64, EmulatedMachine
from helpers.emulator_packages import SOURCES, EmulatorError, root_folder

# A program without a C library, which zig would build first, for minutes.
START = r"""
long call(long number, long a, long b, long c);
#if defined(__aarch64__)
__asm__(".globl _start\n_start: mov x0, sp\n bl entry\n"
        ".globl call\ncall: mov x8, x0\n mov x0, x1\n mov x1, x2\n mov x2, x3\n svc 0\n ret\n");
#elif defined(__arm__)
__asm__(".globl _start\n_start: mov r0, sp\n bl entry\n"
        ".globl call\ncall: push {r7, lr}\n mov r7, r0\n"
        " mov r0, r1\n mov r1, r2\n mov r2, r3\n svc 0\n pop {r7, pc}\n");
#else
__asm__(".globl _start\n_start: mv a0, sp\n call entry\n"
        ".globl call\ncall: mv a7, a0\n mv a0, a1\n mv a1, a2\n mv a2, a3\n ecall\n ret\n");
#endif
#ifdef __arm__
enum { WRITE = 4, EXIT = 1 };
#else
enum { WRITE = 64, EXIT = 93 };
#endif
int work(int arguments);
void entry(long *stack)
{
    call(EXIT, work((int)stack[0]), 0, 0);
}
"""
HELLO = 'int work(int arguments) { call(WRITE, 1, (long)"hello\\n", 6); return sizeof(void *) * 8; }'
LOOP = "int work(int arguments) { for (volatile int i = 0; i < 1000 * arguments; i++); return arguments > 3; }"
SDOT = (
    'int work(int n) { __asm__ volatile(".arch_extension dotprod\\n sdot v0.4s, v1.16b, v2.16b" ::: "v0"); return 5; }'
)


def static_program(folder: Path, triple: str, work: str) -> Path:
    (folder / "program.c").write_text(START + work)
    options = ["-O1", "-nostdlib", "-static", "-ffreestanding", "-fno-sanitize=all"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, *options, "-o", "program", "program.c"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("cpu", "arch", "triple", "bits"),
    [
        ("cortex-a53", "aarch64", "aarch64-linux-musl", 64),
        ("cortex-a7", "arm", "arm-linux-musleabihf", 32),
        (RISCV64, "riscv64", "riscv64-linux-musl", 64),
    ],
)
def test_static_programs_of_three_architectures_run(
    cpu: str, arch: str, triple: str, bits: int, tmp_path: Path
) -> None:
    static_program(tmp_path, triple, HELLO)
    done = EmulatedMachine(cpu, arch).run(["./program"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (bits, "hello\n")


def test_a_cpu_without_the_dot_product_stops_at_it_and_one_with_it_does_not(tmp_path: Path) -> None:
    program = static_program(tmp_path, "aarch64-linux-musl", SDOT)
    assert EmulatedMachine("cortex-a53").run([program]).returncode == ILLEGAL_INSTRUCTION
    assert EmulatedMachine("cortex-a76").run([program]).returncode == 5


def test_counts_of_instructions_repeat_and_grow_with_the_work(tmp_path: Path) -> None:
    program = static_program(tmp_path, "aarch64-linux-musl", LOOP)
    machine = EmulatedMachine("cortex-a53")
    few, again, more = (machine.instructions([program, *more]) for more in ([], [], ["one"]))
    assert few == again
    assert 3000 < more - few < 10000
    with pytest.raises(subprocess.CalledProcessError):
        machine.instructions([program, "2", "3", "4"])


def test_counts_of_python_differ_by_its_own_work_only() -> None:
    machine, code = (
        EmulatedMachine("cortex-a53"),
        "import sys, numpy\nfor i in range(int(sys.argv[1])): sum(range(1000))",
    )
    few, again, more = (machine.python_instructions(["-c", code, times]) for times in ("10", "10", "40"))
    assert abs(few - again) < 0.01 * (more - few)


def test_features_are_those_of_the_cpu() -> None:
    a53, a76, i8mm = (EmulatedMachine(cpu).features() for cpu in ("cortex-a53", "cortex-a76", I8MM_CPU))
    assert {"fp", "asimd"} <= a53
    assert "asimddp" not in a53
    assert {"asimddp", "asimdhp"} <= a76
    assert "i8mm" not in a76
    assert {"asimddp", "i8mm", "bf16"} <= i8mm
    assert "sve" not in i8mm


def test_python_of_the_emulated_machine_has_numpy_tvm_and_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, platform, sys, numpy, onnxruntime, tvm.runtime, own\n"
        "print(platform.machine(), sys.argv[1], sys.stdin.read(), numpy.arange(3).sum(), own.VALUE)\n"
        "print(os.environ.get('PLACE'), os.environ['GIVEN'])\n"
    )
    monkeypatch.setenv("PLACE", "the environment of the tests")
    (tmp_path / "own.py").write_text("VALUE = 7\n")
    done = EmulatedMachine("cortex-a53").python(
        [script, "argument"], path=[tmp_path], stdin="input", env={"GIVEN": "1"}
    )
    assert done.stdout == "aarch64 argument input 3 7\nNone 1\n", done.stderr


def test_without_a_source_of_arm64_packages_the_message_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "sources.list"
    empty.touch()
    monkeypatch.setenv(SOURCES, str(empty))
    with pytest.raises(EmulatorError, match=rf"(?s)python3.*\(arm64\) with apt.*set {SOURCES} to a sources.list"):
        root_folder()
