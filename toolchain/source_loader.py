"""Imports the user's own Python from its source, never from a ``__pycache__`` file.

Python trusts a compiled file whose source has the same size and the same modification time in whole
seconds.  An edit that keeps both would run the old code while the cache notes the new file.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from typing import Any

INSTALLED = ("site-packages", "dist-packages")
"""Names of the folders that hold installed distributions."""


class SourceOnlyLoader(SourceFileLoader):
    """Compiles the source each time."""

    def path_stats(self, path: Any) -> Any:
        # importlib reads and writes a compiled file only for sources whose times it can get.
        raise OSError(f"{path}: compiled files are not used")


def install() -> None:
    """Let this process import everything but installed distributions, the standard library and this package so."""
    paths = sysconfig.get_paths()
    others = tuple(os.path.realpath(paths[name]) + os.sep for name in ("stdlib", "platstdlib"))
    others += (os.path.dirname(os.path.realpath(__file__)) + os.sep,)
    make = FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceOnlyLoader, SOURCE_SUFFIXES))

    def own(path: str) -> bool:
        real = os.path.realpath(path) + os.sep
        return not real.startswith(others) and not any(part in INSTALLED for part in real.split(os.sep))

    def hook(path: str) -> Any:
        if not own(path):
            raise ImportError("not the user's own folder", path=path)
        return make(path)

    sys.path_hooks.insert(0, hook)
    for path in [p for p in sys.path_importer_cache if own(p)]:
        del sys.path_importer_cache[path]
