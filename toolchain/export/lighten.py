"""Work that the exporter does for nothing when it starts, left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def defer_parsing() -> None:
    """Let onnxscript parse a function's source when it is asked for more than the domain; what is exported is the same.

    To list what can be converted, it parses the source of each of its 500 functions and asks for the one domain
    that they all have: 0.3 s, each time a process exports.
    """
    from onnxscript import TracedOnnxFunction

    parsed = vars(TracedOnnxFunction).get("function_ir")
    parse = parsed.fget if isinstance(parsed, property) else None
    if parse is not None and not isinstance(parse, _Deferred):
        TracedOnnxFunction.function_ir = property(_Deferred(parse))  # type: ignore[assignment]


class _Deferred:
    """The getter of a function's IR."""

    def __init__(self, parse: Callable[[Any], Any]) -> None:
        self._parse = parse

    def __call__(self, function: Any) -> _Lazy:
        return _Lazy(function, self._parse)


class _Lazy:
    """A function's IR."""

    def __init__(self, function: Any, parse: Callable[[Any], Any]) -> None:
        self._function, self._parse = function, parse

    @property
    def domain(self) -> str:
        return str(self._function.opset.domain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parse(self._function), name)
