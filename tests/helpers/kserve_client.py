"""Asks a server of the model ``obedient`` with KServe's own clients; runs in an environment that has them.

    python kserve_client.py HTTP_HOST:PORT GRPC_HOST:PORT

Prints one JSON line: what each question was answered.
"""

import asyncio
import json
import sys

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferOutput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput

MODEL = "obedient"


def question(model: str = MODEL, *, binary: bool, rows: int = 2, wanted: bool = False) -> InferRequest:
    arrays = {
        "x": np.arange(rows * 4, dtype=np.float32).reshape(rows, 4),
        "index": np.arange(rows, dtype=np.int64),
        "work": np.zeros(rows, np.int64),
    }
    inputs = []
    for name, array in arrays.items():
        tensor = InferInput(name, list(array.shape), "FP32" if name == "x" else "INT64")
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    outputs = [RequestedOutput("y", {"binary_data": binary})] if wanted else None
    return InferRequest(model, inputs, request_id="7", request_outputs=outputs)


def told(answer: object) -> dict[str, object]:
    [output] = answer.outputs
    assert isinstance(output, InferOutput)
    array = output.as_numpy()
    return {
        "model": answer.model_name,
        "version": answer.model_version,
        "id": answer.id,
        "name": output.name,
        "dtype": array.dtype.name,
        "values": array.tolist(),
    }


async def over_http(address: str) -> dict[str, object]:
    base = f"http://{address}"
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found = {
            "live": await client.is_server_live(base),
            "ready": await client.is_server_ready(base),
            "model": await client.is_model_ready(base, MODEL),
            "json": told(await client.infer(base, question(binary=False), model_name=MODEL)),
            "binary": told(await client.infer(base, question(binary=True, wanted=True), model_name=MODEL)),
        }
        try:
            await client.infer(base, question("nobody", binary=False), model_name="nobody")
        except httpx.HTTPStatusError as error:
            found["unknown"] = error.response.status_code
        return found


async def over_grpc(address: str) -> dict[str, object]:
    async with InferenceGRPCClient(address) as client:
        found = {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model": await client.is_model_ready(MODEL),
            "raw": told(await client.infer(question(binary=True))),
            "contents": told(await client.infer(question(binary=False))),
        }
        try:
            await client.infer(question("nobody", binary=True))
        except grpc.RpcError as error:
            found["unknown"] = error.code().name
        return found


async def main(http: str, rpc: str) -> None:
    print(json.dumps({"http": await over_http(http), "grpc": await over_grpc(rpc)}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
