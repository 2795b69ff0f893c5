"""Serves a bundle on a Ray cluster: the application that ``export ray-serve`` writes, run from a folder for a time."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.exports.files import write_tree
from toolchain.exports.ray_serve import Scaling, ray_serve_tree
from toolchain.exports.source import Source
from toolchain.install import install_command


def serve_on_ray(source: Source, scaling: Scaling, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests that run are answered then.

    The cluster is the one that ``RAY_ADDRESS`` names, else one of this machine's own that ends with the server.
    Machines of a cluster get the application from here; each needs this package.

    Args:
        source: the bundle.
        scaling: of the engine's replicas.
        host: address to listen on.
        port: of REST.
        say: called with one line when the server is ready.

    Raises:
        ToolchainError: MISSING_TOOL, Ray is not installed; INCOMPATIBLE_HOST, no replica can run the bundle; USAGE.
    """
    tree = ray_serve_tree(source, scaling)
    ray, serve = _ray()
    with tempfile.TemporaryDirectory(prefix="toolchain-ray-") as name:
        folder = Path(name) / "app"
        write_tree(tree, folder)
        with _cluster(ray, folder), _stopped() as stop:
            serve.start(http_options={"host": host, "port": port})
            try:
                _run(serve, folder, source.name)
                manifest = source.manifest
                replicas = f"{scaling.min_replicas} to {scaling.max_replicas} replicas"
                say(f"ready: http://{host}:{port} ({manifest.name} {manifest.version}, {replicas} on ray)")
                stop.wait()
            finally:
                serve.delete(source.name)


def _ray() -> tuple[Any, Any]:
    try:
        return importlib.import_module("ray"), importlib.import_module("ray.serve")
    except ImportError as error:
        raise ToolchainError(
            f"serving on Ray needs a library that cannot be imported: {error}",
            hint=install_command("ray"),
            code=ExitCode.MISSING_TOOL,
        ) from None


@contextlib.contextmanager
def _cluster(ray: Any, folder: Path) -> Iterator[None]:
    """Be in a cluster whose processes can import what is in ``folder``."""
    if os.environ.get("RAY_ADDRESS"):
        # Ray sends the folder to every machine.
        ray.init(runtime_env={"working_dir": str(folder)}, log_to_driver=False)
    else:
        paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
        ray.init(
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
            include_dashboard=False,
            log_to_driver=False,
            address="local",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that the signals to end set; Ray's own handlers would end the process at once."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(serve: Any, folder: Path, name: str) -> None:
    sys.path.insert(0, str(folder))
    try:
        application = importlib.import_module("app").application
        serve.run(application, name=name, route_prefix="/")
    except RuntimeError as error:
        raise ToolchainError(
            "no replica on the cluster can serve the bundle",
            details=str(error).strip().splitlines()[-6:],
            hint="each machine needs this package, what the engine needs, and a processor that the bundle suits",
            code=ExitCode.INCOMPATIBLE_HOST,
        ) from error
    finally:
        sys.path.remove(str(folder))
