"""What HTTP and the engine alone cost: uvloop and httptools, nothing is looked at, the engine runs on the loop."""

import asyncio
import os

import httptools
import numpy as np
import uvloop
from session import Session

SESSION = Session()
#: The request's inputs, as the other servers read them from it.
INPUTS = dict(np.load(os.environ["INPUTS"]))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


class Floor(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        body = next(iter(SESSION.run(INPUTS).values())).tobytes()
        self.transport.write(HEAD % len(body) + body)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", int(os.environ["HTTP_PORT"]))
    await server.serve_forever()


uvloop.run(main())
