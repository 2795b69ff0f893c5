"""Shows that a recipe reproduces: two builds that share nothing give the same bytes.

Measurements are the one input that cannot repeat, so the second build is given those of the first: the
choice of engines is a function of them, and everything else must come out identical by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.bundle.read import Release, open_release
from toolchain.errors import ExitCode, ToolchainError
from toolchain.recipe import load_recipe


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Two builds compared: the releases' digests, the number of files, and the files that differ."""

    first: str
    second: str
    files: int
    differing: tuple[str, ...]


def measurements_of(release: Path) -> dict[str, dict[str, Any]]:
    """Measurements by target, as the bundles of a release hold them.

    Raises:
        ToolchainError: USAGE or DAMAGED_BUNDLE.
    """
    bundles = open_release(release).bundles
    return {b.target: json.loads(b.read("measurement.json")) for b in bundles if "measurement.json" in b.files}


def reproduce(recipe: Path, targets: Sequence[str] = (), note: Callable[[str], None] = print) -> Reproduction:
    """Build ``recipe`` twice, in two copies of the repository, with two empty caches, homes and user names.

    Raises:
        ToolchainError: a build failed (with its own code), or NOT_REPRODUCIBLE, naming what differs.
    """
    loaded = load_recipe(recipe.absolute())
    root = loaded.root.absolute()
    inside = loaded.path.absolute().relative_to(root)
    with tempfile.TemporaryDirectory(prefix="toolchain-reproduce-") as name:
        releases: list[Release] = []
        for number, folder in enumerate((Path(name) / "one", Path(name) / "two-elsewhere" / "deeper")):
            note(f"build {number + 1} of 2 in {folder}")
            _copy(root, folder / "repository")
            _build(folder, inside, targets, releases[0].path if releases else None, f"user{number}")
            releases.append(open_release(folder / "out" / loaded.name / loaded.version))
        first, second = releases
        differing, count = _compare(first, second)
        result = Reproduction(first.digest, second.digest, count, tuple(differing))
    if result.first != result.second:
        raise ToolchainError(
            f"two builds differ: {result.first} and {result.second}",
            where=str(recipe),
            details=result.differing,
            hint="look for randomness, times or paths in the model's and the data's functions",
            code=ExitCode.NOT_REPRODUCIBLE,
        )
    return result


def _copy(root: Path, target: Path) -> None:
    ignore = shutil.ignore_patterns(".git", ".venv", "venv", "__pycache__", "artifacts", "*.egg-info", ".*_cache")
    shutil.copytree(root, target, ignore=ignore, symlinks=True)
    # Marks the root of the copy as the original's .git does.
    (target / ".git").mkdir(exist_ok=True)


def _build(folder: Path, recipe: Path, targets: Sequence[str], given: Path | None, user: str) -> None:
    home = folder / "home"
    home.mkdir(parents=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "toolchain.cli.main",
        "build",
        str(folder / "repository" / recipe),
        "--quiet",
    ]
    command += ["--json", "--output", str(folder / "out"), "--cache", str(folder / "cache")]
    for target in targets:
        command += ["--target", target]
    if given is not None:
        command += ["--measurements", str(given)]
    package = str(Path(__file__).resolve().parent.parent)
    environment = dict(
        os.environ, HOME=str(home), USER=user, LOGNAME=user, TZ="UTC" if user == "user0" else "Asia/Tokyo"
    )
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(
            "a build failed while reproducing",
            details=done.stderr.strip().splitlines()[-20:],
            code=ExitCode(done.returncode) if done.returncode in set(ExitCode) else ExitCode.INTERNAL,
        )


def _compare(first: Release, second: Release) -> tuple[list[str], int]:
    """Files that differ, as ``target: name``, and how many files there are."""
    differing, count = [], 0
    for ours in first.bundles:
        theirs = second.bundle(ours.target)
        if theirs is None:
            differing.append(f"{ours.target}: missing from the second build")
            continue
        for name in sorted({*ours.files, *theirs.files}):
            count += 1
            one, two = ours.files.get(name), theirs.files.get(name)
            if one is None or two is None or one.digest != two.digest:
                differing.append(f"{ours.target}: {name}")
    return differing, count
