"""What a stage's user code really read: imported files, opened files, listed folders, distributions.

The recorder hangs on Python's audit events, so it sees every ``open``, ``os.listdir`` and import of the
process, whoever calls it.  Reads made by compiled code do not raise audit events; the loaders of this
project that use such code announce the file with :func:`announce`.
Files of the standard library and of installed distributions are recorded by version, not by content.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_IGNORED = ("/proc/", "/sys/", "/dev/", "/run/")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def announce(path: str | os.PathLike[str]) -> None:
    """Tell a running recorder that ``path`` is about to be read by compiled code."""
    sys.audit("open", os.fspath(path), "rb", os.O_RDONLY)


class Recorder:
    """Records from its creation until :meth:`dependencies` is called.

    Args:
        root: root of the user's repository; files below it are recorded relative to it.
        private: folders whose content is the stage's own (inputs, outputs): never recorded.
    """

    def __init__(self, root: Path, private: Iterable[Path]) -> None:
        self._root = os.path.realpath(root)
        self._private = tuple(os.path.realpath(p) + os.sep for p in private)
        paths = sysconfig.get_paths()
        site = {os.path.realpath(paths[k]) for k in ("purelib", "platlib")}
        site |= {os.path.realpath(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))}
        self._site = tuple(p + os.sep for p in sorted(site))
        self._stdlib = tuple(os.path.realpath(paths[k]) + os.sep for k in ("stdlib", "platstdlib"))
        self._toolchain = os.path.dirname(os.path.realpath(__file__)) + os.sep
        self._read: set[str] = set()
        self._written: set[str] = set()
        self._listed: set[str] = set()
        _announce_safetensors()
        self._before = set(sys.modules)
        self._active = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, bytes | str | os.PathLike):
                writes = (isinstance(mode, str) and any(c in mode for c in "wxa+")) or (
                    isinstance(flags, int) and bool(flags & _WRITE_FLAGS)
                )
                (self._written if writes else self._read).add(os.path.abspath(os.fsdecode(path)))
        elif event in ("os.listdir", "os.scandir") and not _from_import_system():
            path = args[0] if args[0] is not None else "."
            if isinstance(path, bytes | str | os.PathLike):
                self._listed.add(os.path.abspath(os.fsdecode(path)))

    def dependencies(self) -> list[list[str]]:
        """Stop, and return sorted ``[kind, name]`` pairs.

        Kinds: ``file`` and ``folder`` (name: ``$ROOT/...`` or an absolute path), ``absent`` (a file that
        was asked for and did not exist), ``distribution`` (name of an installed distribution).
        """
        self._active = False
        found: set[tuple[str, str]] = set()
        packages: set[str] = set()
        for path in self._read - self._written:
            self._classify("file", path, found, packages)
        for path in self._listed:
            self._classify("folder", path, found, packages)
        for name in set(sys.modules) - self._before:
            module = sys.modules.get(name)
            source = getattr(module, "__file__", None)
            if isinstance(source, str):
                self._classify("file", os.path.abspath(source), found, packages)
        found |= {("distribution", name) for name in _distributions(packages)}
        return sorted([list(item) for item in found])

    def _classify(self, kind: str, path: str, found: set[tuple[str, str]], packages: set[str]) -> None:
        real = os.path.realpath(path)
        if path.startswith(_IGNORED) or "__pycache__" in path or (real + os.sep).startswith(self._private):
            return
        for folder in self._site:
            if real.startswith(folder):
                packages.add(real[len(folder) :].split(os.sep)[0].removesuffix(".py"))
                return
        if real.startswith(self._stdlib) or real.startswith(self._toolchain):
            return
        inside = real == self._root or real.startswith(self._root + os.sep)
        name = "$ROOT/" + os.path.relpath(real, self._root) if inside else real
        if kind == "file" and not os.path.exists(real):
            kind = "absent"
        elif kind == "file" and os.path.isdir(real):
            return
        found.add((kind, name))


def _from_import_system() -> bool:
    """Whether the audit event comes from importlib's own folder caches rather than from user code."""
    frame = sys._getframe(2)
    return "importlib" in frame.f_code.co_filename and "_bootstrap" in frame.f_code.co_filename


def _announce_safetensors() -> None:
    # safetensors opens files in Rust, unseen by audit hooks.
    try:
        import safetensors
        import safetensors.numpy
        import safetensors.torch
    except ImportError:
        return
    original: Any = safetensors.safe_open

    def safe_open(filename: Any, *args: Any, **options: Any) -> Any:
        announce(filename)
        return original(filename, *args, **options)

    for module in (safetensors, safetensors.numpy, safetensors.torch):
        module.safe_open = safe_open  # type: ignore[attr-defined, assignment]


def _distributions(packages: set[str]) -> set[str]:
    if not packages:
        return set()
    owners = importlib.metadata.packages_distributions()
    return {owner for package in packages for owner in owners.get(package, ())}
