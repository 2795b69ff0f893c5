import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.host import CPUINFO_VARIABLE, CudaDevice, Host, cuda_runs, detect_host, incompatibilities

REPO = Path(__file__).resolve().parents[2]

Pretend = Callable[[str], Host]

RASPBERRY_PI_5 = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

Revision\t: c04170
Serial\t\t: 0
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""

UNLIKE_CORES = """\
processor\t: 0
Features\t: fp asimd crc32
CPU implementer\t: 0x41
CPU part\t: 0xd03

processor\t: 1
Features\t: fp asimd crc32 aes
CPU implementer\t: 0x41
CPU part\t: 0xd08
"""

HASWELL = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 60
model name\t: Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz
flags\t\t: fpu lm nx syscall cmov cx8 cx16 fxsr mmx sse sse2 pni ssse3 sse4_1 sse4_2 popcnt lahf_lm avx avx2 f16c fma \
bmi1 bmi2 abm movbe
"""

# A driver of two devices with the five functions that detection calls, to run its ctypes calls for real.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 100 + ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 100 ? "NVIDIA A100" : "NVIDIA H100", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device == 100 ? 8 : 9) : attribute == 76 ? 0 : -1; return 0; }
"""

SERVER = Host(
    os="linux",
    arch="x86_64",
    cpu_model="AMD EPYC 7763",
    cpu_features=frozenset({"avx2", "fma"}),
    cores=4,
    memory_mb=8192,
    glibc="2.36",
)
NEEDS = {
    "os": "linux",
    "arch": "x86_64",
    "cpu_features": ["avx2", "fma"],
    "libc": {"name": "glibc", "min": "2.28"},
    "cuda_arch": None,
}


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    def use(cpuinfo: str) -> Host:
        path = tmp_path / "cpuinfo"
        path.write_text(cpuinfo)
        monkeypatch.setenv(CPUINFO_VARIABLE, str(path))
        return detect_host()

    return use


def test_this_machine_is_described_as_its_own_tools_describe_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CPUINFO_VARIABLE, raising=False)
    host = detect_host()
    assert host.os == "linux"
    assert host.arch == os.uname().machine
    assert host.cores == int(subprocess.check_output(["nproc"], env={"PATH": os.environ["PATH"]}))
    assert host.memory_mb == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    assert host.glibc in subprocess.check_output(["ldd", "--version"], text=True).splitlines()[0]
    assert {"x86_64": "sse2", "aarch64": "asimd"}[host.arch] in host.cpu_features


def test_an_arm_board_is_recognised_from_its_cpuinfo(pretend: Pretend) -> None:
    host = pretend(RASPBERRY_PI_5)
    assert (host.arch, host.cpu_model) == ("aarch64", "Raspberry Pi 5 Model B Rev 1.0")
    assert "asimddp" in host.cpu_features
    assert host.cpu_ids == ((0x41, 0xD0B),)


def test_only_what_every_core_has_counts_as_a_feature(pretend: Pretend) -> None:
    host = pretend(UNLIKE_CORES)
    assert host.cpu_features == {"fp", "asimd", "crc32"}
    assert host.cpu_model == "ARM 0x41/0xd03 + 0x41/0xd08"


def test_an_intel_desktop_is_recognised_from_its_cpuinfo(pretend: Pretend) -> None:
    host = pretend(HASWELL)
    assert (host.arch, host.cpu_vendor, host.cpu_ids) == ("x86_64", "GenuineIntel", ((6, 60),))


@pytest.mark.parametrize("cpuinfo", ["", "flags", ":::\n\n::", "CPU part : many\nCPU implementer : x", "\x00\n" * 9])
def test_a_cpuinfo_that_makes_no_sense_leaves_the_description_empty(cpuinfo: str, pretend: Pretend) -> None:
    host = pretend(cpuinfo)
    assert host.cpu_features == frozenset()
    assert host.cpu_ids == ()


def test_a_missing_cpuinfo_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPUINFO_VARIABLE, "/nonexistent/cpuinfo")
    assert detect_host().cpu_features == frozenset()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_cuda_devices_are_read_through_the_driver_library(tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    program = "from toolchain.host import detect_host; print(*detect_host().cuda, sep='\\n')"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPO, capture_output=True, text=True, check=True
    )
    devices = [CudaDevice("NVIDIA A100", "sm_80"), CudaDevice("NVIDIA H100", "sm_90")]
    assert done.stdout.splitlines() == [str(device) for device in devices]


def test_a_broken_driver_library_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    program = "from toolchain.host import detect_host; print(detect_host().cuda)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "()\n")


def test_a_machine_that_has_everything_is_compatible() -> None:
    assert incompatibilities(NEEDS, SERVER) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"cpu_features": ["avx2", "avx512_vnni"]},
            "needs CPU feature avx512_vnni, which this machine (AMD EPYC 7763) lacks",
        ),
        (
            {"cpu_features": ["avx512f", "avx512_vnni"]},
            "needs CPU features avx512_vnni, avx512f, which this machine (AMD EPYC 7763) lacks",
        ),
        ({"os": "windows"}, "needs operating system windows, this machine runs linux"),
        (
            {"arch": "aarch64", "cpu_features": ["asimd"]},
            "needs a processor of architecture aarch64, this machine is x86_64",
        ),
        ({"libc": {"name": "glibc", "min": "2.40"}}, "needs glibc 2.40 or newer, this machine has 2.36"),
        ({"cuda_arch": "sm_80"}, "needs a CUDA device of architecture sm_80, this machine has no CUDA device"),
    ],
)
def test_each_reason_against_a_machine_is_one_line(change: dict[str, object], line: str) -> None:
    assert incompatibilities({**NEEDS, **change}, SERVER) == [line]


def test_all_reasons_are_given_at_once() -> None:
    needs = {**NEEDS, "cpu_features": ["amx_tile"], "libc": {"name": "glibc", "min": "3.0"}, "cuda_arch": "sm_90"}
    assert len(incompatibilities(needs, SERVER)) == 3


def test_glibc_versions_are_compared_as_numbers() -> None:
    assert incompatibilities(NEEDS, replace(SERVER, glibc="2.4")) != []
    assert incompatibilities(NEEDS, replace(SERVER, glibc="2.100")) == []


def test_another_c_library_is_named() -> None:
    reasons = incompatibilities(NEEDS, replace(SERVER, glibc=""))
    assert reasons == ["needs glibc 2.28 or newer, this machine has another C library"]


def test_one_suitable_gpu_among_several_is_enough() -> None:
    old, new = CudaDevice("Tesla V100", "sm_70"), CudaDevice("A100", "sm_80")
    needs = {**NEEDS, "cuda_arch": "sm_80"}
    assert incompatibilities(needs, replace(SERVER, cuda=(old, new))) == []
    assert incompatibilities(needs, replace(SERVER, cuda=(old,))) == [
        "needs a CUDA device that runs sm_80 code, this machine has Tesla V100 (sm_70)"
    ]


@pytest.mark.parametrize(
    ("code", "device", "runs"),
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_90a", "sm_90", True),
        ("sm_100a", "sm_103", False),
        ("sm_100", "sm_103", True),
        ("nonsense", "sm_90", False),
    ],
)
def test_machine_code_for_a_gpu_runs_on_the_same_major_version_with_no_lower_minor(
    code: str, device: str, runs: bool
) -> None:
    assert cuda_runs(code, device) is runs


def test_detection_needs_nothing_but_the_standard_library() -> None:
    program = "import sys, toolchain.host; print(*sorted({'pydantic', 'numpy', 'torch', 'tvm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == ""
