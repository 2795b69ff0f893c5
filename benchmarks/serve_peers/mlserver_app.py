"""The MLServer peer: a runtime of its SDK."""

import asyncio
import os

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from session import Session


class Runtime(MLModel):
    """One engine."""

    async def load(self) -> bool:
        self._session = Session()
        return True

    async def predict(self, payload):
        arrays = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        outputs = [NumpyCodec.encode_output(name, array) for name, array in self._session.run(arrays).items()]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main() -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=int(os.environ["HTTP_PORT"]),
        grpc_port=int(os.environ["GRPC_PORT"]),
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
        use_structured_logging=False,
    )
    server = MLServer(settings)
    await server.start([ModelSettings(name="model", implementation=Runtime)])


if __name__ == "__main__":
    asyncio.run(main())
