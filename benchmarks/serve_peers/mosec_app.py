"""The mosec peer: bytes in, bytes out, or JSON both ways, by RAW."""

import os
import sys

from mosec import Server, Worker
from session import Session

RAW = os.environ.get("RAW") == "1"


class Inference(Worker):
    """One engine, batches of one."""

    def __init__(self) -> None:
        super().__init__()
        self._session = Session()

    def deserialize(self, data):
        return bytes(data) if RAW else super().deserialize(data)

    def serialize(self, data):
        if RAW:
            return b"".join(array.tobytes() for array in data.values())
        return super().serialize({name: array.tolist() for name, array in data.items()})

    def forward(self, data):
        return self._session.run_raw(data) if RAW else self._session.run(data)


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", os.environ["HTTP_PORT"], "--timeout", "20000"]
    server = Server()
    server.append_worker(Inference, num=1)
    server.run()
