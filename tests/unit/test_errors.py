"""Errors: what a user reads, and what survives the way out of a child process."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ExitCode, ToolchainError, did_you_mean

TEXT = st.text(max_size=20)
ERRORS = st.builds(
    ToolchainError,
    TEXT,
    where=TEXT,
    hint=TEXT,
    code=st.sampled_from(ExitCode),
    details=st.lists(TEXT, max_size=3),
    debug=TEXT,
)


def fields(error: ToolchainError) -> tuple[object, ...]:
    return error.what, error.where, error.hint, error.code, error.details, error.debug


def test_a_message_says_what_where_and_what_to_do_next() -> None:
    error = ToolchainError("got 17; allowed: 18", where="recipe.toml: opset", hint="write 18", details=["one", "two"])
    assert error.render() == "recipe.toml: opset: got 17; allowed: 18\n  one\n  two\n  hint: write 18"
    assert str(error) == error.render()


def test_a_message_without_place_and_hint_is_one_line() -> None:
    assert ToolchainError("it broke").render() == "it broke"


def test_debug_text_is_no_part_of_the_message() -> None:
    assert "Traceback" not in ToolchainError("it broke", debug="Traceback ...").render()


def test_an_error_without_a_code_is_internal() -> None:
    assert ToolchainError("it broke").code is ExitCode.INTERNAL


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ValueError, match="99"):
        ToolchainError("it broke", code=99)  # type: ignore[arg-type]


@given(ERRORS)
def test_an_error_survives_json_and_pickle(error: ToolchainError) -> None:
    assert fields(ToolchainError.from_json(json.loads(json.dumps(error.to_json())))) == fields(error)
    assert fields(pickle.loads(pickle.dumps(error))) == fields(error)


def test_the_json_form_names_the_kind_of_the_code() -> None:
    data = ToolchainError("too slow", code=ExitCode.GATE_LATENCY).to_json()
    assert (data["code"], data["kind"]) == (22, "gate_latency")


def test_exit_codes_are_distinct_and_fit_a_shell() -> None:
    assert len({int(code) for code in ExitCode}) == len(ExitCode.__members__)
    assert all(0 <= code < 256 for code in ExitCode)
    assert ExitCode.INTERRUPTED == 128 + 2


@pytest.mark.parametrize(
    ("got", "words"),
    [("int8-statik", " (did you mean 'int8-static'?)"), ("fp23", " (did you mean 'fp32'?)"), ("zebra", ""), ("", "")],
)
def test_the_closest_allowed_word_is_suggested(got: str, words: str) -> None:
    assert did_you_mean(got, ["fp32", "int8-static", "int8-dynamic"]) == words
