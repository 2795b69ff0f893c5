"""Functions of the user's own repository, named ``file.py:function``: load, call, and explain failures.

The file's folder and the repository's root are put on ``sys.path``, so helper imports work as they do
when the user runs the file.  The module's name follows from its path below the root, whatever the
folder the repository lies in.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.source_loader import SourceOnlyLoader

_INSTALLED = ("site-packages", "dist-packages")
_OWN_PACKAGE = "user_code"


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A callable of the user's repository.

    Attributes:
        reference: as written in the recipe, ``file.py:function``.
        root: root of the repository.
        path: the file.
        function: the callable itself.
    """

    reference: str
    root: Path
    path: Path
    function: Callable[..., Any]

    def call(self, *arguments: Any) -> Any:
        """The function's result for positional ``arguments``.

        Raises:
            ToolchainError: USER_CODE, with file and line of the user's code, when it raises.
        """
        try:
            return self.function(*arguments)
        except (Exception, SystemExit) as error:
            raise user_error(error, self.root, f"{self.reference} raised") from error

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def iterate(self) -> Iterator[Any]:
        """What the function, called without arguments, yields (or the elements of what it returns).

        Raises:
            ToolchainError: USER_CODE when it raises, or returns something that can't be iterated.
        """
        result = self.call()
        if isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
            raise ToolchainError(
                f"returned {type(result).__name__}; allowed: a generator or list of batches",
                where=self.reference,
                hint="write `yield {'input name': array}` once per batch",
                code=ExitCode.USER_CODE,
            )
        iterator = iter(result)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (Exception, SystemExit) as error:
                raise user_error(error, self.root, f"{self.reference} raised while yielding") from error
            yield item


def split_reference(reference: str, key: str = "") -> tuple[str, str]:
    """``("file.py", "function")`` of ``"file.py:function"``.

    Raises:
        ToolchainError: BAD_RECIPE when it does not have that form.
    """
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ToolchainError(
            f"got {reference!r}; allowed: 'file.py:function'",
            where=key,
            code=ExitCode.BAD_RECIPE,
        )
    return file, name


def load_function(reference: str, root: Path, key: str = "") -> UserFunction:
    """Import the file of ``reference`` and return its function.

    Args:
        reference: ``"file.py:function"``, the file relative to ``root`` or absolute.
        root: root of the user's repository.
        key: the recipe's key that holds the reference, for messages.

    Raises:
        ToolchainError: BAD_RECIPE for a missing file or function, USER_CODE when the import raises.
    """
    file, name = split_reference(reference, key)
    path = (root / file).resolve()
    if not path.is_file():
        raise ToolchainError(
            f"the file {file!r} does not exist{_similar_file(path)}",
            where=_where(key, reference),
            hint=f"paths start at {root}",
            code=ExitCode.BAD_RECIPE,
        )
    module = _import_file(path, root.resolve(), reference)
    function = getattr(module, name, None)
    if not callable(function):
        names = _own_callables(module)
        problem = f"{file!r} has no function {name!r}" if function is None else f"{name!r} is not a function"
        raise ToolchainError(
            f"{problem}{did_you_mean(name, names)}",
            where=_where(key, reference),
            hint=f"the file defines: {', '.join(names)}" if names else "the file defines no function",
            code=ExitCode.BAD_RECIPE,
        )
    return UserFunction(reference, root.resolve(), path, function)


def user_location(error: BaseException, root: Path) -> str:
    """``"file.py:12"``: the innermost line of the repository's own code that ``error`` passed through, or ``""``."""
    if isinstance(error, SyntaxError) and error.filename and (own := own_file(error.filename, root)):
        return f"{own}:{error.lineno}"
    found = ""
    for frame, line in _frames(error.__traceback__):
        if own := own_file(frame.f_code.co_filename, root):
            found = f"{own}:{line}"
    return found


def own_file(filename: str, root: Path) -> str:
    """``filename`` relative to ``root`` if it belongs to the repository's own code, else ``""``.

    Installed packages inside the repository (a virtual environment) and this package don't count.
    """
    path = Path(filename)
    if not path.is_absolute() or any(part in _INSTALLED for part in path.parts):
        return ""
    resolved, base = path.resolve(), root.resolve()
    if not resolved.is_relative_to(base) or resolved.is_relative_to(Path(__file__).resolve().parent):
        return ""
    if resolved.is_relative_to(Path(sysconfig.get_paths()["stdlib"]).resolve()):
        return ""
    return resolved.relative_to(base).as_posix()


def user_error(error: BaseException, root: Path, what: str) -> ToolchainError:
    """The USER_CODE error for an exception that the user's code let escape; a ToolchainError stays as it is."""
    if isinstance(error, ToolchainError):
        return error
    message = " ".join(str(error).split())
    return ToolchainError(
        f"{what} {type(error).__name__}" + (f": {_shortened(message)}" if message else ""),
        where=user_location(error, root),
        hint=_remedy(error, root),
        code=ExitCode.USER_CODE,
        debug="".join(traceback.format_exception(error)),
    )


def _remedy(error: BaseException, root: Path) -> str:
    """What the user can do about an exception of the user's code."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        if not any((root / entry).exists() for entry in (name, f"{name}.py")):
            return f"install {name} here (a shipped recipe's header says what it needs), or correct the import"
    if isinstance(error, PermissionError) and error.filename:
        return f"let this user read it: chmod u+r {error.filename} (and u+rx its folders)"
    return "fix the code at that line; --debug shows the whole traceback"


def _import_file(path: Path, root: Path, reference: str) -> ModuleType:
    for folder in (str(root), str(path.parent)):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    name = _module_name(path, root)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceOnlyLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except PermissionError as error:
        del sys.modules[name]
        if error.filename != str(path):
            raise user_error(error, root, f"importing {reference.rpartition(':')[0]} raised") from error
        hint = f"let this user read it: chmod u+r {path}"
        raise ToolchainError(
            "this file may not be read", where=reference, hint=hint, code=ExitCode.BAD_RECIPE
        ) from error
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise user_error(error, root, f"importing {reference.rpartition(':')[0]} raised") from error
    return module


def _module_name(path: Path, root: Path) -> str:
    """``digits/model.py`` -> ``digits.model``, so relative imports work and names don't depend on the folder.

    Where that name belongs to something else (the standard library's ``json``, an installed package
    named like the folder) the module goes below a package of our own.
    """
    inside = path.is_relative_to(root)
    parts = path.relative_to(root).with_suffix("").parts if inside else (path.parent.name, path.stem)
    parts = tuple(re.sub(r"\W", "_", part) for part in parts)
    if inside and len(parts) > 1 and _is_folder_package(parts[0], root / parts[0]):
        return ".".join(parts)
    packages = (_OWN_PACKAGE, *parts[:-1])
    folder = path.parent
    for count in range(len(packages), 0, -1):
        name = ".".join(packages[:count])
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        folder = folder.parent
    return ".".join((_OWN_PACKAGE, *parts))


def _is_folder_package(name: str, folder: Path) -> bool:
    """Whether ``import name`` gives the package that ``folder`` is."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return str(folder) in [str(Path(place).resolve()) for place in places]


def _frames(tb: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while tb is not None:
        yield tb.tb_frame, tb.tb_lineno
        tb = tb.tb_next


def _own_callables(module: ModuleType) -> list[str]:
    own = getattr(module, "__name__", "")
    return [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == own and n[0] != "_"]


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor does the folder {path.parent.name!r})"
    return did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")])


def _where(key: str, reference: str) -> str:
    return f"{key} = {reference!r}" if key else reference


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
