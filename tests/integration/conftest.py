"""Fixtures that several modules share; what they need is imported when one is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.edge_samples import Runtime
    from helpers.ssh_device import SshDevice
    from tvm_support import Stages

    from toolchain.runtime.edge.build import RunnerFiles


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Runs compile stages in children of one worker pool."""
    import tvm_support

    yield from tvm_support.stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``onnx`` artifact of a small network for 8x8 images."""
    from tvm_support import digits_cnn

    return digits_cnn(tmp_path_factory.mktemp("digits") / "onnx")


@pytest.fixture(scope="module")
def built() -> RunnerFiles:
    """The edge runtime for this machine."""
    from edge_support import native_runner

    return native_runner()


@pytest.fixture(scope="module")
def runtime(built: RunnerFiles) -> Runtime:
    from helpers.edge_samples import Runtime

    assert built.library is not None
    return Runtime(built.library)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Engines of the small models that the edge runtime runs."""
    from edge_support import sample_engines

    return sample_engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def release(engines: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of one of them, with a self-test."""
    from edge_support import release_with_selftest

    return release_with_selftest(engines["any"], tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def ssh_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    """An emulated device behind a real SSH server."""
    from helpers.emulator_packages import EmulatorError
    from helpers.ssh_device import SshDevice

    try:
        with SshDevice(tmp_path_factory.mktemp("ssh") / "device") as started:
            yield started
    except EmulatorError as error:
        pytest.skip(str(error))
