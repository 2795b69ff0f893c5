"""Virtual environments of servers that are no part of the development environment, made once and kept in a cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

ROOT = Path(__file__).parents[2]


def foreign_python(name: str, *pins: str) -> Path:
    """The interpreter of an environment with these packages and what they need; the project goes on PYTHONPATH.

    Raises:
        subprocess.CalledProcessError: pip cannot install them.
    """
    cache = user_cache_path("toolchain-servers")
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256("\n".join([sys.version, *pins]).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{key}"
    done = folder / "installed"
    with FileLock(cache / f"{name}.lock"):
        if not done.exists():
            # An environment cannot be moved, so a file tells whether it is whole.
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *pins], check=True)
            done.touch()
    return folder / "bin" / "python"
