"""What both front ends, REST and gRPC, are given, and the one call that starts and stops them together."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from toolchain.runtime.server.api import Core, ServeError, Status

if TYPE_CHECKING:
    from toolchain.runtime.server.grpc_server import GrpcServer
    from toolchain.runtime.server.http_server import HttpServer

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """Limits and permissions of both front ends.  Sizes are in bytes, times in seconds.

    Attributes:
        max_body: the largest request, also after decompression.
        max_head: request line and headers together.
        max_connections: HTTP connections at the same time; more are answered with 503.
        max_pending: bytes of the HTTP bodies that all connections together may hold at the same time.
        head_timeout: from a request's first byte to its last header, however the bytes come.
        body_timeout: longest pause within a body; a whole body has this and a second for each ``min_rate`` bytes.
        min_rate: bytes a second.
        idle_timeout: longest pause between requests of a connection.
        write_timeout: longest time that a client may leave an answer unread.
        allow_admin: whether models may be loaded and unloaded and log settings changed over the network.
        allow_shared_memory: whether clients may name shared memory of this machine.
        authorize: says whether a bearer token is good; None lets everybody in.
        compress: whether answers are compressed for clients that accept it.
        server_name: what the server calls itself in its metadata; some of Triton's example scripts insist on "triton".
        log_request: called with (method, path, status, nanoseconds) after each HTTP answer.
    """

    max_body: int = 64 * MIB
    max_head: int = 16 * 1024
    max_connections: int = 1024
    max_pending: int = 512 * MIB
    head_timeout: float = 10.0
    body_timeout: float = 20.0
    min_rate: int = 16 * 1024
    idle_timeout: float = 75.0
    write_timeout: float = 30.0
    allow_admin: bool = False
    allow_shared_memory: bool = False
    authorize: Callable[[str], bool] | None = None
    compress: bool = True
    server_name: str = "toolchain"
    log_request: Callable[[str, str, int, int], None] | None = None


class Listen(NamedTuple):
    """Where to listen: port 0 is any that is free, ``grpc_port`` None is no gRPC."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    reuse_port: bool = False


class TlsFiles(NamedTuple):
    """PEM files of the certificate chain and of its private key."""

    certificate: str
    key: str

    def context(self, protocol: str) -> ssl.SSLContext:
        """A server's TLS context: TLS 1.2 or newer, one protocol by its ALPN name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        context.set_alpn_protocols([protocol])
        return context


def bearer_tokens(tokens: Iterable[str]) -> Callable[[str], bool]:
    """An ``authorize`` that knows these tokens; the time it takes says nothing about them."""
    known = [hashlib.sha256(token.encode()).digest() for token in tokens]

    def authorize(token: str) -> bool:
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(digest, good) for good in known) > 0  # no early end: every one is compared

    return authorize


def check_bearer(settings: FrontendSettings, header: str | None) -> None:
    """Let a request with this ``Authorization`` header pass.

    Raises:
        ServeError: UNAUTHENTICATED.
    """
    if settings.authorize is None:
        return
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not settings.authorize(token.strip()):
        raise ServeError(Status.UNAUTHENTICATED, "a valid bearer token is needed: send 'Authorization: Bearer TOKEN'")


def check_admin(settings: FrontendSettings, action: str) -> None:
    """Let an administrative call pass.

    Raises:
        ServeError: FORBIDDEN.
    """
    if not settings.allow_admin:
        raise ServeError(Status.FORBIDDEN, f"{action} over the network is off; start the server with --allow-admin")


@dataclass(slots=True)
class Frontends:
    """The running front ends."""

    http: HttpServer
    grpc: GrpcServer | None

    @property
    def http_port(self) -> int:
        return self.http.port

    @property
    def grpc_port(self) -> int | None:
        return self.grpc.port if self.grpc is not None else None

    async def drain(self, grace: float) -> None:
        """Take no new connections, let running requests end for ``grace`` seconds, then close everything."""
        import asyncio

        ends = [self.http.drain(grace)]
        if self.grpc is not None:
            ends.append(self.grpc.drain(grace))
        await asyncio.gather(*ends)


async def start(
    core: Core, settings: FrontendSettings, listen: Listen | None = None, tls: TlsFiles | None = None
) -> Frontends:
    """Start REST and, unless ``listen`` says otherwise, gRPC over one core, on the running event loop.

    Raises:
        OSError: an address can't be listened on.
    """
    from toolchain.runtime.server.http_server import HttpServer
    from toolchain.runtime.server.shared_memory import SharedMemory

    listen = listen or Listen()
    memory = SharedMemory(settings.allow_shared_memory)
    http = HttpServer(core, settings, memory)
    grpc: GrpcServer | None = None
    if listen.grpc_port is not None:
        from toolchain.runtime.server.grpc_server import GrpcServer

        # First, for who asks over HTTP whether the server is ready may use gRPC at once.
        grpc = GrpcServer(core, settings, memory)
        await grpc.listen(listen.host, listen.grpc_port, tls.context("h2") if tls else None, listen.reuse_port)
        http.also.append(grpc.metrics)
    try:
        context = tls.context("http/1.1") if tls else None
        await http.listen(listen.host, listen.http_port, context, listen.reuse_port)
    except BaseException:
        if grpc is not None:
            await grpc.drain(0)
        raise
    return Frontends(http, grpc)
