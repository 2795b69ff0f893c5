"""The gRPC front end over real sockets, with Triton's own clients and with messages that no client would send."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.helpers.serving import Running, serving
from toolchain.runtime.server.frontend import FrontendSettings, bearer_tokens
from toolchain.runtime.server.proto import stubs

pb = stubs()
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FrontendSettings(allow_admin=True, allow_shared_memory=True), grpc=True) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


def call(channel: grpc.Channel, method: str, request: Any, metadata: Any = None) -> Any:
    output = getattr(pb, SERVICE.methods_by_name[method].output_type.name)
    stub = channel.unary_unary(f"/{SERVICE.full_name}/{method}", type(request).SerializeToString, output.FromString)
    return stub(request, timeout=10, metadata=metadata)


def refusal(act: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refused:
        act()
    return refused.value.code().name, refused.value.details()


def tensor(datatype: str = "FP32", shape: tuple[int, ...] = (1, 4), name: str = "x", **contents: Any) -> Any:
    entry = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(entry.contents, field).extend(values)
    return entry


def request_of(*inputs: Any, raw: tuple[bytes, ...] = (), model: str = "echo") -> Any:
    return pb.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raw)


def test_all_rpcs_of_the_published_proto_are_there(channel: grpc.Channel) -> None:
    assert len(SERVICE.methods) == 20
    for method in SERVICE.methods:
        if method.name == "ModelStreamInfer":
            continue
        request = getattr(pb, method.input_type.name)()
        for field in ("name", "model_name"):
            if field in method.input_type.fields_by_name and "SharedMemory" not in method.name:
                setattr(request, field, "double")
        try:
            call(channel, method.name, request)
        except grpc.RpcError as error:
            expected = {"ModelInfer", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister"}
            code = error.code().name  # type: ignore[attr-defined]
            assert (method.name in expected, code in ("INVALID_ARGUMENT", "UNIMPLEMENTED")) == (True, True), method.name
    call(channel, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="double"))


def test_tritons_client_gets_right_answers(server: Running) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        x = np.arange(400_000, dtype=np.float32).reshape(-1, 4)
        given = triton.InferInput("x", x.shape, "FP32")
        given.set_data_from_numpy(x)
        for compression in (None, "gzip", "deflate"):
            result = client.infer("double", [given], request_id="7", compression_algorithm=compression)
            assert (result.as_numpy("y") == x * 2).all()
            assert result.get_response().id == "7"
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata().name == "toolchain"
        assert client.get_model_metadata("double").inputs[0].shape == [-1, 4]
        assert client.get_model_config("double").config.max_batch_size == 8
        assert client.get_inference_statistics("double").model_stats[0].inference_stats.success.count == 3
        assert {entry.name for entry in client.get_model_repository_index().models} >= {"double", "text"}
        assert client.update_log_settings({"log_verbose_level": 1}).settings["log_verbose_level"].uint32_param == 1
        assert client.update_log_settings({"log_verbose_level": 0}).settings["log_verbose_level"].uint32_param == 0
        assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
        client.unload_model("text")
        assert not client.is_model_ready("text")
        client.load_model("text")
        assert client.is_model_ready("text")
        with pytest.raises(InferenceServerException, match="unknown model 'nothing'"):
            client.get_model_config("nothing")


def test_tritons_client_streams_and_an_error_does_not_end_the_stream(server: Running) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        given = triton.InferInput("x", [1, 4], "FP32")
        for n in range(100):
            given.set_data_from_numpy(np.full((1, 4), n, np.float32))
            client.async_stream_infer("nothing" if n == 50 else "double", [given], request_id=str(n))
        got = [answers.get(timeout=10) for _ in range(100)]
        client.stop_stream()
    assert "unknown model" in str(got[50][1])
    for n in set(range(100)) - {50}:
        assert (got[n][0].get_response().id, got[n][0].as_numpy("y")[0, 0]) == (str(n), 2 * n)


def test_tritons_client_sends_text_and_uses_shared_memory(server: Running) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        words = np.array(["a", "", "häßlich"], np.object_)
        text = triton.InferInput("x", [3], "BYTES")
        text.set_data_from_numpy(words)
        assert [e.decode() for e in client.infer("text", [text]).as_numpy("y").tolist()] == words.tolist()
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        region = shm.create_shared_memory_region("r", "/toolchain_test_grpc", 64)
        try:
            shm.set_shared_memory_region(region, [x])
            client.register_system_shared_memory("r", "/toolchain_test_grpc", 64)
            assert client.get_system_shared_memory_status().regions["r"].byte_size == 64
            given = triton.InferInput("x", x.shape, "FP32")
            given.set_shared_memory("r", 32)
            output = triton.InferRequestedOutput("y")
            output.set_shared_memory("r", 32, offset=32)
            client.infer("double", [given], outputs=[output])
            assert (shm.get_contents_as_numpy(region, np.float32, [2, 4], 32) == x * 2).all()
            client.unregister_system_shared_memory("r")
            assert not client.get_system_shared_memory_status().regions
        finally:
            shm.destroy_shared_memory_region(region)


def test_a_classification_is_what_tritons_client_expects(server: Running) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.float32([[0, 3, 1, 2]]))
        result = client.infer("double", [given], outputs=[triton.InferRequestedOutput("y", class_count=2)])
        assert result.as_numpy("y").tolist() == [[b"6.000000:1:one", b"4.000000:3:three"]]


def test_tritons_asyncio_client_gets_right_answers(server: Running) -> None:
    async def many() -> None:
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            x = np.arange(400, dtype=np.float32).reshape(-1, 4)
            given = triton_aio.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x)
            for result in await asyncio.gather(*[client.infer("double", [given]) for _ in range(8)]):
                assert (result.as_numpy("y") == x * 2).all()

    asyncio.run(many())


@pytest.mark.parametrize(
    ("entry", "raw"),
    [
        (tensor("BOOL", (2,), bool_contents=[True, False]), b"\x01\x00"),
        (tensor("INT8", (2,), int_contents=[-128, 127]), b"\x80\x7f"),
        (tensor("INT16", (1,), int_contents=[-2]), b"\xfe\xff"),
        (tensor("INT64", (1,), int64_contents=[-1]), b"\xff" * 8),
        (tensor("UINT8", (1,), uint_contents=[255]), b"\xff"),
        (tensor("UINT64", (1,), uint64_contents=[2**64 - 1]), b"\xff" * 8),
        (tensor("FP64", (1,), fp64_contents=[1.0]), np.float64(1).tobytes()),
        (tensor("FP32", (1,), fp32_contents=[float("nan")]), np.float32("nan").tobytes()),
        (tensor("BYTES", (2,), bytes_contents=[b"ab", b""]), b"\x02\x00\x00\x00ab\x00\x00\x00\x00"),
        (tensor("FP32", (0, 4)), b""),
    ],
)
def test_typed_contents_are_understood(channel: grpc.Channel, entry: Any, raw: bytes) -> None:
    answer = call(channel, "ModelInfer", request_of(entry))
    assert list(answer.raw_output_contents) == [raw]
    assert (answer.outputs[0].datatype, answer.outputs[0].shape) == (entry.datatype, entry.shape)


def test_half_precision_and_bfloat16_go_through_raw_contents(channel: grpc.Channel) -> None:
    entries = (tensor("FP16", (2,), "a"), tensor("BF16", (1,), "b"))
    answer = call(channel, "ModelInfer", request_of(*entries, raw=(b"\x00\x3c\x00\x7c", b"\x80\x3f")))
    assert [output.datatype for output in answer.outputs] == ["FP16", "BF16"]
    assert list(answer.raw_output_contents) == [b"\x00\x3c\x00\x7c", b"\x80\x3f"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (request_of(), "no inputs"),
        (request_of(tensor(), raw=(b"0" * 16, b"0")), "has 2 entries, the inputs take 1"),
        (request_of(tensor(), tensor(name="z"), raw=(b"0" * 16,)), "too few"),
        (request_of(tensor(), raw=(b"0" * 15,)), "15 were given"),
        (request_of(tensor(fp32_contents=[1.0] * 4), raw=(b"0" * 16,)), "besides raw contents"),
        (request_of(tensor(fp32_contents=[1.0])), "has 4 elements, fp32_contents has 1"),
        (request_of(tensor(fp64_contents=[1.0] * 4)), "belongs in fp32_contents"),
        (request_of(tensor("FP16", (1,), fp32_contents=[1.0])), "no typed contents"),
        (request_of(tensor("INT8", (1,), int_contents=[128])), "range of INT8"),
        (request_of(tensor("FP99", (1,)), raw=(b"0",)), "unknown datatype"),
        (request_of(tensor(shape=(-1, 4)), raw=(b"",)), "at least 0"),
        (request_of(tensor(shape=(2**62, 2**62)), raw=(b"",)), "too large"),
        (request_of(tensor(shape=(1,) * 33), raw=(b"0000",)), "33 dimensions"),
        (request_of(tensor(), tensor(), raw=(b"0" * 16, b"0" * 16)), "given twice"),
    ],
)
def test_a_malformed_message_is_an_invalid_argument(channel: grpc.Channel, request_: Any, says: str) -> None:
    code, message = refusal(lambda: call(channel, "ModelInfer", request_))
    assert (code, says in message) == ("INVALID_ARGUMENT", True), message


def test_errors_have_the_status_code_of_their_kind(channel: grpc.Channel) -> None:
    entry = tensor(fp32_contents=[1.0] * 4)
    for model, code in (("nothing", "NOT_FOUND"), ("busy", "RESOURCE_EXHAUSTED"), ("broken", "INTERNAL")):
        assert refusal(lambda m=model: call(channel, "ModelInfer", request_of(entry, model=m)))[0] == code
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "ModelInfer", request_of(entry, model="busy"))
    assert ("retry-after", "2") in tuple(refused.value.trailing_metadata())


def test_a_client_that_goes_cancels_its_request(server: Running, channel: grpc.Channel) -> None:
    before = server.core.cancelled
    request = request_of(tensor(fp32_contents=[1.0] * 4), model="slow")
    stub = channel.unary_unary(
        f"/{SERVICE.full_name}/ModelInfer", type(request).SerializeToString, pb.ModelInferResponse.FromString
    )
    with pytest.raises(grpc.RpcError):
        stub(request, timeout=0.3)
    _until(lambda: server.core.cancelled > before)


def test_the_health_service_follows_the_models(server: Running, channel: grpc.Channel) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check
    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    def status(name: str) -> int:
        return int(check(health_pb2.HealthCheckRequest(service=name), timeout=5).status)

    for name in ("", SERVICE.full_name, "double"):
        assert status(name) == serving_
    call(channel, "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="double"))
    _until(lambda: status("double") == status("") == not_serving)
    call(channel, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="double"))
    _until(lambda: status("double") == status("") == serving_)


def test_tokens_permissions_and_size_limits_hold() -> None:
    limits = FrontendSettings(max_body=100_000, authorize=bearer_tokens(["secret"]))
    with serving(limits, grpc=True) as running, grpc.insecure_channel(running.grpc) as channel:
        token = (("authorization", "Bearer secret"),)
        request = request_of(tensor(fp32_contents=[1.0] * 4))
        assert refusal(lambda: call(channel, "ModelInfer", request))[0] == "UNAUTHENTICATED"
        assert call(channel, "ModelInfer", request, token).outputs[0].name == "x"
        assert call(channel, "ServerLive", pb.ServerLiveRequest()).live
        large = request_of(tensor(shape=(100_000,)), raw=(bytes(400_000),))
        assert refusal(lambda: call(channel, "ModelInfer", large, token))[0] == "RESOURCE_EXHAUSTED"
        unload = pb.RepositoryModelUnloadRequest(model_name="double")
        assert refusal(lambda: call(channel, "RepositoryModelUnload", unload, token))[0] == "PERMISSION_DENIED"
        forget = pb.SystemSharedMemoryUnregisterRequest()
        assert refusal(lambda: call(channel, "SystemSharedMemoryUnregister", forget, token))[0] == "PERMISSION_DENIED"
        stream = channel.stream_stream(
            f"/{SERVICE.full_name}/ModelStreamInfer",
            type(request).SerializeToString,
            pb.ModelStreamInferResponse.FromString,
        )
        assert refusal(lambda: list(stream(iter([request]), timeout=10)))[0] == "UNAUTHENTICATED"


def _until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
