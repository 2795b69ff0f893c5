"""Compares two releases, target by target."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    """What differs between two bundles, whatever their targets, as name -> (old, new)."""
    before, after = _figures(old), _figures(new)
    return {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }


def _figures(bundle: BundleRef) -> dict[str, Any]:
    info = bundle.manifest
    report: Mapping[str, Any] = json.loads(bundle.read("report.json"))
    evidence = info.evidence
    figures: dict[str, Any] = {
        "digest": bundle.digest,
        "version": info.version,
        "engine": f"{info.engine.precision}/{info.engine.backend}",
        "size (bytes)": bundle.size,
        "inputs": json.dumps(info.contract["inputs"]),
        "outputs": json.dumps(info.contract["outputs"]),
        "accuracy": (evidence.get("accuracy") or {}).get("value"),
        "cosine": (evidence.get("worst") or {}).get("cosine"),
        "median (ms)": (evidence.get("measured") or {}).get("median_ms"),
        "peak memory (MB)": (evidence.get("measured") or {}).get("peak_mb"),
    }
    figures |= {f"tool {name}": version for name, version in info.tools.items()}
    operators = report["stages"].get("optimize", {}).get("operators", {})
    return figures | {f"operator {name}": count for name, count in operators.items()}
