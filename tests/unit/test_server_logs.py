"""Logs, metrics' text and the tokens' file."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from toolchain.errors import ToolchainError
from toolchain.runtime.server.api import InferRequest, ServeError, Status
from toolchain.runtime.server.app import read_tokens
from toolchain.runtime.server.logs import JsonFormatter, RequestLog
from toolchain.runtime.server.traces import Traces

REQUEST = InferRequest("m", "", {"x": np.zeros(1)}, id='a"b\n')


def test_a_record_is_one_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(1.0)
    with caplog.at_level(logging.INFO, "toolchain.serve"):
        assert log.wants_success()
        log.answered(REQUEST, "1.0.0", 0)
    (record,) = caplog.records
    text = JsonFormatter().format(record)
    assert "\n" not in text
    entry = json.loads(text)
    assert (entry["level"], entry["message"], entry["request"]) == ("info", "request answered", 'a"b\n')


def test_a_share_of_the_answered_requests_is_logged() -> None:
    assert sum(RequestLog(0.0).wants_success() for _ in range(100)) == 0
    log = RequestLog(0.1)
    assert sum(log.wants_success() for _ in range(1000)) in (99, 100)


@pytest.mark.parametrize("status", [Status.INVALID, Status.INTERNAL])
def test_clients_cannot_fill_the_log(status: Status, caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(0.0)
    with caplog.at_level(logging.INFO, "toolchain.serve"):
        for _ in range(500):
            log.refused(REQUEST, "1.0.0", ServeError(status, "no"), 0)
    # The second may end meanwhile.
    assert 10 <= len(caplog.records) <= 20


@pytest.mark.skipif(find_spec("opentelemetry") is not None, reason="OpenTelemetry is installed")
def test_traces_without_opentelemetry_say_what_to_install() -> None:
    with pytest.raises(ToolchainError, match="OpenTelemetry"):
        Traces()


def test_tokens_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# old\n\none \ntwo\n")
    assert read_tokens(file) == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(ToolchainError, match="holds no token"):
        read_tokens(file)
    with pytest.raises(ToolchainError, match="cannot be read"):
        read_tokens(tmp_path / "none")
