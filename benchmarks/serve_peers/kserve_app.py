"""The peer of KServe's Python SDK."""

import os

from kserve import InferOutput, InferResponse, Model, ModelServer
from session import Session


class Inference(Model):
    """One engine."""

    def __init__(self) -> None:
        super().__init__("model")
        self._session = Session()
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        arrays = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        binary = getattr(payload, "from_grpc", False) or "inference-header-content-length" in (headers or {})
        outputs = []
        for name, array in self._session.run(arrays).items():
            outputs.append(InferOutput(name, list(array.shape), "FP32"))
            outputs[-1].set_data_from_numpy(array, binary_data=binary)
        return InferResponse(payload.id or "", self.name, outputs)


if __name__ == "__main__":
    ports = {"http_port": int(os.environ["HTTP_PORT"]), "grpc_port": int(os.environ["GRPC_PORT"])}
    ModelServer(**ports, workers=1, enable_latency_logging=False).start([Inference()])
