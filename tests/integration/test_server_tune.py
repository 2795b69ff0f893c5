"""Tuning on a real bundle, and the text of the metrics."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from tests.helpers.serving_core import obedient_release, request_of, serving
from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.settings import load_settings
from toolchain.runtime.server.tune import Search, settings_text, tune_and_write


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return obedient_release(tmp_path_factory.mktemp("releases"))


def test_the_best_settings_under_the_limit_are_found_and_can_be_read(release: Path, tmp_path: Path) -> None:
    said: list[str] = []
    search = Search(str(release), 1000.0, 4, said.append, seconds=0.2)
    best = asyncio.run(search.run())
    fastest = max(figure.per_second for figure in search.figures)
    assert best.per_second > 0.9 * fastest
    assert {figure.choice.max_batch_size for figure in search.figures} >= {1, 2}
    assert all(figure.p50_ms <= figure.p99_ms for figure in search.figures)
    assert len(said) >= len(search.figures)
    file = tmp_path / "serve.toml"
    file.write_text(settings_text({search.name: best}, 1000.0, 4))
    assert load_settings(file).model("obedient").max_batch_size == best.choice.max_batch_size


def test_a_limit_that_nothing_holds_is_said_so(release: Path) -> None:
    with pytest.raises(ToolchainError, match="no settings hold a p99 of 1e-06 ms") as caught:
        asyncio.run(Search(str(release), 1e-6, 2, lambda text: None, seconds=0.1).run())
    assert caught.value.code == ExitCode.GATE_LATENCY


def test_an_existing_file_is_not_replaced(release: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("mine")
    with pytest.raises(ToolchainError, match="exists already"):
        tune_and_write([str(release)], 50.0, 2, file, print)
    assert file.read_text() == "mine"


def test_metrics_are_valid_and_say_what_happened(release: Path) -> None:
    async def main() -> str:
        async with serving(release, max_batch_size=4) as core:
            await asyncio.gather(*(core.infer(request_of(i)) for i in range(9)))
            await core.infer(request_of(1, rows=5))
            return core.metrics().decode()

    text = asyncio.run(main())
    line = re.compile(r'[a-zA-Z_]+(\{([a-z]+="[^"]*",?)+\})? \d+(\.\d+)?')
    samples = [entry for entry in text.splitlines() if not entry.startswith("#")]
    assert [entry for entry in samples if not line.fullmatch(entry)] == []
    values = dict(entry.rsplit(" ", 1) for entry in samples)
    labels = '{model="obedient",version="1.0.0"}'
    assert values[f"nv_inference_request_success{labels}"] == "10"
    assert values[f"nv_inference_count{labels}"] == "14"
    runs = int(values[f"nv_inference_exec_count{labels}"])
    assert runs < 10
    assert int(values[f"nv_inference_compute_infer_duration_us{labels}"]) > 0
    bounds = [int(value) for name, value in values.items() if name.startswith("toolchain_batch_size_bucket")]
    assert bounds == sorted(bounds)
    assert bounds[-1] == runs
    assert values[f"toolchain_batch_size_sum{labels}"] == "14"
    names = {entry.split("{")[0] for entry in samples}
    typed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert {re.sub(r"_(bucket|sum|count)$", "", n) if "batch_size" in n else n for n in names} == typed
