"""The report of one target: what was done, measured, chosen and why, as JSON and as Markdown.

Everything in it is either deterministic or a recorded measurement: no build times, no paths, no user.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolchain.figures import apart, number
from toolchain.select import Row, Selection

SCHEMA = 1

FEW_SAMPLES = 10
"""Fewer samples than this are no evidence: each one moves an accuracy by more than 10 %."""
NEAR_CHANCE = 1.1
"""An original whose accuracy is below this many times that of guessing is called no better than guessing."""


def build_report(
    *,
    name: str,
    version: str,
    target: str,
    selection: Selection,
    stages: Mapping[str, Mapping[str, Any]],
    measurement: Mapping[str, Any] | None,
    unmeasured: str,
    tools: Mapping[str, str],
) -> dict[str, Any]:
    """The report as a JSON value.

    Args:
        name: of the release.
        version: of the release.
        target: name of the target.
        selection: the race and its outcome.
        tools: distribution -> version.
        stages: facts by stage id (export, optimize, quantize, compile).
        measurement: facts of the measure stage, or None.
        unmeasured: why nothing was measured, if so.
    """
    rows = [_row_json(row) for row in selection.rows]
    return {
        "schema": SCHEMA,
        "name": name,
        "version": version,
        "target": target,
        "chosen": selection.chosen.id if selection.chosen else None,
        "reason": selection.reason,
        "outcome": selection.code.name.lower(),
        "engines": rows,
        "verification": _verification(rows),
        "measured": {
            "where": _where(measurement),
            "why_not": "" if measurement else unmeasured,
            **{k: v for k, v in (measurement or {}).items() if k in ("host", "threads", "shapes", "device")},
        },
        "stages": stages,
        "tools": dict(sorted(tools.items())),
    }


def _where(measurement: Mapping[str, Any] | None) -> str:
    if not measurement:
        return "not measured"
    device = measurement.get("device")
    if device is None:
        return "on this target's own kind of machine"
    if device["emulated"]:
        return f"not measured: outputs checked on an emulated device ({device['emulated']}) over ssh"
    return f"on a device ({measurement['host']['cpu_model']}) over ssh"


def _row_json(row: Row) -> dict[str, Any]:
    contender = row.contender
    verdict = contender.verdict or {}
    return {
        "engine": contender.id,
        "precision": contender.precision,
        "backend": contender.backend,
        "state": row.state,
        "reason": row.reason,
        "gates": [gate.to_json() for gate in row.gates],
        "size_bytes": contender.size or None,
        "evidence": verdict.get("evidence"),
        "samples": verdict.get("samples"),
        "random": verdict.get("random"),
        "fidelity": verdict.get("worst"),
        "outputs": verdict.get("outputs"),
        "accuracy": verdict.get("accuracy"),
        "measurement": dict(contender.measurement) if contender.measurement else None,
    }


def _verification(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """On what the gates on outputs were checked, and what makes that weak evidence."""
    seen = [row for row in rows if row["samples"]]
    if not seen:
        return {"samples": 0, "random": None, "text": "outputs not verified: no engine ran here", "warnings": []}
    samples, random = max(row["samples"] for row in seen), any(row["random"] for row in seen)
    count = f"{samples} {'random input' if random else 'sample'}{'s' * (samples != 1)}"
    proxy = all(row["evidence"] == "proxy" for row in seen)
    how = "verified by proxy, on the build machine and not on the target," if proxy else "verified"
    text = f"{how} on {count}{': the recipe has no data.evaluation' if random else ' of data.evaluation'}"
    warnings = []
    if samples < FEW_SAMPLES:
        few = "1 sample says" if samples == 1 else f"{samples} samples say"
        warnings.append(f"{few} little about the engine: give more evaluation data")
    if accuracy := next((row["accuracy"] for row in seen if row["accuracy"]), None):
        warnings += _worthless(accuracy)
    return {"samples": samples, "random": random, "text": text, "warnings": warnings}


def _worthless(accuracy: Mapping[str, Any]) -> list[str]:
    """A warning when the original itself scores nothing, so that no engine can lose anything against it."""
    original, chance = accuracy["original"], accuracy.get("chance") or 0.0
    if not accuracy["higher_is_better"] or original > chance * NEAR_CHANCE:
        return []
    guess = f", and guessing scores {chance:.4f}" if original > 0 else ""
    says = f"the original itself scores {original:.4f}{guess}: an accuracy gate says nothing"
    return [f"{says}; check the labels, the preprocessing and the checkpoint"]


def evidence_lines(report: Mapping[str, Any]) -> list[str]:
    """What the outputs were verified on, and a line per warning; nothing for reports that do not say."""
    facts = report.get("verification")
    return [facts["text"], *(f"warning: {warning}" for warning in facts["warnings"])] if facts else []


def weaknesses(report: Mapping[str, Any]) -> list[str]:
    """What the report of a bundle leaves unshown about the engine in it, a line each; empty: nothing."""
    chosen = next((row for row in report.get("engines", ()) if row["engine"] == report.get("chosen")), None)
    if chosen is None:
        return ["the report names no engine"]
    lines = []
    if not chosen.get("samples"):
        lines.append("its outputs were not verified")
    elif chosen.get("random"):
        lines.append("its outputs were verified on random inputs: the recipe has no data.evaluation")
    if chosen["evidence"] == "proxy":
        lines.append("its outputs were verified by proxy: on the build machine, not on the target")
    lines += report.get("verification", {}).get("warnings", [])
    if (chosen["measurement"] or {}).get("median_ms") is None:
        lines.append(f"not measured on the target: {report['measured']['why_not'] or report['measured']['where']}")
    lines += [f"the gate {g['gate']} holds only because {g['note']}" for g in chosen["gates"] if g["note"]]
    return lines


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for a person."""
    lines = [f"# {report['name']} {report['version']} for {report['target']}", ""]
    chosen = report["chosen"] or "none"
    lines += [f"**Engine: {chosen}** ({report['reason']}).", ""]
    lines += table(HEADER, [race_cells(row) for row in report["engines"]])
    if evidence := evidence_lines(report):
        lines += ["", *(f"- {line[:1].upper()}{line[1:]}." for line in evidence)]
    measured = report["measured"]
    if measured.get("host"):
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in measured["shapes"].items())
        lines += ["", f"{_measured_on(measured)} with {measured['threads']} threads, {shapes}."]
    else:
        lines += ["", f"Not measured: {measured['why_not']}."]
    proxies = {row["engine"] for row in report["engines"] if row["evidence"] == "proxy"}
    if proxies:
        lines += ["", PROXY]
    lines += ["", "## Why", ""]
    lines += [f"- {row['engine']}: {row['state']}: {row['reason']}" for row in report["engines"]]
    gates = [g for row in report["engines"] if row["engine"] == report["chosen"] for g in row["gates"]]
    if gates:
        lines += ["", "## Gates of the chosen engine", ""]
        lines += table(
            ("gate", "got", "limit", "held"),
            [(g["gate"], *_apart(g["got"], g["limit"]), "yes" if g["held"] else "NO") for g in gates],
        )
    lines += _tuned(report["stages"])
    lines += _unquantized(report["stages"])
    lines += ["", "## Tools", "", ", ".join(f"{name} {version}" for name, version in report["tools"].items()), ""]
    return "\n".join(lines)


def _apart(got: float | None, limit: float) -> tuple[str, str]:
    return ("not measured", f"{limit:g}") if got is None else apart(got, limit)


def _measured_on(measured: Mapping[str, Any]) -> str:
    device, cpu = measured.get("device"), measured["host"]["cpu_model"]
    if device is None:
        return f"Measured on {cpu}"
    if device["emulated"]:
        return f"Not measured: outputs checked on an emulated device, {cpu} in {device['emulated']}, over ssh"
    governor = f" (clock governor {device['governor']})" if device["governor"] else ""
    cores = f"{measured['host']['cores']} cores, {measured['host']['memory_mb']} MiB"
    return f"Measured on device {cpu}{governor}, {cores}, over ssh"


def measured_lines(report: Mapping[str, Any]) -> list[str]:
    """Where a device took part: what it is, and what became of each engine there."""
    measured = report["measured"]
    if not measured.get("device"):
        return []
    checked = [row["engine"] for row in report["engines"] if (row["measurement"] or {}).get("self_test")]
    passed = f"; self-tests run there: {', '.join(checked)}" if checked else ""
    return [_measured_on(measured) + passed]


PROXY = (
    "`proxy`: outputs verified on the build machine, not on the target: with the same ONNX Runtime model, or with "
    "TVM's engine by the same rules for the build machine."
)
HEADER = ("engine", "state", "accuracy", "drop", "cosine", "median ms", "p95 ms", "load ms", "peak MB", "size MB")


def race_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the race table as text cells, in the order of :data:`HEADER`."""
    accuracy, measured, fidelity = row["accuracy"] or {}, row["measurement"] or {}, row["fidelity"] or {}
    evidence = " (proxy)" if row["evidence"] == "proxy" else ""
    return (
        row["engine"],
        row["state"],
        number(accuracy.get("value"), 4) + (evidence if accuracy else ""),
        number(accuracy.get("drop"), 4),
        number(fidelity.get("cosine"), 5),
        number(measured.get("median_ms"), 3),
        number(measured.get("p95_ms"), 3),
        number(measured.get("load_ms"), 1),
        number(measured.get("peak_mb"), 1),
        number(row["size_bytes"] / 1e6, 3) if row["size_bytes"] else "-",
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _tuned(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which file of tuning records served which engine."""
    tuned = [(stage, facts["records"]) for stage, facts in stages.items() if facts.get("records")]
    lines = [f"- {stage}: {r['used']} of {r['given']} records of {r['file']}" for stage, r in tuned]
    return ["", "## Tuned", "", *lines] if lines else []


def _unquantized(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What stayed float in each int8 candidate, a line per operator and reason."""
    lines: list[str] = []
    for stage, facts in stages.items():
        for group in facts.get("stayed_float") or ():
            lines.append(f"- {stage}: {group['count']} x {group['op']}: {group['reason']}")
    return ["", "## What stayed unquantized", "", *lines] if lines else []
