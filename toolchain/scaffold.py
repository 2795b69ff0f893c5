"""What ``toolchain init`` writes into a user's repository: a recipe, a Makefile fragment, a CI workflow.

The model's file is parsed, never imported: see :mod:`toolchain.python_source`.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from toolchain.errors import ExitCode, ToolchainError, did_you_mean
from toolchain.install import public_requirement
from toolchain.python_source import Arguments, call_arguments, definitions, forward_arguments, parse_file
from toolchain.scaffold_places import Places, extended_gitignore, places, recipe_place
from toolchain.version import __version__

PLACEHOLDER = "FILL_IN"
"""Stands in the recipe for what the code does not say; the recipe is refused until it is replaced."""

_GENERIC = {"model", "models", "net", "network", "main", "train", "module", "__init__"}
_TARGETS = {"x86_64": "x86-64-v3"}  # elsewhere: the machine itself
_EXAMPLES = ("example_inputs", "example")  # functions that give the inputs, by the usual names
_EXAMPLE_TABLES = """\
# Every size is as in the example.  For a size that varies, e.g. along the batch:
# [[model.inputs]]
# name = "input"
# dtype = "float32"
# shape = ["batch", 3, 224, 224]
# [model.dims.batch]
# min = 1
# max = 64
# batch = true
"""
_TOKENS = re.compile(r"(^|_)(ids|tokens?|mask)(_|$)")
_MASK = re.compile(r"(^|_)mask(_|$)")


@dataclass(frozen=True, slots=True)
class Scaffold:
    """The files to write, and what a user must know about them.

    Attributes:
        name: of the recipe.
        files: path -> text.
        extended: path -> new text, of files that the user has already and that only grow.
        recipe: path of the recipe, one of ``files``.
        placeholders: lines of the recipe (from 1) that must be filled in.
        fragment: path of the Makefile fragment, one of ``files``.
        notes: what was found out and what was not, one sentence each.
    """

    name: str
    files: Mapping[Path, str]
    extended: Mapping[Path, str]
    recipe: Path
    fragment: Path
    placeholders: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    path: Path
    function: str
    root: Path
    folder: Path  # of the recipe

    def reference(self, path: Path, function: str) -> str:
        return f"{_relative(path, self.folder)}:{function}"


def plan_scaffold(source: str, recipe: Path | None, name: str | None = None, force: bool = False) -> Scaffold:
    """Find out about the model and write the texts, in memory.

    Args:
        source: ``"path/to/model.py:build"``; the path is relative to the working folder.
        recipe: where the recipe will lie, in the working folder if None; the Makefile fragment goes beside it,
            the workflow into the repository's root (see :mod:`toolchain.scaffold_places`).
        name: of the recipe; from the model's file or folder if None.
        force: files of other models may be replaced.

    Raises:
        ToolchainError: USAGE for a missing file or function or a function that needs arguments,
            USER_CODE for a file that is not valid Python.
    """
    file, function = _split(source)
    folder = recipe.absolute().parent if recipe else Path.cwd()
    model = _Model(file.resolve(), function, repository_root(folder), folder.resolve())
    if not model.path.is_relative_to(model.root):
        raise _usage("the model lies outside the recipe's repository", source, f"the repository's root is {model.root}")
    _check_function(model, source)
    name = _name(model, name)
    where = places(recipe.absolute() if recipe else recipe_place(folder, name, force), model.root, name, force)
    texts, notes = _recipe_values(model, name, where)
    text = _fill("recipe.toml", texts)
    lines = tuple(i for i, line in enumerate(text.splitlines(), 1) if PLACEHOLDER in line and i > 2)
    files = {
        where.recipe: text,
        where.fragment: _fragment(name, where),
        where.workflow: _workflow(model, name, where),
    }
    ignore = model.root / ".gitignore"
    ignored = extended_gitignore(ignore) if (model.root / ".git").exists() else None
    extended = {} if ignored is None else {ignore: ignored}
    return Scaffold(name, files, extended, where.recipe, where.fragment, lines, notes)


def repository_root(folder: Path) -> Path:
    """The nearest folder upwards that holds ``.git``, else one with a pyproject.toml, else ``folder``."""
    folder = folder.resolve()
    for marker in (".git", "pyproject.toml"):
        for parent in (folder, *folder.parents):
            if (parent / marker).exists():
                return parent
    return folder


def import_folders(root: Path, *files: Path) -> list[Path]:
    """Where the imports of ``files`` are looked for: their own folders, the root, and ``src`` below it."""
    folders = [*(file.resolve().parent for file in files), root, root / "src"]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _split(source: str) -> tuple[Path, str]:
    file, colon, function = source.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        found = Path(source)
        names = _callables(found) if found.suffix == ".py" and found.is_file() else []
        hint = f"e.g. {source}:{names[0]}" if names else "e.g. path/to/model.py:build"
        raise _usage(f"got {source!r}; allowed: 'path/to/model.py:function'", "", hint)
    path = Path(file)
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        state = "is a folder" if path.is_dir() else "does not exist"
        raise _usage(
            f"the file {file!r} {state}{did_you_mean(path.name, near)}", source, "name the model's Python file"
        )
    return path, function


def _callables(path: Path) -> list[str]:
    known = definitions(parse_file(path)).items()
    functions = [name for name, node in known if isinstance(node, ast.FunctionDef) and name[0] != "_"]
    return functions + [name for name, node in known if isinstance(node, ast.ClassDef) and name[0] != "_"]


def _check_function(model: _Model, source: str) -> None:
    node = definitions(parse_file(model.path)).get(model.function)
    if node is None:
        names = _callables(model.path)
        hint = f"the file defines: {', '.join(names)}" if names else "the file defines no function"
        raise _usage(
            f"{model.path.name} has no function {model.function!r}{did_you_mean(model.function, names)}", source, hint
        )
    if isinstance(node, ast.AsyncFunctionDef):
        raise _usage(
            f"{model.function!r} is async; allowed: a plain function", source, "write one that returns the model"
        )
    needed = call_arguments(node)
    if needed and needed.required:
        missing = ("arguments " if len(needed.required) > 1 else "argument ") + ", ".join(needed.required)
        raise _usage(
            f"{model.function!r} needs the {missing}; a recipe's function is called without",
            source,
            f"give defaults, or add a function: def build(): return {model.function}(...)",
        )


def _name(model: _Model, given: str | None) -> str:
    if given is not None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", given):
            allowed = "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit"
            raise _usage(f"got {given!r}; allowed: {allowed}", "--name", f"e.g. {_slug(given)}")
        return given
    own = [model.path.stem, *(parent.name for parent in model.path.parents)]
    return _slug(next((part for part in own if part and part not in _GENERIC), "model"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-") or "model"


def _recipe_values(model: _Model, name: str, where: Places) -> tuple[dict[str, str], tuple[str, ...]]:
    folders = import_folders(model.root, model.path)
    checkpoint, note = _checkpoint(model, where)
    example = next((line for name in _EXAMPLES if (line := _found(model, name))), "")
    if example:
        inputs, dims, unknown = _EXAMPLE_TABLES, "", False
        checkpoint += f"\nexample_inputs = {_quoted(example)} # a function that returns a tuple or dict of tensors"
        about = f"inputs and their sizes from {example}; for sizes that vary, fill in the [[model.inputs]] comment"
    else:
        arguments = forward_arguments(model.path, model.function, folders)
        inputs, dims, unknown = _inputs(arguments)
        about = _about_inputs(arguments)
    data = {role: _data_function(model, role) for role in ("calibration", "evaluation")}
    notes = [about, note]
    if not public_requirement("build"):
        notes.append(f"set TOOLCHAIN in {_relative(where.workflow, model.root)}: where the runner gets toolchain from")
    notes += [f"no function {role!r} was found beside the model" for role, line in data.items() if line[0] == "#"]
    to_fill = f"# Replace every {PLACEHOLDER} below, then: toolchain build {where.recipe.name}"
    values = {
        "NAME": name,
        "NAME_STRING": _quoted(name),
        "TARGET": _quoted(_TARGETS.get(platform.machine(), "host")),
        "SOURCE": _quoted(model.reference(model.path, model.function)),
        "TO_FILL": to_fill if unknown else "#",
        "CHECKPOINT": checkpoint,
        "INPUTS": inputs,
        "DIMS": dims,
        "CALIBRATION": data["calibration"],
        "EVALUATION": data["evaluation"],
    }
    return values, tuple(filter(None, notes))


def _inputs(arguments: Arguments | None) -> tuple[str, str, bool]:
    """The tables of the inputs and of the dimensions, and whether something is to be filled in."""
    names = arguments.required if arguments and arguments.required else ("input",)
    tables = []
    for name in names:
        lines = ["[[model.inputs]]", f"name = {_quoted(name)}"]
        if _TOKENS.search(name):
            high = "1" if _MASK.search(name) else PLACEHOLDER
            lines += ['dtype = "int64"', 'shape = ["batch", "sequence"]', "low = 0"]
            lines += [f"high = {high}" if high == "1" else f'high = "{PLACEHOLDER}" # largest value, e.g. 30521']
        else:
            lines += [
                'dtype = "float32"',
                f'shape = ["batch", "{PLACEHOLDER}"] # the sizes after the batch, e.g. ["batch", 3, 224, 224]',
                "# image = { scale = 0.00392157, mean = [0.5], std = [0.25] } # used by `toolchain run` on image files",
            ]
        tables.append("\n".join(lines) + "\n")
    dims = "# Rows along the batch are independent of each other: they may be padded and split.\n"
    dims += "[model.dims.batch]\nmin = 1\nmax = 64\nbatch = true\n"
    text = "\n".join(tables)
    if '"sequence"' in text:
        dims += "\n[model.dims.sequence]\nmin = 1\nmax = 512\n"
    return text, dims, PLACEHOLDER in text


def _about_inputs(arguments: Arguments | None) -> str:
    if arguments is None or not arguments.required:
        return "the code does not say what forward() takes: one input named 'input' was assumed"
    note = f"inputs from forward(): {', '.join(arguments.required)}"
    if arguments.optional:
        note += f" (left out, as it has defaults for them: {', '.join(arguments.optional)})"
    return note


def _checkpoint(model: _Model, where: Places) -> tuple[str, str]:
    found = sorted(model.path.parent.glob("*.safetensors"))
    if len(found) != 1:
        return '# checkpoint = "weights.safetensors" # if the function does not load the weights itself', ""
    line = f"checkpoint = {_quoted(_relative(found[0], model.folder))}"
    if found[0].name in model.path.read_text(encoding="utf-8", errors="replace"):
        variable = f"{where.prefix}_DATA of {where.fragment.name}"
        note = f"{model.path.name} seems to load {found[0].name} itself: name it in {variable}"
        return f"# {line} # {model.path.name} seems to load it itself", note
    return line, f"checkpoint: {found[0].name}, the only one beside the model"


def _found(model: _Model, function: str) -> str:
    """Reference of a function without arguments in the model's file or in data.py beside it, or ""."""
    for path in dict.fromkeys([model.path, model.path.parent / "data.py"]):
        if path.is_file():
            arguments = call_arguments(definitions(parse_file(path)).get(function, ast.Pass()))
            if arguments is not None and not arguments.required:
                return model.reference(path, function)
    return ""


def _data_function(model: _Model, role: str) -> str:
    if found := _found(model, role):
        return f"{role} = {_quoted(found)}"
    return f"# {role} = {_quoted(model.reference(model.path.parent / 'data.py', role))}"


def _fragment(name: str, where: Places) -> str:
    values = {"NAME": name, "RECIPE": where.recipe.name, "FRAGMENT": where.fragment.name}
    also = "" if where.goal == "release" else f".PHONY: release\nrelease: {where.goal}\n"
    return _fill("release.mk", {**values, "GOAL": where.goal, "P": where.prefix, "ALSO": also})


def _workflow(model: _Model, name: str, where: Places) -> str:
    requirements = model.root / "requirements.txt"
    return _fill(
        "release.yml",
        {
            "NAME": name,
            "VERSION": __version__,
            "TOOLCHAIN": _quoted(public_requirement("build") or PLACEHOLDER),
            "PLACEHOLDER": PLACEHOLDER,
            "PIP_KEY": "requirements.txt" if requirements.is_file() else _relative(where.workflow, model.root),
            "REQUIREMENTS": "          python -m pip install -r requirements.txt\n" if requirements.is_file() else "",
            "RECIPE_FROM_ROOT": _relative(where.recipe.resolve(), model.root),
        },
    )


def _fill(template: str, values: Mapping[str, str]) -> str:
    text = (resources.files("toolchain") / "cli" / "templates" / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string too.
    return json.dumps(text, ensure_ascii=False)


def _usage(what: str, where: str, hint: str) -> ToolchainError:
    return ToolchainError(what, where=where, hint=hint, code=ExitCode.USAGE)
