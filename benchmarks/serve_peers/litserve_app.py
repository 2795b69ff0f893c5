"""The LitServe peer."""

import os

import litserve
from session import Session


class Api(litserve.LitAPI):
    """One engine."""

    def setup(self, device) -> None:
        self._session = Session()

    def decode_request(self, request):
        return request

    def predict(self, x):
        return self._session.run(x)

    def encode_response(self, output):
        return {name: array.tolist() for name, array in output.items()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["HTTP_PORT"]), generate_client_file=False, log_level="warning")
