"""A real Triton Inference Server with its Python backend, on this machine's CPU, from packages of the index.

``nvidia-pytriton`` carries ``tritonserver`` 2.51 and the Python backend (no onnxruntime backend).  Its wheel is
unpacked into a cache folder, since it asks for a numpy older than ours: the backend's stub is built for numpy 1, and
answers tensors of numpy 2 with a wrong size.  The stub ignores the environment but takes the Python of
``python3`` on PATH: a virtual environment of our own, with that numpy.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from helpers.ports import free_ports

PINS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
_VERSION = "1"
_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


class TritonMissingError(Exception):
    """This machine cannot run it; the message says why."""


@dataclass(frozen=True, slots=True)
class Triton:
    """A running server."""

    http: str
    grpc: str
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def triton_folder() -> Path:
    """The unpacked server, fetched at the first use (74 MB) and kept.

    Raises:
        TritonMissingError: another architecture or C library, or a Python that the server has no stub for.
        subprocess.CalledProcessError: pip cannot download.
    """
    libc, version = platform.libc_ver()
    if sys.platform != "linux" or platform.machine() != "x86_64" or libc != "glibc":
        raise TritonMissingError("nvidia-pytriton has wheels for Linux on x86-64 with glibc alone")
    if tuple(map(int, version.split("."))) < (2, 35):
        raise TritonMissingError(f"nvidia-pytriton needs glibc 2.35, this machine has {version}")
    if _libpython() is None:
        raise TritonMissingError(f"the stub of the Python backend needs libpython{_PYTHON}.so.1.0")
    cache = user_cache_path("toolchain-triton")
    folder = cache / f"triton-{_VERSION}-{_PYTHON}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".triton-") as scratch:
                made = Path(scratch) / "made"
                _unpack(made, Path(scratch) / "download")
                made.rename(folder)
    return folder


def _unpack(folder: Path, download: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary=:all:", "--dest", download, *PINS], check=True)
    [server] = download.glob("nvidia_pytriton-*.whl")
    [numpy] = download.glob("numpy-*.whl")
    with zipfile.ZipFile(server) as archive:
        archive.extractall(folder)
    root = folder / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonMissingError(f"nvidia-pytriton has no stub for Python {_PYTHON}")
    place = root / "backends" / "python" / stub.name
    shutil.copyfile(stub, place)
    for program in (place, root / "bin" / "tritonserver"):
        program.chmod(0o755)
    with zipfile.ZipFile(numpy) as archive:
        archive.extractall(folder / "numpy")


def _libpython() -> str | None:
    """Folder of the shared libpython of this version; "" where the dynamic loader finds it itself."""
    folder = sysconfig.get_config_var("LIBDIR") or ""
    if (Path(folder) / f"libpython{_PYTHON}.so.1.0").exists():
        return str(folder)
    return "" if ctypes.util.find_library(f"python{_PYTHON}") else None


def _environment(folder: Path, scratch: Path, packages: Sequence[Path]) -> dict[str, str]:
    """PATH starts with a virtual environment that has numpy 1 and sees ``packages`` (folders) after it."""
    venv = scratch / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = venv / "lib" / f"python{_PYTHON}" / "site-packages"
    lines = [str(folder / "numpy"), *map(str, packages)]
    (site / "packages.pth").write_text("\n".join(lines) + "\n")
    libraries = [str(folder / "nvidia_pytriton.libs"), *filter(None, [_libpython()])]
    return os.environ | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }


@contextmanager
def triton_serving(
    repository: Path, scratch: Path, *arguments: str, packages: Sequence[Path] = (), ready: bool = True
) -> Iterator[Triton]:
    """A server of a model repository on free ports, ready unless ``ready`` is false (then it is only live).

    Args:
        repository: the folder.
        scratch: an empty folder, for its Python and its log.
        arguments: more of its command line.
        packages: folders of packages that its Python can import besides numpy.
        ready: wait until every model is ready.
    """
    folder = triton_folder()
    root = folder / "pytriton" / "tritonserver"
    http, grpc = free_ports(2)
    log = scratch / "triton.log"
    command = [
        root / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={root / 'backends'}",
        f"--cache-directory={root / 'caches'}",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--allow-metrics=false",
        *arguments,
    ]
    environment = _environment(folder, scratch, packages)
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            _wait(process, f"http://127.0.0.1:{http}/v2/health/{'ready' if ready else 'live'}", log)
            yield Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"Triton is not ready:\n{log.read_text(errors='replace')[-4000:]}")
