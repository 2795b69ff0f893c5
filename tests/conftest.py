"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.bench import Bench
from hypothesis import settings

from toolchain.cache import Cache
from toolchain.worker import WorkerPool

# The same examples each time, however slow the machine.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

TESTS = Path(__file__).parent

# A shell starts background jobs with the interrupt ignored, which passes on to children, and tests interrupt those.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _helpers_for_children() -> Iterator[None]:
    """Let worker children import ``helpers.*`` as the tests do."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [before])])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty stage cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The root of a small user repository: ``model.py``, which imports ``helper.py`` and reads ``data/numbers.txt``."""
    root = tmp_path / "repo"
    (root / "data").mkdir(parents=True)
    (root / "model.py").write_text(
        "from pathlib import Path\n"
        "import helper\n"
        "def build():\n"
        "    numbers = (Path(__file__).parent / 'data' / 'numbers.txt').read_text().split()\n"
        "    return helper.scale(sum(map(int, numbers)))\n"
    )
    (root / "helper.py").write_text("def scale(value):\n    return value * 2\n")
    (root / "data" / "numbers.txt").write_text("1 2 3\n")
    return root


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool() as pool:
        yield pool


@pytest.fixture
def bench(cache: Cache, repo: Path, pool: WorkerPool, tmp_path: Path) -> Bench:
    return Bench(cache, repo, pool, tmp_path / "trail")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)
