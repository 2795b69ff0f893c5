"""Runs a loaded bundle on the inputs recorded at its build and compares what comes out."""

from __future__ import annotations

import contextlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from toolchain.bundle.check import damaged
from toolchain.bundle.manifest import BundleManifest, Tolerance

if TYPE_CHECKING:
    import numpy as np

    from toolchain.runtime.engine import Engine
    from toolchain.runtime.model import Model

INPUT_PREFIX, OUTPUT_PREFIX = "input:", "output:"


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """How far one output lies from the recorded one.

    Attributes:
        max_abs_error: largest absolute difference, in the output's unit.
        cosine: cosine similarity of the flattened outputs; 1 when both are zero.
        problems: what is outside of the tolerance, a line each.
    """

    name: str
    max_abs_error: float
    cosine: float
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The result of a self-test."""

    outputs: tuple[OutputCheck, ...]

    @property
    def passed(self) -> bool:
        return not any(check.problems for check in self.outputs)

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(line for check in self.outputs for line in check.problems)


def run_selftest(model: Model | Engine, selftest: Path | IO[bytes], tolerance: Tolerance | None = None) -> SelfTest:
    """Run the recorded inputs and compare the outputs with the recorded ones.

    Args:
        model: a loaded bundle, or an engine.
        selftest: ``selftest.npz``: keys ``input:<name>`` and ``output:<name>``.
        tolerance: how far outputs may differ; the bundle's own when not given.

    Raises:
        ToolchainError: DAMAGED_BUNDLE, the file does not hold a self-test for this model, or no tolerance is known.
    """
    where = str(selftest) if isinstance(selftest, Path) else "selftest.npz"
    info = model.info
    limits = tolerance or (info.selftest if isinstance(info, BundleManifest) else None)
    if limits is None or (limits.cosine is None and limits.max_abs_error is None):
        raise damaged("no tolerance is given for the self-test", where)
    arrays = _read(selftest, where)
    inputs = {k.removeprefix(INPUT_PREFIX): a for k, a in arrays.items() if k.startswith(INPUT_PREFIX)}
    recorded = {k.removeprefix(OUTPUT_PREFIX): a for k, a in arrays.items() if k.startswith(OUTPUT_PREFIX)}
    names = {spec.name for spec in model.contract.outputs}
    if set(recorded) != names:
        raise damaged(f"holds the outputs {sorted(recorded)}, the model has {sorted(names)}", where)
    got = model.run(inputs)
    return SelfTest(tuple(_compare(name, got[name], recorded[name], limits) for name in sorted(names)))


def _read(selftest: Path | IO[bytes], where: str) -> dict[str, np.ndarray]:
    import numpy as np

    try:
        # Opened here, since numpy leaves a file open that turns out to be no archive.
        with (
            contextlib.nullcontext(selftest) if not isinstance(selftest, Path) else open(selftest, "rb") as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise damaged(f"is not an archive of numpy arrays: {error}", where) from error


def _compare(name: str, got: np.ndarray, recorded: np.ndarray, limits: Tolerance) -> OutputCheck:
    import numpy as np

    if got.shape != recorded.shape:
        problem = f"output {name!r} has shape {list(got.shape)}, recorded is {list(recorded.shape)}"
        return OutputCheck(name, float("inf"), 0.0, (problem,))
    mine, its = got.astype(np.float64).ravel(), recorded.astype(np.float64).ravel()
    error = float(np.max(np.abs(mine - its), initial=0.0))
    norms = float(np.linalg.norm(mine) * np.linalg.norm(its))
    cosine = float(mine @ its) / norms if norms else float(np.array_equal(mine, its))
    problems = []
    # Written so that NaN is a problem.
    if limits.max_abs_error is not None and not error <= limits.max_abs_error:
        problems.append(f"output {name!r}: largest error {error:.3g}, allowed {limits.max_abs_error:.3g}")
    if limits.cosine is not None and not cosine >= limits.cosine:
        problems.append(f"output {name!r}: cosine similarity {cosine:.6f}, at least {limits.cosine:.6f} is needed")
    return OutputCheck(name, error, cosine, tuple(problems))
