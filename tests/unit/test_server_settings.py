"""The server's settings file and the flags over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.settings import load_settings
from toolchain.runtime.server.tune import Choice, Figure, settings_text, splits


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def test_all_mistakes_are_told_at_once_with_what_is_allowed(tmp_path: Path) -> None:
    text = """
schema = 1
htp_port = 1
[defaults]
canary_share = 0.0
instances = "x"
[models.digits]
execution = "inlin"
max_batch = 3
priorities = 2
default_priority = 3
[limits]
request_mb = 0
"""
    with pytest.raises(ToolchainError) as caught:
        load_settings(written(tmp_path, text))
    assert caught.value.code == ExitCode.USAGE
    lines = "\n".join(caught.value.details)
    assert len(caught.value.details) == 7
    for line in [
        "htp_port: got an unknown key",
        "did you mean 'http_port'?",
        "defaults.canary_share: got 0; allowed: a share above 0",
        "defaults.instances: got 'x'; allowed: a whole number",
        "models.digits.execution: got 'inlin'; allowed: 'process', 'thread' or 'inline'; did you mean 'inline'?",
        "did you mean 'max_batch_size'?",
        "models.digits.default_priority: got 3; allowed: a level from 1 to 2, or 0",
        "limits.request_mb: got 0; allowed: a number of at least 1",
    ]:
        assert line in lines


def test_a_model_has_the_defaults_but_for_its_own_keys_and_flags_win(tmp_path: Path) -> None:
    text = """
http_port = 9000
[defaults]
instances = 3
threads = 2
[models.digits]
threads = 1
"""
    settings = load_settings(written(tmp_path, text), {"http_port": None, "defaults.max_batch_size": 4})
    assert settings.http_port == 9000
    digits, other = settings.model("digits"), settings.model("other")
    assert (digits.instances, digits.threads, digits.max_batch_size) == (3, 1, 4)
    assert (other.instances, other.threads, other.max_batch_size) == (3, 2, 4)
    assert load_settings(written(tmp_path, text), {"defaults.threads": 7}).model("digits").threads == 7


def test_paths_in_the_file_are_relative_to_it_and_those_of_flags_to_the_current_folder(tmp_path: Path) -> None:
    path = written(tmp_path, 'watch = "models"\n[tls]\ncertificate = "c.pem"\nkey = "/etc/k.pem"\n')
    settings = load_settings(path)
    assert settings.watch == str(tmp_path / "models")
    assert settings.tls is not None
    assert (settings.tls.certificate, settings.tls.key) == (str(tmp_path / "c.pem"), "/etc/k.pem")
    assert load_settings(path, {"watch": "elsewhere"}).watch == "elsewhere"


def test_wrong_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="flags") as caught:
        load_settings(None, {"defaults.execution": "outline"})
    assert "defaults.execution: got 'outline'" in caught.value.details[0]


def test_a_newer_schema_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="schema 2"):
        load_settings(written(tmp_path, "schema = 2\nnew_key = 1\n"))
    with pytest.raises(ToolchainError, match=r"no such settings file$"):
        load_settings(tmp_path / "none.toml")


def test_what_tuning_writes_is_read_back(tmp_path: Path) -> None:
    figure = Figure(Choice(2, 3, 8, 200), 1000.0, 1.0, 2.0)
    settings = load_settings(written(tmp_path, settings_text({"a.b": figure}, 50.0, 16)))
    model = settings.model("a.b")
    assert (model.instances, model.threads, model.max_batch_size, model.queue_delay_us) == (2, 3, 8, 200)


@pytest.mark.parametrize("cores", [1, 2, 3, 6, 64])
def test_instances_and_threads_never_take_more_than_the_processors(cores: int) -> None:
    found = splits(cores)
    assert (1, 1) in found
    assert all(instances * threads <= cores for instances, threads in found)
    assert any(instances * threads > cores / 2 for instances, threads in found)
