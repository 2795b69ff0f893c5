"""Loads a bundle for running: checked against the machine and its digests before anything of it is loaded."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolchain.bundle.manifest import BundleManifest
from toolchain.bundle.read import BundleRef
from toolchain.bundle.resolve import resolve, split_reference
from toolchain.errors import ExitCode, ToolchainError
from toolchain.host import Host, detect_host, incompatibilities
from toolchain.runtime.contract import Contract
from toolchain.runtime.engine import CPU_PROVIDER, Engine, open_engine
from toolchain.runtime.need import check_runtime

if TYPE_CHECKING:
    import numpy as np

SELFTEST_NPZ = "selftest.npz"


class Model:
    """A loaded bundle.  Use it as a context manager, or :meth:`close` it, to free its temporary folder early."""

    def __init__(self, bundle: BundleRef, engine: Engine, folder: Path) -> None:
        self.bundle = bundle
        self.engine = engine
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def info(self) -> BundleManifest:
        """What ``bundle.json`` says."""
        return self.bundle.manifest

    @property
    def contract(self) -> Contract:
        return self.engine.contract

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model; see :meth:`toolchain.runtime.engine.Engine.run`.

        Raises:
            ToolchainError: USAGE, it has been closed.
        """
        if not self._finalizer.alive:
            hint = "run it inside of its with block, or before close(); or load it again"
            raise ToolchainError(
                "the model has been closed", where=self.bundle.reference, hint=hint, code=ExitCode.USAGE
            )
        return self.engine.run(inputs)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    reference: str | Path,
    target: str | None = None,
    threads: int = 0,
    host: Host | None = None,
    trust_key: Path | None = None,
) -> Model:
    """Load a bundle.

    Args:
        reference: folder of a release or bundle, or ``PATH@target``.
        target: which of the release's bundles; the one that suits the machine best when not given.
        threads: threads of one run; 0: every processor that this process may use.
        host: the machine, when it is known already.
        trust_key: file of public keys (PEM); the bundle must be signed with one of them.

    Raises:
        ToolchainError: USAGE, nothing there, or it is not clear which bundle is meant; UNTRUSTED, it is not signed
            with a trusted key; INCOMPATIBLE_HOST, this machine or the installed runtime does not suit; MISSING_TOOL,
            the runtime is not installed; DAMAGED_BUNDLE, a digest does not match.
    """
    bundle, folder = place(_reference(str(reference), target), host, trust_key)
    try:
        return Model(bundle, open_engine(folder, threads, bundle.manifest.runtime.provider or CPU_PROVIDER), folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def place(reference: str, host: Host | None = None, trust_key: Path | None = None) -> tuple[BundleRef, Path]:
    """A bundle that was checked as :func:`load` does, and a temporary folder of its files; the caller removes it.

    Raises:
        ToolchainError: as :func:`load`.
    """
    machine = host or detect_host()
    bundle = resolve(reference, machine)
    if trust_key is not None:
        from toolchain.bundle.sign import check_signed, read_trust

        check_signed(bundle, read_trust(trust_key))
    problems = incompatibilities(bundle.manifest.requirements, machine)
    if problems:
        raise ToolchainError(
            f"the bundle for {bundle.target} cannot run here: {'; '.join(problems)}",
            where=str(bundle.layout),
            code=ExitCode.INCOMPATIBLE_HOST,
        )
    check_runtime(bundle.manifest.runtime)
    bundle.verify()
    folder = Path(tempfile.mkdtemp(prefix="toolchain-bundle-"))
    try:
        bundle.link_into(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return bundle, folder


def _reference(reference: str, target: str | None) -> str:
    if target is None:
        return reference
    path, named = split_reference(reference)
    if named and named != target:
        raise ToolchainError(
            f"names target {named!r}, but target {target!r} is asked for too", where=reference, code=ExitCode.USAGE
        )
    return f"{path}@{target}"
