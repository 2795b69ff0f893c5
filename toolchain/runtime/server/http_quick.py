"""The short way through a connection: requests whose head came before, with exactly the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.runtime.server.api import ServeError
from toolchain.runtime.server.frontend import check_bearer
from toolchain.runtime.server.http_answering import BODY, IDLE, JOINED, Answering
from toolchain.runtime.server.http_heads import LONGEST, Head
from toolchain.runtime.server.http_reply import BINARY, JSON
from toolchain.runtime.server.http_request import Request, begin, room_for

if TYPE_CHECKING:
    from toolchain.runtime.server.http_server import HttpServer

#: Larger bodies get memory of their own at once, and count for ``max_pending``.
SMALL_BODY = 32 * 1024
_END = b"\r\n\r\n"


class QuickAnswering(Answering):
    """Takes requests with known heads, of which the parser needn't know, and answers what can be answered at once.

    Whatever is not as usual is left to the parser and the handlers, which say what is wrong; so all answers are theirs.
    """

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server)
        self.incoming: Request | None = None
        self.stall = 0.0
        self._room: memoryview | None = None
        self._direct: memoryview | None = None
        self._filled = 0

    def take_known(self, nbytes: int) -> bool:
        """Take a request from the beginning of the server's buffer; False: nothing has happened."""
        server = self.server
        end = server.buffer.find(_END, 0, nbytes if nbytes < LONGEST else LONGEST) + 4
        if end < 4:
            return False
        text = bytes(server.view[:end])
        head = server.heads.known.get(text)
        if head is None:
            server.heads.meet(text)
            return False
        if server.settings.authorize is not None and not self._may(head):
            return False
        came, length = nbytes - end, head.length
        if came == length <= SMALL_BODY:
            self._answer_known(head, bytes(server.view[end:nbytes]))
            return True
        return came <= length > SMALL_BODY and self._receive_known(head, server.view[end:nbytes])

    def _may(self, head: Head) -> bool:
        try:
            check_bearer(self.server.settings, head.headers.get(b"authorization", b"").decode("latin-1"))
        except ServeError:
            return head.route.open
        return True

    def _answer_known(self, head: Head, body: bytes) -> None:
        """Answer a request that came in one piece, at once where nothing keeps it waiting."""
        server = self.server
        self.deadline = server.now + server.settings.idle_timeout
        alone = self.current is None and not self.queue and not self.write_deadline
        if not head.quick or not alone or server.draining or server.settings.log_request is not None:
            self.complete(Request(head.method, head.target, head.route, head.headers, body))
            return
        answer = head.quick(body, head.json_length)
        if isinstance(answer, tuple):
            self._send_quickly(*answer)
            return
        self.current = request = Request(head.method, head.target, head.route, head.headers, body)
        if answer is None:
            self.run(request)
        else:
            self.task = begin(self.wait(request, answer), server.loop)

    def _send_quickly(self, parts: list[bytes | memoryview], json_length: int | None) -> None:
        server = self.server
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if json_length is None:
            head = b"%b%d\r\n\r\n" % (server.good[JSON], size)
        else:
            line = b"%b%d\r\nInference-Header-Content-Length: %d\r\n\r\n"
            head = line % (server.good[BINARY], size, json_length)
        if size <= JOINED:
            self.transport.write(b"".join([head, *parts]))
        else:
            self.transport.writelines([head, *parts])
        server.counts[200] = server.counts.get(200, 0) + 1

    def _receive_known(self, head: Head, came: memoryview) -> bool:
        """Make room for a large body and take what has come of it; False: there is none."""
        server = self.server
        request = Request(head.method, head.target, head.route, head.headers)
        try:
            server.reserve(request, head.length)
        except ServeError:
            return False
        room = room_for(head.length, head.headers.get(b"inference-header-content-length", b"0"))
        self._filled = len(came)
        room[: self._filled] = came
        if self._filled == head.length:
            request.body = room
            self.complete(request)
            return True
        self.incoming, self._room, self._direct = request, room, room[self._filled :]
        self.phase = BODY
        self.stall = server.now + server.settings.body_timeout
        self.deadline = self.stall + head.length / server.settings.min_rate
        return True

    def complete(self, request: Request) -> None:
        """A request has come whole: answer it, in its turn."""
        server = self.server
        self.incoming = None
        self.phase = IDLE
        self.deadline = server.now + server.settings.idle_timeout
        if self.current is None and not self.queue and not self.write_deadline:
            self.run(request)
        else:
            self.queue.append(request)
            self.transport.pause_reading()
