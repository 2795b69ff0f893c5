"""Heads of requests that came before, by their exact bytes.

Clients send the same head again and again: method, path, headers and length.  A head that the parser has read once, and
that says nothing but how long the body of an inference is, need not be read again: what came of it is kept.  A head is
kept when it comes the second time, after a parser of its own has read exactly these bytes as one whole head; so what is
kept can say nothing that the parser of the connection would not have said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import httptools

from toolchain.runtime.server.http_request import WANTED
from toolchain.runtime.server.repeats import Repeats

if TYPE_CHECKING:
    from toolchain.runtime.server.routes import Quick, Route, Router

#: The longest head that is kept, and how many are.
LONGEST = 2048
_KEPT = 1024
#: What ``Route.quick`` needs to know of a head, and what is seen to before it is asked.
_USUAL = frozenset({b"host", b"content-length", b"authorization", b"inference-header-content-length"})
#: Heads with one of these have more to them than a body of the announced length.
_SPECIAL = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"http2-settings"})


class Head(NamedTuple):
    """What a head says: the parts of a request, and how many bytes follow.

    ``quick`` is the route's where the head says nothing that it would not know of, and ``json_length`` what it takes.
    """

    method: bytes
    target: bytes
    route: Route
    headers: dict[bytes, bytes]
    length: int
    quick: Quick | None
    json_length: int | None


class Heads:
    """The heads that one server knows.

    Args:
        router: finds the routes of new ones.
        longest: bytes of the longest head that the server takes.
    """

    def __init__(self, router: Router, longest: int) -> None:
        self._router = router
        self._longest = min(longest, LONGEST)
        self.known: dict[bytes, Head] = {}
        self._repeats = Repeats()

    def meet(self, head: bytes) -> None:
        """Note a head that is not known; the second time it is read and kept if that is safe."""
        if len(head) > self._longest or not self._repeats.again(head):
            return
        read = _Reader().read(head)
        if read is None:
            return
        method, target, headers = read
        length = headers.get(b"content-length", b"")
        route = self._router.resolve(method, target)
        if not route.waits or not length.isdigit() or not 0 < int(length) <= route.max_body:
            return
        if len(self.known) >= _KEPT:
            self.known.clear()
        json_length = headers.get(b"inference-header-content-length")
        usual = _USUAL.issuperset(headers) and (json_length is None or json_length.isdigit())
        quick = route.quick if usual else None
        self.known[head] = Head(
            method, target, route, headers, int(length), quick, int(json_length) if quick and json_length else None
        )


class _Reader:
    """Reads one head."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.begun = self.ended = 0
        self.plain = True

    def read(self, head: bytes) -> tuple[bytes, bytes, dict[bytes, bytes]] | None:
        """Method, target and headers; None where these bytes are not exactly one head of the plain kind."""
        try:
            self.parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return None
        plain = self.plain and self.begun == 1 and self.ended == 1 and self.parser.should_keep_alive()
        if not plain or self.parser.get_http_version() != "1.1" or b"host" not in self.headers:
            return None
        wanted = {name: value for name, value in self.headers.items() if name in WANTED}
        return self.parser.get_method(), self.url, wanted

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        # Said twice: what that means is not decided here.
        self.plain = self.plain and name not in _SPECIAL and not (name in WANTED and name in self.headers)
        if name == b"connection" and value.strip().lower() != b"keep-alive":
            self.plain = False
        self.headers[name] = value

    def on_headers_complete(self) -> None:
        self.ended += 1

    def on_body(self, body: bytes) -> None:
        self.plain = False

    def on_message_complete(self) -> None:
        self.plain = False
