"""Runs a server from its settings to its end: loads, listens, says that it is ready, and drains when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.core import ServingCore
from toolchain.runtime.server.logs import set_up_logs
from toolchain.runtime.server.settings import ServerSettings

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import Frontends, FrontendSettings, TlsFiles

_log = logging.getLogger("toolchain.serve")
_MIB = 1024 * 1024
#: Seconds that workers have to end after their requests have.
_CLOSE = 5.0


def serve(references: Sequence[str], settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end.

    Args:
        references: bundles or releases: ``PATH`` or ``PATH@target``.
        settings: of the server.
        say: called with one line when the server is ready.

    Raises:
        ToolchainError: USAGE, a setting or file is wrong or a port is in use; MISSING_TOOL, a library is not
            installed; DAMAGED_BUNDLE, INCOMPATIBLE_HOST: a bundle cannot be served.
    """
    set_up_logs()
    run_loop(_serve(references, settings, say))


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop, or where that is not installed on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def _serve(references: Sequence[str], settings: ServerSettings, say: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    core = ServingCore(settings)
    starting = loop.create_task(core.start(references))
    stopping = loop.create_task(stop.wait())
    frontends: Frontends | None = None
    try:
        # The workers start while the front ends are imported; both take a good part of a second.
        await asyncio.wait({starting, stopping}, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        if not (starting.done() and starting.exception()):
            frontends = await _listen(core, settings)
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            say(_ready_line(core, settings, frontends))
            await stop.wait()
    finally:
        stopping.cancel()
        await _drain(core, frontends, starting, settings.limits.drain_s)


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        _log.warning("told to stop again: running requests are given up")
        os._exit(int(ExitCode.INTERRUPTED))
    stop.set()


async def _drain(core: ServingCore, frontends: Frontends | None, starting: asyncio.Task[None], seconds: float) -> None:
    core.stop_accepting()
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError, ToolchainError):
        await starting
    if frontends is not None:
        await frontends.drain(seconds)
    try:
        await asyncio.wait_for(core.close(), _CLOSE)
    except TimeoutError:
        _log.warning("requests that still ran were given up", extra={"facts": {"drain_s": seconds}})
        await core.kill()
    if frontends is not None:
        _log.info("stopped")


async def _listen(core: ServingCore, settings: ServerSettings) -> Frontends:
    try:
        from toolchain.runtime.server.frontend import Listen, start
    except ImportError as error:
        raise _not_installed(error) from error

    tls = _tls(settings)
    grpc_port = settings.grpc_port if settings.grpc else None
    listen = Listen(settings.host, settings.http_port, grpc_port)
    try:
        return await start(core, frontend_settings(settings), listen, tls)
    except ImportError as error:
        raise _not_installed(error) from error
    except ssl.SSLError as error:
        files = f"{settings.tls.certificate}, {settings.tls.key}" if settings.tls else ""
        raise ToolchainError(
            f"not a PEM certificate and its private key: {error.reason or error}", where=files, code=ExitCode.USAGE
        ) from error
    except OSError as error:
        raise _cannot_listen(error, settings) from error


def _not_installed(error: ImportError) -> ToolchainError:
    return ToolchainError(
        f"serving needs a library that cannot be imported: {error}",
        hint='pip install "toolchain[serve]"',
        code=ExitCode.MISSING_TOOL,
    )


def _cannot_listen(error: OSError, settings: ServerSettings) -> ToolchainError:
    ports = [settings.http_port, *([settings.grpc_port] if settings.grpc else [])]
    # gRPC does not say why it could not bind.
    taken = [str(port) for port in ports if _is_taken(settings.host, port)]
    if taken:
        reason = f"port {' and port '.join(taken)} is in use"
        hint = "choose others with --http-port and --grpc-port; 0 is any that is free"
    else:
        reason, hint = f"ports {', '.join(map(str, ports))}: {error.strerror or error}", ""
    return ToolchainError(f"cannot listen on {settings.host}: {reason}", hint=hint, code=ExitCode.USAGE)


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def frontend_settings(settings: ServerSettings) -> FrontendSettings:
    """What the front ends are told of the settings.

    Raises:
        ToolchainError: USAGE, the file of tokens cannot be read or holds none.
    """
    from toolchain.runtime.server.frontend import FrontendSettings, bearer_tokens

    limits = settings.limits
    tokens = read_tokens(Path(settings.token_file)) if settings.token_file else None
    return FrontendSettings(
        max_body=limits.request_mb * _MIB,
        max_pending=max(limits.pending_mb, limits.request_mb) * _MIB,
        max_connections=limits.connections,
        head_timeout=limits.header_timeout_s,
        body_timeout=limits.body_timeout_s,
        idle_timeout=limits.idle_timeout_s,
        allow_admin=settings.admin,
        allow_shared_memory=settings.shared_memory,
        server_name=settings.server_name,
        authorize=bearer_tokens(tokens) if tokens else None,
    )


def read_tokens(path: Path) -> list[str]:
    """The tokens in a file: one a line; empty lines and those that start with ``#`` do not count.

    Raises:
        ToolchainError: USAGE, unreadable or empty.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not text"
        raise ToolchainError(f"cannot be read: {what}", where=f"token file {path}", code=ExitCode.USAGE) from None
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not tokens:
        raise ToolchainError("holds no token", where=f"token file {path}", code=ExitCode.USAGE)
    return tokens


def _tls(settings: ServerSettings) -> TlsFiles | None:
    from toolchain.runtime.server.frontend import TlsFiles

    if settings.tls is None:
        return None
    for file in (settings.tls.certificate, settings.tls.key):
        if not os.access(file, os.R_OK):
            raise ToolchainError("cannot be read", where=file, code=ExitCode.USAGE)
    return TlsFiles(settings.tls.certificate, settings.tls.key)


def _ready_line(core: ServingCore, settings: ServerSettings, frontends: Frontends | None) -> str:
    assert frontends is not None
    secure = "s" if settings.tls else ""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    addresses = f"http{secure}://{host}:{frontends.http_port}"
    if frontends.grpc_port is not None:
        addresses += f" grpc{secure}://{host}:{frontends.grpc_port}"
    models = ", ".join(f"{v.name} {v.version}" for v in core.repository.versions()) or "no model yet"
    return f"ready: {addresses} ({models})"
