"""Figures as text for a person."""

from __future__ import annotations


def apart(got: float, limit: float) -> tuple[str, str]:
    """``limit`` in full and ``got`` in six digits, or as many more as it takes to keep it on its side of the limit."""
    shown = f"{limit:g}" if float(f"{limit:g}") == limit else repr(limit)
    for digits in range(6, 17, 2):
        text = f"{got:.{digits}g}"
        if (float(text) < limit, float(text) > limit) == (got < limit, got > limit):
            return text, shown
    return repr(got), shown


def number(value: float | None, digits: int = 6) -> str:
    """A figure, or ``-`` when there is none."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return f"{value:.3g}" if float(text) == 0 and value != 0 else text
