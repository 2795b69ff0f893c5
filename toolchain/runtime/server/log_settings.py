"""Triton's log and trace settings, as far as this server has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from toolchain.runtime.server.datatypes import invalid

_LOGGER = logging.getLogger("toolchain.serve")
#: What Triton's trace settings are where none of its traces are made; this server's go to OpenTelemetry.
TRACE_SETTINGS: dict[str, Any] = {
    "trace_file": "",
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "opentelemetry",
}
_FLAGS = ("log_info", "log_warning", "log_error")


class LogSettings:
    """Triton's settings over the one level that Python's logging has."""

    @staticmethod
    def current() -> dict[str, Any]:
        """The settings, all of them."""
        level = _LOGGER.getEffectiveLevel()
        return {
            "log_file": "",
            "log_info": level <= logging.INFO,
            "log_warning": level <= logging.WARNING,
            "log_error": level <= logging.ERROR,
            "log_verbose_level": 1 if level <= logging.DEBUG else 0,
            "log_format": "ISO8601",
        }

    @staticmethod
    def update(changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change the settings and return all of them.

        Raises:
            ServeError: INVALID, an unknown setting or a value that it can't have.
        """
        wanted = LogSettings.current()
        for key, value in changes.items():
            if key in _FLAGS:
                if type(value) is not bool:
                    invalid(f"log setting {key!r} is true or false")
            elif key == "log_verbose_level":
                if type(value) is not int or value < 0:
                    invalid(f"log setting {key!r} is a whole number of at least 0")
            elif wanted.get(key) == value:
                continue
            else:
                invalid(f"log setting {key!r:.60} can't be changed; {', '.join(_FLAGS)} and log_verbose_level can")
            wanted[key] = value
        level = logging.CRITICAL
        for flag, at in zip(_FLAGS, (logging.INFO, logging.WARNING, logging.ERROR), strict=True):
            if wanted[flag]:
                level = min(level, at)
        _LOGGER.setLevel(logging.DEBUG if wanted["log_verbose_level"] else level)
        return LogSettings.current()
