"""Reading TOML files, and telling every mistake of a file at once in our own words.

A recipe or a target profile is checked twice: its shape against a pydantic model and its sense by
functions that look at the raw tables.  Both yield :class:`Problem`, so one report holds them all.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from toolchain.errors import ExitCode, ToolchainError, did_you_mean

Key = tuple[str | int, ...]

_ERROR_TYPE = "config"
_MISSING = object()

# What pydantic's error types say in a configuration file; {…} comes from the error's context.
_ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "at least {min_length} item(s)",
    "string_too_short": "at least {min_length} character(s)",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake.

    Attributes:
        key: path of table keys and list positions.
        got: what stands there, as :func:`shown`.
        allowed: what may stand there.
        meant: the closest allowed value, or an empty string.
    """

    key: Key
    got: str
    allowed: str
    meant: str = ""

    def line(self, file: str) -> str:
        """``file: dotted.key: got X; allowed: ...; did you mean 'y'?``"""
        text = f"{file}: {dotted(self.key)}: got {self.got}; allowed: {self.allowed}"
        return f"{text}; did you mean {self.meant!r}?" if self.meant else text


def problem(key: Key, got: Any, allowed: str, choices: Iterable[str] = ()) -> Problem:
    """A :class:`Problem` about the value ``got``; the closest of ``choices`` is offered."""
    return Problem(key, shown(got), allowed, closest(got, choices))


def refuse(allowed: str, choices: Iterable[str] = ()) -> PydanticCustomError:
    """The error for a pydantic validator to raise; ``allowed`` says what the value may be."""
    return PydanticCustomError(_ERROR_TYPE, "{allowed}", {"allowed": allowed, "choices": list(choices)})


def closest(got: Any, choices: Iterable[str]) -> str:
    """The one of ``choices`` that ``got`` was probably meant to be, or an empty string."""
    if not isinstance(got, str):
        return ""
    match = re.search(r"'(.*)'", did_you_mean(got, choices))
    return match[1] if match else ""


def shown(value: Any) -> str:
    """A TOML value on one line, shortened to about 60 characters."""
    if value is _MISSING:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        text = "a table" if value else "an empty table"
        return f"{text} with {', '.join(map(str, value))}"[:80] if value else text
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(key: Key) -> str:
    """``("model", "inputs", 0, "shape")`` as ``model.inputs[0].shape``; odd names are quoted."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'
            text += f".{name}" if text else name
    return text or "(whole file)"


def read_toml(path: Path, what: str, code: ExitCode, hint: str = "") -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        path: the file.
        what: ``"recipe"`` or ``"target profile"``, for messages.
        code: exit code of the errors.
        hint: what to do if the file is missing.

    Raises:
        ToolchainError: missing or unreadable file, not UTF-8, or a syntax error with line and column.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        named = what if "file" in what.split() else f"{what} file"
        raise ToolchainError(f"there is no such {named}", where=str(path), hint=hint, code=code) from None
    except IsADirectoryError:
        raise ToolchainError(f"a {what} is a TOML file, this is a folder", where=str(path), code=code) from None
    except OSError as error:
        raise ToolchainError(f"cannot read the {what}: {error.strerror}", where=str(path), code=code) from error
    except UnicodeDecodeError as error:
        what_is_wrong = f"the {what} is not UTF-8 text: bad byte at offset {error.start}"
        raise ToolchainError(what_is_wrong, where=str(path), code=code) from None
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error), flags=re.DOTALL)
        reason = match[1] if match else str(error)
        place = f"line {match[2]}, column {match[3]}" if match and match[2] else "end of file"
        message = f"not valid TOML: {reason[0].lower()}{reason[1:]}"
        other = "" if path.suffix == ".toml" else f"a {what} is a TOML file; is {path.name} one?"
        raise ToolchainError(message, where=f"{path}, {place}", hint=other, code=code) from None


def check_schema_version(data: Mapping[str, Any], path: Path, what: str, understood: int, code: ExitCode) -> None:
    """Refuses a file made for a newer format before its unknown keys are taken for mistakes.

    Raises:
        ToolchainError: ``schema`` is a whole number above ``understood``.
    """
    schema = data.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > understood:
        raise ToolchainError(
            f"this {what} was made for schema {schema}; this version of toolchain understands up to {understood}",
            where=f"{path}: schema",
            hint="upgrade toolchain, or write the file for the older schema",
            code=code,
        )


def shape_problems(model: type[BaseModel], data: Mapping[str, Any]) -> list[Problem]:
    """The mistakes that ``model`` finds in ``data``: unknown keys, missing keys, wrong types and values."""
    try:
        model.model_validate(dict(data))
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [_translate(model, data, detail) for detail in details]
    return []


def raise_problems(
    problems: Iterable[Problem],
    path: Path,
    what: str,
    code: ExitCode,
    file_of: Callable[[Key], str] | None = None,
) -> None:
    """Raises one error that lists ``problems``; returns if there are none.

    Args:
        problems: the mistakes; of several with one key only the first is told.
        path: the file.
        what: ``"recipe"`` or ``"target profile"``.
        code: exit code of the error.
        file_of: gives the name of the file that a key comes from, where it may be another one.

    Raises:
        ToolchainError: there are problems.
    """
    first: dict[Key, Problem] = {}
    for entry in problems:
        first.setdefault(entry.key, entry)
    if not first:
        return
    count = f"{len(first)} mistakes" if len(first) > 1 else "1 mistake"
    lines = [entry.line(file_of(key) if file_of else path.name) for key, entry in first.items()]
    raise ToolchainError(f"{count} in this {what}", where=str(path), code=code, details=lines)


def _translate(model: type[BaseModel], data: Mapping[str, Any], detail: ErrorDetails) -> Problem:
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key = tuple(_written(data, loc))
    if kind == "extra_forbidden":
        siblings = _keys_allowed(model, loc[:-1])
        return Problem(key, "an unknown key", f"the keys {', '.join(siblings)}", closest(key[-1], siblings))
    if kind == "missing":
        return problem(key, _MISSING, _described(model, loc))
    if kind == _ERROR_TYPE:
        return problem(key, detail["input"], context["allowed"], context["choices"])
    if kind == "literal_error":
        return problem(key, detail["input"], context["expected"], _quoted(context["expected"]))
    if kind == "union_tag_invalid":
        choices = context["expected_tags"]
        return problem((*key, "kind"), context["tag"], choices, _quoted(choices))
    if kind == "union_tag_not_found":
        return problem((*key, "kind"), _MISSING, _described(model, loc))
    allowed = _ALLOWED[kind].format(**context) if kind in _ALLOWED else _described(model, loc)
    return problem(key, detail["input"], allowed)


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _written(data: Any, loc: Iterable[str | int]) -> Iterator[str | int]:
    """The parts of a pydantic location that stand in the file; its union tags do not."""
    parts = list(loc)
    for index, part in enumerate(parts):
        here = (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int))
        if here:
            data = data[part]
            yield part
        elif index == len(parts) - 1:
            yield part


def _field(model: type[BaseModel], loc: Key) -> FieldInfo | None:
    """The field at a pydantic location, whose parts are keys, list positions, chosen names and union tags."""
    found: FieldInfo | None = None
    current: list[type[BaseModel]] = [model]
    in_collection = False
    for part in loc:
        if in_collection or not current or not isinstance(part, str):
            in_collection = False
        elif len(current) > 1:
            current = [choice for choice in current if _fields(choice)["kind"].default == part]
        else:
            found = _fields(current[0]).get(part)
            current = [] if found is None else _models_in(found.annotation)
            in_collection = found is not None and bool(current) and not _is_table(found.annotation)
    return found


def _is_table(annotation: Any) -> bool:
    """Whether the value is one table (perhaps optional), not a list or a table of tables."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return issubclass(annotation, BaseModel)
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union, typing.Annotated):
        return any(_is_table(part) for part in typing.get_args(annotation))
    return False


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]


def _keys_allowed(model: type[BaseModel], parents: Key) -> list[str]:
    field = _field(model, parents) if parents else None
    owners = [model] if field is None else _models_in(field.annotation)
    if len(owners) > 1:  # the last part is the union's tag
        owners = [owner for owner in owners if _fields(owner)["kind"].default == parents[-1]]
    return list(_fields(owners[0])) if owners else []


def _described(model: type[BaseModel], key: Key) -> str:
    field = _field(model, key)
    return field.description if field is not None and field.description else "see the JSON Schema"
