"""onnxscript's functions tell their domain without being parsed, and all else as before."""

from __future__ import annotations

from onnxscript import TracedOnnxFunction, values

from toolchain.export.lighten import defer_parsing


def _scale(x: object, factor: float = 2.0) -> object:
    return x


def _unparsable() -> TracedOnnxFunction:
    """A function whose source nothing can find."""
    space: dict[str, object] = {}
    exec("def unparsable(x):\n    return x", space)
    function = space["unparsable"]
    assert callable(function)
    return TracedOnnxFunction(values.Opset("some.domain", 1), function)


def test_the_domain_is_known_without_the_source_and_what_needs_it_still_parses() -> None:
    defer_parsing()
    defer_parsing()

    assert _unparsable().function_ir.domain == "some.domain"
    parsed = TracedOnnxFunction(values.Opset("some.domain", 1), _scale).function_ir
    assert parsed.domain == "some.domain"
    assert parsed.name == "_scale"
