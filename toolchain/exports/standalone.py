"""Writes one Python file that runs a bundle's engine where this package is not installed.

The file is cut out of this package's own sources: the definitions that the roots need, with what those need in turn,
in an order in which they can be executed.  So it is the same code that ran when the bundle was verified.
"""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from toolchain.errors import ToolchainError

_PACKAGE = "toolchain"
_ENGINE = "toolchain.runtime.engine"
_ROOTS = {
    "aot": ("toolchain.runtime.aot_engine", "aot_opener"),
    "vm": ("toolchain.runtime.tvm_engine", "tvm_opener"),
    "": ("toolchain.runtime.onnxruntime_engine", "onnxruntime_opener"),
}
_COMMON = (
    (_ENGINE, "Engine"),
    ("toolchain.bundle.manifest", "parse_engine"),
    ("toolchain.runtime.contract", "parse_contract"),
)
#: By ``form`` of the engine; how its opener is called, given ``contract``, ``threads``, ``device`` and ``provider``.
_CALLS = {
    "aot": "aot_opener(contract, threads)",
    "vm": "tvm_opener(contract, info.device, threads)",
    "": "onnxruntime_opener(contract, provider, threads)",
}
_HEAD = '''\
"""Opens and runs the engine in a folder; needs {needs}.

Cut out of the sources of toolchain, which need not be installed.  Not to be edited: export again instead.
"""

from __future__ import annotations

{imports}


def open_folder(folder: Path, threads: int = 0, provider: str = "{provider}") -> Engine:
    """The engine described by engine.json and contract.json in ``folder``, all its files opened.

    Args:
        folder: holds the engine.
        threads: threads of one run; 0: every processor that this process may use.
        provider: ONNX Runtime's execution provider, where the engine is one of its.

    Raises:
        ToolchainError: the engine cannot be opened; the text says why.
    """
    contract = parse_contract(json.loads((folder / "contract.json").read_bytes()), "contract.json")
    info = parse_engine(json.loads((folder / "engine.json").read_bytes()), "engine.json")
    engine = Engine(folder, info, contract, {call})
    engine.open_all()
    return engine
'''
_NEEDS = {"aot": "numpy alone", "vm": "numpy and apache-tvm", "": "numpy and onnxruntime"}


def standalone_source(form: str, provider: str = "") -> str:
    """The text of the module for engines of one form: ``"aot"``, ``"vm"``, or ``""`` for ONNX Runtime's.

    It has ``open_folder``, and ``ToolchainError`` for what goes wrong.
    """
    pieces = _Pieces()
    for module, name in (*_COMMON, _ROOTS[form]):
        pieces.need(module, name)
    imports = _sorted_imports({*pieces.imports, "import json", "from pathlib import Path"})
    head = _HEAD.format(needs=_NEEDS[form], imports=imports, provider=provider, call=_CALLS[form])
    return "\n\n".join([head, *pieces.texts]).rstrip() + "\n"


def _sorted_imports(lines: set[str]) -> str:
    whole = sorted(line for line in lines if line.startswith("import"))
    parts: dict[str, list[str]] = {}
    for line in sorted(lines.difference(whole)):
        origin, name = line.removeprefix("from ").split(" import ")
        parts.setdefault(origin, []).append(name)
    named = [f"from {origin} import {', '.join(names)}" for origin, names in sorted(parts.items())]
    return "\n".join([*whole, *named, "", "import numpy as np"])


@dataclass(frozen=True, slots=True)
class _Module:
    """The top level of one module: name -> the statement that defines it, or what it is imported as."""

    lines: list[str]
    statements: dict[str, ast.stmt]
    foreign: dict[str, str]
    own: dict[str, tuple[str, str]]


@cache
def _module(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    module = _Module(text.splitlines(), {}, {}, {})
    for statement in _flat(ast.parse(text).body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            _take_import(statement, module)
        else:
            module.statements.update(dict.fromkeys(_defined(statement), statement))
    return module


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, also those under ``if TYPE_CHECKING``: numpy is always there."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from statement.body
        else:
            yield statement


def _take_import(statement: ast.Import | ast.ImportFrom, module: _Module) -> None:
    origin = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
    for alias in statement.names:
        known = alias.asname or alias.name
        if origin.split(".")[0] == _PACKAGE:
            module.own[known] = (origin, alias.name)
        elif origin != "__future__":
            shown = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            module.foreign[known.split(".")[0]] = f"from {origin} import {shown}" if origin else f"import {shown}"


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


@dataclass(slots=True)
class _Pieces:
    """The statements taken so far, each after those that it needs; imports of other packages."""

    texts: list[str] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    _taken: set[tuple[str, str]] = field(default_factory=set)
    _homes: dict[str, str] = field(default_factory=dict)
    _shown: dict[str, str] = field(default_factory=dict)

    def need(self, module_name: str, name: str) -> None:
        """Take what defines ``name``, if it is not a builtin or local name."""
        module = _module(module_name)
        if name in module.own:
            self.need(*module.own[name])
        elif name in module.foreign:
            if module.foreign[name] != "import numpy as np":
                self.imports.add(module.foreign[name])
        elif name in module.statements:
            self._take(module_name, module, module.statements[name])

    def _take(self, module_name: str, module: _Module, statement: ast.stmt) -> None:
        names = _defined(statement)
        if (module_name, names[0]) in self._taken:
            return
        self._taken.update((module_name, name) for name in names)
        text = ast.unparse(statement)
        known = [self._homes.setdefault(name, text) for name in names]
        if any(other != text for other in known):
            raise ToolchainError(f"{names[0]!r} of {module_name} is defined otherwise in another module too")
        if self._shown.setdefault(text, module_name) != module_name:
            return  # The same alias in two modules.
        skipped: set[int] = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                for alias in node.names:
                    self.need(node.module or "", alias.name)
            elif isinstance(node, ast.Name):
                self.need(module_name, node.id)
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(d.lineno for d in decorators)])
        numbers = range(first, (statement.end_lineno or first) + 1)
        shown = "\n".join(module.lines[n - 1] for n in numbers if n not in skipped)
        # What stood under TYPE_CHECKING is indented.
        self.texts.append(textwrap.dedent(shown) + "\n")
