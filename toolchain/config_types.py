"""The field types of recipes and target profiles: strict, and refused in our own words."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from toolchain.config_errors import refuse

SCHEMA = 1

PRECISIONS = ("fp32", "fp16", "int8-static", "int8-mixed", "int8-dynamic")
Precision = Literal["fp32", "fp16", "int8-static", "int8-mixed", "int8-dynamic"]

FUNCTION_PATTERN = r"[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*"
SEMVER_PATTERN = (
    # The expression that semver.org suggests, without its named groups.
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?"
)
NAME_PATTERN = r"[a-z0-9][a-z0-9._-]*"


class Section(BaseModel):
    """One table of a file: immutable, and with no keys but its own."""

    # Built at first use: a recipe needs one validator, not one for each of its tables as well.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


Int = Annotated[int, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
NonEmpty = Annotated[str, Field(min_length=1)]


def _schema_number(value: Any) -> Any:
    if value != SCHEMA or isinstance(value, bool) or not isinstance(value, int):
        raise refuse(str(SCHEMA))
    return value


def _matching(pattern: str, allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise refuse(allowed)
        return value

    return AfterValidator(check)


def _relative_path(value: str) -> str:
    if not value or value.startswith(("/", "~")) or "\\" in value:
        raise refuse("a path relative to this file, with forward slashes")
    return value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise refuse("a list without repetitions")
    return value


def _precision(value: Any) -> Any:
    if value not in PRECISIONS:
        raise refuse(", ".join(repr(name) for name in PRECISIONS), PRECISIONS)
    return value


SchemaNumber = Annotated[int, BeforeValidator(_schema_number), WithJsonSchema({"type": "integer", "const": SCHEMA})]
Name = Annotated[
    str,
    _matching(NAME_PATTERN, "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit"),
    Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"}),
]
SemanticVersion = Annotated[
    str,
    _matching(SEMVER_PATTERN, "a semantic version such as '1.0.0' or '1.2.0-rc.1'"),
    Field(json_schema_extra={"pattern": f"^{SEMVER_PATTERN}$"}),
]
RelativePath = Annotated[str, AfterValidator(_relative_path)]
FunctionRef = Annotated[
    str,
    AfterValidator(_relative_path),
    _matching(FUNCTION_PATTERN, "'file.py:function', the file relative to this one"),
    Field(json_schema_extra={"pattern": f"^{FUNCTION_PATTERN}$"}),
]
Distinct = AfterValidator(_distinct)
PrecisionName = Annotated[Precision, BeforeValidator(_precision)]


def split_function(text: str) -> tuple[str, str] | None:
    """``"file.py:function"`` as ``("file.py", "function")``; None if ``text`` has another form."""
    if not re.fullmatch(FUNCTION_PATTERN, text):
        return None
    file, _, function = text.rpartition(":")
    return file, function
