"""Compares two releases, target by target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.bundle.read import BundleRef, Release

Change = tuple[Any, Any]


def compare_releases(old: Release, new: Release) -> dict[str, dict[str, Change]]:
    """By target: what differs, as name -> (old, new); an empty mapping when nothing does."""
    result: dict[str, dict[str, Change]] = {}
    for target in sorted({b.target for b in (*old.bundles, *new.bundles)}):
        one, two = old.bundle(target), new.bundle(target)
        if one is None or two is None:
            result[target] = {"bundle": ("none" if one is None else "there", "none" if two is None else "there")}
        else:
            result[target] = compare_bundles(one, two)
    return result


def compare_bundles(old: BundleRef, new: BundleRef) -> dict[str, Change]:
    """What differs between two bundles, whatever their targets, as name -> (old, new); what matters most first."""
    before, after = _figures(old), _figures(new)
    return {
        name: (before.get(name), after.get(name)) for name in {**before, **after} if before.get(name) != after.get(name)
    }


def _figures(bundle: BundleRef) -> dict[str, Any]:
    info = bundle.manifest
    report: Mapping[str, Any] = json.loads(bundle.read("report.json"))
    evidence = info.evidence
    measured = evidence.get("measured") or {}
    figures: dict[str, Any] = {
        "version": info.version,
        "engine": f"{info.engine.precision}/{info.engine.backend}",
        "accuracy": (evidence.get("accuracy") or {}).get("value"),
        "cosine": (evidence.get("worst") or {}).get("cosine"),
        "median (ms)": measured.get("median_ms"),
        "p95 (ms)": measured.get("p95_ms"),
        "load (ms)": measured.get("load_ms"),
        "peak memory (MB)": measured.get("peak_mb"),
        "size (bytes)": bundle.size,
        "inputs": signature_text(info.contract["inputs"]),
        "outputs": signature_text(info.contract["outputs"]),
    }
    figures |= {f"tool {name}": version for name, version in info.tools.items()}
    operators = report["stages"].get("optimize", {}).get("operators", {})
    return figures | {f"operator {name}": count for name, count in operators.items()} | {"digest": bundle.digest}


def signature_text(values: Sequence[Mapping[str, Any]]) -> str:
    """Inputs or outputs of a contract, e.g. ``"ids int64[batch, sequence], mask int64[batch, sequence]"``."""
    return ", ".join(value_text(value) for value in values)


def value_text(value: Mapping[str, Any]) -> str:
    """One input or output of a contract, e.g. ``"image float32[batch, 1, 8, 8]"``; ``?``: a size that depends."""
    sizes = ", ".join("?" if size is None else str(size) for size in value["shape"])
    return f"{value['name']} {value['dtype']}[{sizes}]"
