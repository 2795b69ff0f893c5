"""The search for better choices than the rules' for one target: loop nest by loop nest, then the whole model.

Every measurement runs in a child of its own, side by side with the rule's choice.  A candidate is kept if it is
faster by :data:`MARGIN`, twice; the records are kept if the whole model is faster with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.trials import Progress, Workers
from toolchain.tvm.nests import Nest
from toolchain.tvm.records import Records, from_json, to_json

MARGIN = 0.03
"""Least gain of a candidate: less than that is noise."""

WHOLE_MARGIN = 0.005
"""Least gain of the whole model."""

_CANDIDATES = 12
_QUICK, _LONG, _WHOLE = 0.15, 0.6, 2.0  # seconds of measuring
_TRIAL_LIMIT, _WHOLE_LIMIT = 30.0, 900.0  # seconds after which a child is ended


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how to measure.

    Attributes:
        budget: wall-clock seconds, checked between candidates.
        threads: threads of what is measured, 0 for all cores.
        trial: what measures a candidate in a child, ``"module:function"``.
    """

    budget: float = 600.0
    threads: int = 1
    trial: str = "toolchain.tvm.tuning:trial"


@dataclass(frozen=True, slots=True)
class Task:
    """One target's model: the compile pipeline's machine and linker, the model, its sizes, a folder for libraries."""

    target: str
    machine: Mapping[str, Any]
    linker: str
    model: Path
    sizes: Mapping[str, int]
    folder: Path


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for one loop nest.

    Attributes:
        nest: as text, as in the file of records.
        rule: the rule's choice.
        best: the best choice measured.
        ratio: its time, as a share of the rule's.
        share: estimated share of the loop nest in the model's time.
        tried: candidates measured.
        failed: candidates that crashed, hung or computed something else.
        state: ``"searched"``, ``"known"`` (by an earlier run), ``"partly"`` or ``"not reached"`` (the budget is spent).
        kept: whether it is in the records.
    """

    nest: str
    rule: str
    best: str
    ratio: float
    share: float
    tried: int = 0
    failed: tuple[str, ...] = ()
    state: str = "searched"
    kept: bool = False


@dataclass(frozen=True, slots=True)
class TargetResult:
    """What was found for one target.

    Attributes:
        found: every loop nest, by share.
        records: those that pay.
        ratio: the whole model's time with them, as a share of that without; 1 when there are none.
        rule_ms, best_ms: the whole model's time without and with them.
        refused: why the model can't be compiled; "" otherwise.
    """

    target: str
    found: tuple[Found, ...]
    records: Records
    ratio: float = 1.0
    rule_ms: float = 0.0
    best_ms: float = 0.0
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Machine-readable."""
        return {
            "nests": [{name: getattr(f, name) for name in Found.__dataclass_fields__} for f in self.found],
            "records": to_json(self.records),
            "whole_model": {"ratio": self.ratio, "rules_ms": self.rule_ms, "records_ms": self.best_ms},
            "refused": self.refused,
        }


@dataclass(slots=True)
class Search:
    """One target's search."""

    task: Task
    settings: Settings
    workers: Workers
    progress: Progress
    say: Callable[[str], None]
    _end: float = math.inf
    _seen: list[Found] = field(default_factory=list)

    def run(self, before: Records) -> TargetResult:
        """Search, then keep what makes the whole model faster.

        Args:
            before: records of earlier runs: tried first, and kept for loop nests that are not reached.

        Raises:
            ToolchainError: MEASURE: the child that compiles the whole model by the rules crashed.
        """
        self.task.folder.mkdir(parents=True)
        started = time.monotonic()
        rules, why = self._whole({}, "rules")
        if rules is None:
            raise ToolchainError(f"the whole model: {why}", where=self.task.target, code=ExitCode.MEASURE)
        if "refused" in rules:
            return TargetResult(self.task.target, (), {}, refused=str(rules["refused"]))
        # What remains must do for compiling the whole model with records, and comparing it.
        reserved = 1.5 * (time.monotonic() - started) + _WHOLE
        self._end = started + self.settings.budget - reserved
        for number, nest in enumerate(rules["nests"]):
            found = self.nest(number, nest, before)
            self._seen.append(found)
            self.say(self._line(found, len(rules["nests"])))
        return self._settle(rules)

    def _line(self, found: Found, total: int) -> str:
        best = "the rule's" if found.best == found.rule else f"{found.best}, {1 / found.ratio:.2f}x as fast"
        failed = f", {len(found.failed)} failed ({found.failed[0]})" if found.failed else ""
        return f"{len(self._seen):>4}/{total}  {found.nest}: {found.rule} -> {best} [{found.state}{failed}]"

    def nest(self, number: int, nest: Mapping[str, Any], before: Records) -> Found:
        """Search for one loop nest, unless an earlier run did or the budget is spent.

        Args:
            number: names its folder.
            nest: an entry of ``nests`` of :func:`toolchain.tvm.tuning.whole`.
            before: records of earlier runs.
        """
        text, rule, share = nest["nest"], nest["rule"], nest["share"]
        key = f"{text} at {'x'.join(map(str, nest['data']))}"
        parsed = Nest.parse(text)
        earlier = before.get(parsed) if parsed is not None else None
        if (entry := self.progress.get(key)) is not None:
            return Found(text, rule, entry["best"], entry["ratio"], share, entry["tried"], (), "known")
        if time.monotonic() > self._end:
            return Found(text, rule, str(earlier or rule), 1.0, share, state="not reached")
        found = self._try(number, nest, [str(earlier)] if earlier else [])
        if found.state == "searched":
            self.progress.put(key, {"best": found.best, "ratio": found.ratio, "tried": found.tried})
        return found

    def _try(self, number: int, nest: Mapping[str, Any], first: Sequence[str]) -> Found:
        """Every candidate once, then the best ones again for longer."""
        rule, folder = nest["rule"], self.task.folder / str(number)
        folder.mkdir()
        wanted = [c for c in dict.fromkeys([*first, *nest["candidates"]]) if c != rule]
        ratios: dict[str, float] = {}
        failed: list[str] = []
        for candidate in wanted:
            if time.monotonic() > self._end:
                break
            result, why = self._trial(nest, candidate, folder, _QUICK)
            if result is None:
                failed.append(f"{candidate}: {why}")
            else:
                ratios[candidate] = result["ratio"]
        state = "searched" if len(ratios) + len(failed) == len(wanted) else "partly"
        best, ratio = rule, 1.0
        for candidate in sorted(ratios, key=lambda c: ratios[c])[:3]:
            if ratios[candidate] >= 1 - MARGIN:
                break
            result, _ = self._trial(nest, candidate, folder, _LONG)
            if result is not None and result["ratio"] < min(ratio, 1 - MARGIN):
                best, ratio = candidate, result["ratio"]
        return Found(nest["nest"], rule, best, ratio, nest["share"], len(ratios), tuple(failed), state)

    def _trial(
        self, nest: Mapping[str, Any], candidate: str, folder: Path, seconds: float
    ) -> tuple[dict[str, Any] | None, str]:
        request = {
            **self._request(_TRIAL_LIMIT, folder, seconds),
            "nest": nest["nest"],
            "data": nest["data"],
            "choices": [nest["rule"], candidate],
        }
        return self.workers.call(self.settings.trial, request)

    def _request(self, limit: float, folder: Path, measure: float) -> dict[str, Any]:
        return {
            "machine": dict(self.task.machine),
            "linker": self.task.linker,
            "folder": str(folder),
            "seconds": limit,
            "measure": measure,
            "threads": self.settings.threads,
            "records": {},
        }

    def _whole(self, records: Mapping[str, str], name: str) -> tuple[dict[str, Any] | None, str]:
        folder = self.task.folder / name
        folder.mkdir()
        request = {
            **self._request(_WHOLE_LIMIT, folder, 0.0),
            "model": str(self.task.model),
            "sizes": dict(self.task.sizes),
            "records": dict(records),
            "candidates": _CANDIDATES,
        }
        return self.workers.call("toolchain.tvm.tuning:whole", request)

    def _settle(self, rules: Mapping[str, Any]) -> TargetResult:
        """The records with which the whole model is faster: all of them, or the half that should give most, ..."""
        better = [f for f in self._seen if f.best != f.rule]
        better.sort(key=lambda f: (-f.share * (1 - f.ratio), f.nest))
        for attempt in range(len(better).bit_length()):
            kept = better[: math.ceil(len(better) / 2**attempt)]
            records = {f.nest: f.best for f in kept}
            compared, why = self._compare(rules, records, f"records-{attempt}")
            if compared is None:
                verdict = f"{why}; dropping half of them"
            else:
                pays = compared["ratio"] <= 1 - WHOLE_MARGIN
                verdict = f"{compared['second_ms']:.3f} ms, without {compared['first_ms']:.3f} ms"
                verdict += "" if pays else ": they don't pay, dropping half of them"
            self.say(f"the whole model with {len(kept)} record{'s' * (len(kept) > 1)}: {verdict}")
            if compared is not None and pays:
                return self._without_idle(rules, records, compared)
        return self._result({}, {"ratio": 1.0, "first_ms": 0.0, "second_ms": 0.0})

    def _without_idle(
        self, rules: Mapping[str, Any], records: Mapping[str, str], compared: Mapping[str, float]
    ) -> TargetResult:
        """Leaves out, as long as there is time, each record without which the whole model is faster still."""
        for number, nest in enumerate(reversed(list(records))):
            if len(records) == 1 or time.monotonic() > self._end:
                break
            fewer = {n: choice for n, choice in records.items() if n != nest}
            result, _ = self._compare(rules, fewer, f"without-{number}")
            if result is not None and result["ratio"] < compared["ratio"] - WHOLE_MARGIN:
                self.say(f"the whole model without {nest}: {result['second_ms']:.3f} ms; dropping it")
                records, compared = fewer, result
        return self._result(records, compared)

    def _compare(
        self, rules: Mapping[str, Any], records: Mapping[str, str], name: str
    ) -> tuple[dict[str, Any] | None, str]:
        """The whole model with records against without, or why it does not run with them."""
        compiled, why = self._whole(records, name)
        if compiled is None or "refused" in compiled:
            return None, why or str((compiled or {})["refused"])
        request = {**self._request(_WHOLE_LIMIT, self.task.folder, _WHOLE), "model": str(self.task.model)}
        request |= {"first": rules["libraries"], "second": compiled["libraries"]}
        return self.workers.call("toolchain.tvm.tuning:compare_models", request)

    def _result(self, records: Mapping[str, str], compared: Mapping[str, float]) -> TargetResult:
        found = tuple(replace(f, kept=f.nest in records) for f in self._seen)
        times = compared["ratio"], compared["first_ms"], compared["second_ms"]
        return TargetResult(self.task.target, found, from_json(records), *times)
