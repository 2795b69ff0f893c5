"""What a stage's user code really read: imported files, opened files, listed folders, distributions.

The recorder hangs on Python's audit events, so it sees every ``open``, ``os.listdir`` and import of the
process, whoever calls it.  Reads made by compiled code do not raise audit events; the loaders of this
project that use such code announce the file with :func:`announce`.
Files of the standard library and of installed distributions are recorded by version, not by content.

Not seen: files read by other programs that the code starts, environment variables, and a bare
``exists()`` of a file that is never opened.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolchain.source_loader import INSTALLED

_EVENTS = frozenset({"open", "sqlite3.connect", "os.mkdir", "os.rename", "os.listdir", "os.scandir"})
_IGNORED = ("/proc/", "/sys/")
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND


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
        self._roots = tuple({os.path.abspath(root) + os.sep, os.path.realpath(root) + os.sep})
        self._private = tuple(os.path.realpath(p) + os.sep for p in private)
        paths = sysconfig.get_paths()
        site = {os.path.realpath(paths[k]) for k in ("purelib", "platlib")}
        site |= {os.path.realpath(p) for p in sys.path if p.endswith(INSTALLED)}
        self._site = tuple(p + os.sep for p in sorted(site))
        self._stdlib = tuple(os.path.realpath(paths[k]) + os.sep for k in ("stdlib", "platstdlib"))
        self._toolchain = os.path.dirname(os.path.realpath(__file__)) + os.sep
        self._read: set[str] = set()
        self._written: set[str] = set()
        self._listed: set[str] = set()
        _announce_safetensors()
        self._before = set(sys.modules)
        self._folders: dict[str, str] = {}
        self._active = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        # Every call of id() comes by here, and exporting a model makes some 100,000.
        if event in _EVENTS and self._active:
            # What a hook raises, the user's call would raise; an unusable path will do so by itself.
            with contextlib.suppress(OSError, ValueError):
                self._note(event, args)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            if isinstance(path, bytes | str | os.PathLike):
                # "r+" (numpy.memmap's default) reads what is there: a read, unless the code made the file itself.
                writes = (isinstance(mode, str) and any(c in mode for c in "wxa")) or (
                    isinstance(flags, int) and bool(flags & _WRITE_FLAGS)
                )
                (self._written if writes else self._read).add(_absolute(path))
        elif event == "sqlite3.connect":
            if isinstance(args[0], bytes | str | os.PathLike) and args[0] != ":memory:":
                self._read.add(_absolute(args[0]))
        elif event == "os.mkdir":
            # An existing one stays what it is, see exist_ok.
            if not os.path.lexists(args[0]):
                self._written.add(_absolute(args[0]))
        elif event == "os.rename":
            if _absolute(args[0]) in self._written:
                self._written.add(_absolute(args[1]))
        elif event in ("os.listdir", "os.scandir") and not _from_import_system():
            path = args[0] if args[0] is not None else "."
            if isinstance(path, bytes | str | os.PathLike):
                self._listed.add(_absolute(path))

    def dependencies(self) -> list[list[str]]:
        """Stop, and return sorted ``[kind, name]`` pairs.

        Kinds: ``file`` and ``folder`` (name: ``$ROOT/...`` or an absolute path), ``absent`` (a file that
        was asked for and did not exist), ``distribution`` (name of an installed distribution).
        """
        self._active = False
        found: set[tuple[str, str]] = set()
        installed: dict[str, set[tuple[str, str]]] = {}
        asked = [("file", path) for path in self._read - self._written]
        asked += [("folder", path) for path in self._listed - self._written]
        for name in set(sys.modules) - self._before:
            source = getattr(sys.modules.get(name), "__file__", None)
            if isinstance(source, str):
                asked.append(("file", os.path.abspath(source)))
        for kind, path in asked:
            item = self._classify(kind, path)
            if item is None:
                continue
            if package := self._package(path):
                installed.setdefault(package, set()).add(item)
            else:
                found.add(item)
        return sorted([list(item) for item in found | _by_distribution(installed)])

    def _classify(self, kind: str, path: str) -> tuple[str, str] | None:
        """The dependency that ``path`` is, or None when it is none of the user's."""
        real = self._real(path)
        # ".egg-info/" is the metadata of a checkout's own installation, read by whoever lists entry points.
        skipped = "__pycache__" in path or ".egg-info/" in path
        if skipped or path.startswith(_IGNORED) or (real + os.sep).startswith(self._private):
            return None
        if (real + os.sep).startswith(self._stdlib) and not self._package(path):
            return None
        if (real + os.sep).startswith(self._toolchain) or real + os.sep in self._site:
            return None
        try:
            mode = os.stat(path).st_mode
        except OSError:
            # importlib tries to open what is on sys.path, and some of that is no file.
            searched = path in map(os.path.abspath, sys.path)
            return ("absent", self._name(path, real)) if kind == "file" and not searched else None
        wanted = stat.S_ISREG if kind == "file" else stat.S_ISDIR
        return (kind, self._name(path, real)) if wanted(mode) else None

    def _name(self, path: str, real: str) -> str:
        # The name that was asked for comes first: a link may point elsewhere next time.
        for candidate in (path, real):
            for root in self._roots:
                if (candidate + os.sep).startswith(root):
                    return "$ROOT/" + os.path.relpath(candidate, root)
        return path

    def _package(self, path: str) -> str:
        """The top-level name under site-packages that ``path`` belongs to, or ``""``."""
        real = self._real(path)
        for folder in self._site:
            if real.startswith(folder):
                return real[len(folder) :].split(os.sep)[0]
        return ""

    def _real(self, path: str) -> str:
        """``os.path.realpath`` of an absolute path, which looks at each of its folders once."""
        folder, name = os.path.split(path)
        if (real := self._folders.get(folder)) is None:
            real = self._folders[folder] = os.path.realpath(folder)
        joined = os.path.join(real, name)
        return os.path.realpath(joined) if not name or os.path.islink(joined) else joined


def _absolute(path: bytes | str | os.PathLike[Any]) -> str:
    text = os.fsdecode(path)
    # What ".." means behind a symbolic link only the file system knows.
    return os.path.realpath(text) if ".." in text.split(os.sep) else os.path.abspath(text)


def _from_import_system() -> bool:
    """Whether the audit event comes from importlib's own look for modules and metadata, not from user code."""
    file = sys._getframe(3).f_code.co_filename
    return file.startswith("<frozen importlib") or f"{os.sep}importlib{os.sep}" in file


def _announce_safetensors() -> None:
    # safetensors opens files in Rust, unseen by audit hooks.
    try:
        import safetensors
    except ImportError:
        return
    original: Any = safetensors.safe_open

    def safe_open(filename: Any, *args: Any, **options: Any) -> Any:
        announce(filename)
        return original(filename, *args, **options)

    # Its submodules take the function from the package when they are imported, if they are not yet.
    for name in ("safetensors", "safetensors.numpy", "safetensors.torch"):
        if (module := sys.modules.get(name)) is not None:
            module.safe_open = safe_open  # type: ignore[attr-defined]


def _by_distribution(installed: dict[str, set[tuple[str, str]]]) -> set[tuple[str, str]]:
    """The distributions that own top-level names of site-packages; what none owns stays as it is."""
    if not installed:
        return set()
    owners: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        # Much quicker than importlib.metadata.packages_distributions(), and it knows single files.
        files = "\n" + (distribution.read_text("RECORD") or "")
        listed = (distribution.read_text("top_level.txt") or "").split()
        for name in installed:
            if name not in listed and f"\n{name}/" not in files and f"\n{name}," not in files:
                continue
            owners.setdefault(name, set()).add(distribution.metadata["Name"])
    found: set[tuple[str, str]] = set()
    for package, items in installed.items():
        found |= {("distribution", name) for name in owners.get(package, ())} or items
    return found
