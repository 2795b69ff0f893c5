"""What a Python file says, found by parsing it: functions, a model's inputs, and the files it imports.

Nothing is imported or run: the file may need packages that are not installed, or take minutes to load.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError

_FOLLOW = 8  # names passed on from file to file: longer chains are not worth following
_NOT_OWN = ("site-packages", "dist-packages")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Arguments:
    """The parameters of a function, in order: those without a default, those with one, and whether it
    takes further ones (``*args`` or ``**kwargs``).
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    variadic: bool = False


def parse_file(path: Path) -> ast.Module:
    """The syntax tree of a Python file.

    Raises:
        ToolchainError: USER_CODE, with the line, when it is not valid Python or cannot be read.
    """
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise ToolchainError(
            f"not valid Python: {error.msg}",
            where=f"{path}:{error.lineno}" if error.lineno else str(path),
            hint="correct the file, then run this again",
            code=ExitCode.USER_CODE,
        ) from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ToolchainError(f"cannot be read: {reason}", where=str(path), code=ExitCode.USER_CODE) from None


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Names that the file's top level defines or imports, with the statement of each (the last one wins)."""
    found: dict[str, ast.stmt] = {}
    for node in _top_level(tree.body):
        if isinstance(node, Function | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: node for alias in node.names})
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return found


def arguments_of(node: Function, skip_first: bool = False) -> Arguments:
    """The parameters of ``node``; ``skip_first`` leaves out ``self``."""
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args)]
    cut = len(names) - len(spec.defaults)
    required, optional = names[:cut], names[cut:]
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        (required if default is None else optional).append(argument.arg)
    return Arguments(tuple(required[skip_first:]), tuple(optional), bool(spec.vararg or spec.kwarg))


def call_arguments(node: ast.stmt) -> Arguments | None:
    """What calling the defined ``node`` takes; None if it cannot be seen (an import, an assignment)."""
    if isinstance(node, Function):
        return arguments_of(node)
    if isinstance(node, ast.ClassDef):
        init = _method(node, "__init__")
        return arguments_of(init, skip_first=True) if init else None
    return None


def forward_arguments(path: Path, name: str, folders: Sequence[Path]) -> Arguments | None:
    """The parameters of ``forward`` of the module that function (or class) ``name`` of ``path`` makes.

    Follows ``return Net(...)``, a local ``net = Net(...)``, a return annotation, base classes and
    imports from files below ``folders``.

    Returns:
        None when the code does not say (e.g. ``nn.Sequential`` or a model of another library).
    """
    return _forward(path, name, folders, _FOLLOW)


def imported_files(entries: Iterable[Path], folders: Sequence[Path]) -> list[Path]:
    """``entries`` and the files below ``folders`` that they import, directly or not, sorted.

    Args:
        entries: Python files.
        folders: where absolute imports are looked for, first match first.

    Files that are not valid Python are listed, but not followed.
    """
    found: set[Path] = set()
    waiting = [path.resolve() for path in entries]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        try:
            tree = parse_file(path)
        except ToolchainError:
            continue
        waiting += _imports(tree, path, folders)
    return sorted(found)


def _forward(path: Path, name: str, folders: Sequence[Path], depth: int) -> Arguments | None:
    if depth == 0:
        return None
    known = definitions(parse_file(path))
    node = known.get(name)
    if isinstance(node, ast.ImportFrom):
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        files = _resolve(node.module or "", node.level, path, folders)
        return next((f for p in files[-1:] if (f := _forward(p, original, folders, depth - 1))), None)
    if isinstance(node, ast.ClassDef):
        if method := _method(node, "forward"):
            return arguments_of(method, skip_first=True)
        names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    elif isinstance(node, Function):
        names = _made_by(node)
    else:
        return None
    others = [other for other in names if other != name and other in known]
    return next((f for other in others if (f := _forward(path, other, folders, depth - 1))), None)


def _made_by(function: Function) -> list[str]:
    """Names of classes or functions whose result ``function`` returns, likeliest first."""
    names: list[str] = []
    assigned: dict[str, ast.expr] = {}
    for node in _own_nodes(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned.update({t.id: node.value for t in targets if isinstance(t, ast.Name)})
    for node in _own_nodes(function):
        if isinstance(node, ast.Return) and node.value is not None:
            value = _without_methods(node.value)
            if isinstance(value, ast.Name):
                value = _without_methods(assigned.get(value.id, value))
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                names.append(value.func.id)
    if isinstance(function.returns, ast.Name):
        names.append(function.returns.id)
    elif isinstance(function.returns, ast.Constant) and isinstance(function.returns.value, str):
        names.append(function.returns.value)
    return names


def _without_methods(value: ast.expr) -> ast.expr:
    # Net().to("cpu").eval() is a Net, and so is net.eval().
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        inner = value.func.value
        if not isinstance(inner, ast.Call | ast.Name):
            break
        value = inner
    return value


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    # Definitions under `if TYPE_CHECKING:` or in `try: ... except ImportError:` are of the top level too.
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _top_level(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
        if isinstance(node, ast.Try):
            yield from _top_level(child for handler in node.handlers for child in handler.body)


def _method(node: ast.ClassDef, name: str) -> Function | None:
    return next((child for child in node.body if isinstance(child, Function) and child.name == name), None)


def _imports(tree: ast.Module, path: Path, folders: Sequence[Path]) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _resolve(alias.name, 0, path, folders)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from _resolve(module, node.level, path, folders)
            for alias in node.names:  # `from package import module`
                yield from _resolve(f"{module}.{alias.name}".lstrip("."), node.level, path, folders)
        elif isinstance(node, ast.Call) and _is_import_call(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield from _resolve(name.value.lstrip("."), 0, path, folders)


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _resolve(module: str, level: int, path: Path, folders: Sequence[Path]) -> list[Path]:
    """The files that importing ``module`` runs: each package's ``__init__.py``, the module's own file last.

    A relative import (``level`` > 0) starts at the importing file's package.  Empty when the module is
    not found below ``folders`` (an installed one).
    """
    starts = folders
    if level:
        starts = [path.parents[level - 1]] if level <= len(path.parents) else []
    for start in starts:
        files = _files_of(start, [part for part in module.split(".") if part])
        if files and not any(part in _NOT_OWN for part in files[-1].parts):
            return files
    return []


def _files_of(start: Path, parts: Sequence[str]) -> list[Path]:
    found = [start / "__init__.py"] if not parts else []
    folder = start
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        package, module = folder / part / "__init__.py", folder / f"{part}.py"
        if package.is_file():
            found.append(package)
        elif last and module.is_file():
            found.append(module)
        elif last or not (folder / part).is_dir():
            return []  # a namespace package has no file of its own, but must be a folder
        folder = folder / part
    return [path.resolve() for path in found if path.is_file()]
