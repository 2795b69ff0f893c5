"""Installed distributions made for a test."""

from __future__ import annotations

import shutil
from pathlib import Path


def install_distribution(site: Path, name: str, version: str, module: str) -> None:
    """Install a distribution of one module into ``site``, in place of an older version of it."""
    stem = name.replace("-", "_")
    for old in site.glob(f"{stem}-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{stem}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / f"{module}.py").write_text(f"VERSION = {version!r}\n")
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
