"""The status page and the OpenAPI document."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import Any

from toolchain.runtime.server.api import Core
from toolchain.runtime.server.http_reply import HTML, JSON, Reply
from toolchain.version import __version__

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .8rem;border-bottom:1px solid #ccc}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
)
_COLUMNS = ("Model", "Version", "State", "Requests", "Failed", "Rows per run", "Queue ms", "Compute ms")


class Pages:
    """Pages for people and tools."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._openapi = b""

    def openapi(self) -> Reply:
        """The OpenAPI document of the REST interface."""
        if not self._openapi:
            self._openapi = resources.files("toolchain.runtime.server").joinpath("openapi.json").read_bytes()
        return Reply(200, [self._openapi], JSON)

    def status(self) -> Reply:
        """What is served and how it goes: plain HTML, nothing loaded from elsewhere."""
        found = {(entry["name"], entry["version"]): entry for entry in self._core.statistics()}
        rows = []
        for entry in self._core.index():
            state = f"{entry.state}: {entry.reason}" if entry.reason else entry.state
            cells = [entry.name, entry.version, state, *_figures(found.get((entry.name, entry.version)))]
            rows.append("<tr>" + "".join(_cell(cell, index > 2) for index, cell in enumerate(cells)) + "</tr>")
        head = "".join(_cell(name, index > 2, "th") for index, name in enumerate(_COLUMNS))
        ready = "ready" if self._core.ready() else "not ready"
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>toolchain {__version__}: {ready}</title>'
            f"<style>{_STYLE}</style><h1>toolchain {__version__}: {ready}</h1><table><tr>{head}</tr>{''.join(rows)}"
            '</table><p><a href="/metrics">metrics</a> · <a href="/v2/models/stats">statistics</a> · '
            '<a href="/v2/openapi.json">OpenAPI</a></p></html>\n'
        )
        return Reply(200, [page.encode("utf-8", "replace")], HTML, b"Cache-Control: no-store\r\n")


def _figures(statistics: dict[str, Any] | None) -> list[str]:
    if statistics is None:
        return ["", "", "", "", ""]
    times = statistics["inference_stats"]
    count, runs = times["success"]["count"], statistics["execution_count"]
    figures = [str(count), str(times["fail"]["count"])]
    figures.append(f"{statistics['inference_count'] / runs:.2f}" if runs else "")
    for key in ("queue", "compute_infer"):
        figures.append(f"{times[key]['ns'] / count / 1e6:.3f}" if count else "")
    return figures


def _cell(text: str, number: bool, tag: str = "td") -> str:
    return f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>"
