"""The errors a user can meet, and the exit code of each.

Every failure that a user can cause or must act on is a :class:`ToolchainError`: what went wrong,
where, and what to do next, apart from the Python exception that revealed it.  Anything else that
escapes is a bug and ends with :attr:`ExitCode.INTERNAL`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Process exit codes; documented in docs/exit-codes.md.  A number, once given, is never reused."""

    OK = 0
    USAGE = 2
    BAD_RECIPE = 10
    BAD_TARGET = 11
    USER_CODE = 12
    EXPORT = 13
    OPTIMIZE = 14
    QUANTIZE = 15
    COMPILE = 16
    MEASURE = 17
    GATE_FIDELITY = 20
    GATE_ACCURACY = 21
    GATE_LATENCY = 22
    GATE_MEMORY = 23
    GATE_SIZE = 24
    GATE_NEVER_SLOWER = 25
    INCOMPATIBLE_HOST = 30
    DAMAGED_BUNDLE = 31
    BAD_INPUT = 32
    NOT_REPRODUCIBLE = 33
    UNTRUSTED = 34
    WEAK_EVIDENCE = 35
    MISSING_TOOL = 40
    STORAGE = 41
    DEVICE = 42
    REGISTRY = 43
    INTERNAL = 70
    INTERRUPTED = 130


class ToolchainError(Exception):
    """A failure with an answer in it.

    Args:
        what: what went wrong, with what was got and what is allowed.
        where: the file and key, node, stage or argument concerned.
        hint: what to do next.
        code: the exit code of the process if nothing handles the error.
        details: further lines, e.g. one per mistake of a recipe.
        debug: text shown only with ``--debug`` (a child's traceback).
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        hint: str = "",
        code: ExitCode = ExitCode.INTERNAL,
        details: Iterable[str] = (),
        debug: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint
        self.code = ExitCode(code)
        self.details = tuple(details)
        self.debug = debug

    def __str__(self) -> str:
        return self.render()

    def render(self) -> str:
        """The message as shown to a user: one line, then details and the hint."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  {detail}" for detail in self.details]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "where": self.where,
            "hint": self.hint,
            "code": int(self.code),
            "kind": self.code.name.lower(),
            "details": list(self.details),
            "debug": self.debug,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ToolchainError:
        return cls(
            data["what"],
            where=data["where"],
            hint=data["hint"],
            code=ExitCode(data["code"]),
            details=data["details"],
            debug=data.get("debug", ""),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).from_json, (self.to_json(),))


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest of ``allowed``, or an empty string."""
    close = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
