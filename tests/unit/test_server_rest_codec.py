"""Inference requests and responses of the REST protocol."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.helpers.serving import SmallCore
from toolchain.runtime.server.api import InferResponse, ServeError, Status
from toolchain.runtime.server.compression import accepted, compress, decompress
from toolchain.runtime.server.datatypes import DTYPES, NAMES
from toolchain.runtime.server.rest_answer import Encoder
from toolchain.runtime.server.rest_codec import AS_JSON, Decoder, Plan, Wish
from toolchain.runtime.server.shared_memory import SharedMemory

CORE = SmallCore()
MEMORY = SharedMemory(allowed=True)
DECODER, ENCODER = Decoder(CORE, MEMORY), Encoder(CORE, MEMORY)
X: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
BINARY: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [4], "parameters": {"binary_data_size": 16}}


def decode(document: Any, tail: bytes = b"", *, header: bool = False) -> Any:
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    return DECODER.decode(head + tail, len(head) if tail or header else None, "double", "")


def answer(plan: Plan, **outputs: np.ndarray) -> tuple[dict[str, Any], bytes]:
    parts, length = ENCODER.encode(InferResponse("double", "1", "", outputs), plan)
    body = b"".join(parts)
    return json.loads(body[:length]), body[length:] if length else b""


@given(st.sampled_from(sorted(set(DTYPES) - {"BYTES", "BF16"})), st.data())
def test_a_binary_tensor_comes_back_as_it_went(datatype: str, data: st.DataObject) -> None:
    array = data.draw(npst.arrays(DTYPES[datatype], npst.array_shapes(max_dims=3, min_side=0)))
    entry = {"name": "x", "datatype": datatype, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
    request, plan = decode(
        {"inputs": [entry], "parameters": {"binary_data_output": True}}, array.tobytes(), header=True
    )
    document, tail = answer(plan, x=request.inputs["x"])
    [output] = document["outputs"]
    assert (output["datatype"], tuple(output["shape"])) == (NAMES[array.dtype], array.shape)
    assert output["parameters"] == {"binary_data_size": array.nbytes}
    assert tail == array.tobytes()


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
def test_any_bytes_are_refused_clearly(body: bytes, header: int | None) -> None:
    with pytest.raises(ServeError) as refused:
        DECODER.decode(body, header, "echo", "")
    assert refused.value.status is Status.INVALID


@given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 60))
def test_a_lying_binary_size_never_reads_past_the_body(tail: bytes, size: int, count: int) -> None:
    entry = {"name": "x", "datatype": "UINT8", "shape": [count], "parameters": {"binary_data_size": size}}
    if not size == count == len(tail):
        with pytest.raises(ServeError) as refused:
            decode({"inputs": [entry]}, tail, header=True)
        assert refused.value.status is Status.INVALID
    else:
        request, _ = decode({"inputs": [entry]}, tail, header=True)
        assert request.inputs["x"].tobytes() == tail


def test_binary_tensors_are_views_of_the_body() -> None:
    head = json.dumps({"inputs": [BINARY]}).encode()
    head += b" " * (-len(head) % 16)
    memory = np.zeros(len(head) + 32, np.uint8)
    start = -memory.ctypes.data % 16
    body = memory[start : start + len(head) + 16]
    body[: len(head)] = np.frombuffer(head, np.uint8)
    request, _ = DECODER.decode(body.data, len(head), "double", "")
    assert np.shares_memory(request.inputs["x"], body)


MALFORMED: list[tuple[Any, str]] = [
    (b"{", "valid JSON"),
    (b'{"inputs": [NaN]}', "valid JSON"),
    (b'{"inputs": [Infinity]}', "valid JSON"),
    (b"\xff", "valid JSON"),
    (b"[" * 100_000, "valid JSON"),
    (b"[]", "no JSON object"),
    ({}, "'inputs'"),
    ({"inputs": []}, "'inputs'"),
    ({"inputs": {}}, "'inputs'"),
    ({"inputs": [1]}, "an input is an object"),
    ({"inputs": [{**X, "name": 1}]}, "'name'"),
    ({"inputs": [{**X, "datatype": None}]}, "'datatype'"),
    ({"inputs": [{**X, "datatype": "FP31"}]}, "unknown datatype"),
    ({"inputs": [{**X, "shape": 4}]}, "'shape'"),
    ({"inputs": [{**X, "shape": [2**40, 2**40]}]}, "too large"),
    ({"inputs": [{**X, "shape": [-1, 4]}]}, "at least 0"),
    ({"inputs": [X, X]}, "given twice"),
    ({"inputs": [{k: v for k, v in X.items() if k != "data"}]}, "needs 'data'"),
    ({"inputs": [{**X, "parameters": []}]}, "'parameters' is an object"),
    ({"inputs": [{**X, "parameters": {"a": [1]}}]}, "parameter 'a'"),
    ({"inputs": [{**X, "parameters": {"binary_data_size": 16}}]}, "give one of"),
    ({"inputs": [BINARY]}, "Inference-Header-Content-Length is needed"),
    ({"inputs": [X], "outputs": [{}]}, "'name'"),
    ({"inputs": [X], "outputs": [{"name": "y"}, {"name": "y"}]}, "asked for twice"),
    ({"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "true or false"),
    ({"inputs": [X], "outputs": [{"name": "y", "parameters": {"classification": -1}}]}, "'classification'"),
    ({"inputs": [X], "parameters": {"priority": -1}}, "'priority'"),
    ({"inputs": [X], "parameters": {"timeout": 1.5}}, "'timeout'"),
    ({"inputs": [X], "id": 5}, "'id'"),
    ({"inputs": [{**BINARY, "parameters": {"shared_memory_region": "r"}}]}, "shared_memory_byte_size"),
]


@pytest.mark.parametrize(("document", "says"), MALFORMED)
def test_a_malformed_request_is_refused_with_what_is_wrong(document: Any, says: str) -> None:
    with pytest.raises(ServeError, match=says) as refused:
        decode(document)
    assert refused.value.status is Status.INVALID


@pytest.mark.parametrize(
    ("size", "tail", "says"),
    [
        (17, b"0" * 16, "16 bytes are left"),
        (-1, b"0" * 16, "'binary_data_size'"),
        (8, b"0" * 8, "has 16 bytes, 8 were given"),
        (16, b"0" * 20, "4 bytes follow the binary tensors"),
        (2**70, b"0" * 16, "'binary_data_size'"),
    ],
)
def test_a_wrong_binary_size_is_refused(size: int, tail: bytes, says: str) -> None:
    with pytest.raises(ServeError, match=says):
        decode({"inputs": [{**BINARY, "parameters": {"binary_data_size": size}}]}, tail)


def test_parameters_reach_the_core() -> None:
    parameters = {"priority": 2, "timeout": "500", "sequence_id": 7, "custom": "a"}
    request, plan = decode({"inputs": [X], "id": "i", "parameters": parameters, "outputs": [{"name": "y"}]})
    assert (request.priority, request.timeout_us, request.id, request.outputs) == (2, 500, "i", ("y",))
    assert request.parameters == {"sequence_id": 7, "custom": "a"}
    assert plan.wishes == {"y": Wish()}
    assert request.arrived > 0


def test_an_output_may_overrule_binary_for_all() -> None:
    outputs = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    _, plan = decode({"inputs": [X], "parameters": {"binary_data_output": True}, "outputs": outputs})
    document, tail = answer(plan, a=np.float32([1]), b=np.float32([2]))
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 4}
    assert document["outputs"][1]["data"] == [2.0]
    assert tail == struct.pack("<f", 1)


def test_a_body_without_json_is_the_only_input() -> None:
    request, plan = DECODER.decode(np.arange(4, dtype=np.float32).tobytes(), 0, "double", "")
    assert request.inputs["x"].shape == (1, 4)
    assert plan.default.binary
    request, _ = DECODER.decode(b"abc", 0, "text", "")
    assert request.inputs["x"].tolist() == [b"abc"]
    with pytest.raises(ServeError, match="16 bytes, 3 were given"):
        DECODER.decode(b"abc", 0, "double", "")


def test_nan_is_null_and_infinities_are_what_triton_writes() -> None:
    parts, _ = ENCODER.encode(InferResponse("double", "1", "", {"y": np.float32([0.1, np.nan])}), Plan(Wish(), {}))
    assert orjson.loads(parts[0])["outputs"][0]["data"] == [0.1, None]
    document, _ = answer(Plan(Wish(), {}), y=np.float32([0.1, np.inf, -np.inf, np.nan]))
    assert document["outputs"][0]["data"] == [0.1, float("inf"), float("-inf"), None]


@given(st.data())
def test_an_answer_is_the_same_whether_its_like_was_written_before_or_not(data: st.DataObject) -> None:
    wish = st.builds(Wish, st.booleans(), st.none(), st.sampled_from([0, 0, 0, 1]))
    plan = data.draw(st.sampled_from([AS_JSON, Plan(Wish(binary=True), {}), Plan(Wish(), {"y": data.draw(wish)})]))
    kinds = st.sampled_from([DTYPES[name] for name in sorted(DTYPES) if name not in ("BYTES", "BF16")])
    arrays = {
        name: data.draw(npst.arrays(data.draw(kinds), npst.array_shapes(max_dims=2, min_side=1)))
        for name in data.draw(st.sampled_from([("y",), ("y", "z"), ('"', "y")]))
    }
    identity = data.draw(st.sampled_from(["", "", "one", "\u2028"]))
    response = InferResponse("double", "1", identity, arrays)
    parts, length = ENCODER.written(response, plan)
    for _ in range(2):
        again, again_length = ENCODER.encode(response, plan)
        assert (b"".join(again), again_length) == (b"".join(parts), length)


def test_bfloat16_outputs_are_told_by_the_models_metadata() -> None:
    response = InferResponse("echo", "1", "", {"b": np.array([0x3F80], np.uint16)})
    [part], _ = ENCODER.encode(response, Plan(Wish(), {}))
    assert json.loads(part)["outputs"] == [{"name": "b", "datatype": "BF16", "shape": [1], "data": [1.0]}]


def test_bytes_that_are_no_text_can_only_be_had_binary() -> None:
    array = np.array([b"\xff"], np.object_)
    with pytest.raises(ServeError, match="binary_data"):
        answer(Plan(Wish(), {}), y=array)
    assert answer(Plan(Wish(binary=True), {}), y=array)[1] == b"\x01\x00\x00\x00\xff"


def test_a_classification_has_values_positions_and_labels() -> None:
    plan = Plan(Wish(), {"y": Wish(classes=2)})
    document, _ = answer(plan, y=np.float32([[0, 3, 1, 2], [9, 0, 0, 0]]))
    [output] = document["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["3.000000:1:one", "2.000000:3:three", "9.000000:0:zero", "0.000000:1:one"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bodies_survive_compression(coding: str) -> None:
    packed = compress([b"abc" * 1000, memoryview(b"def")], coding)
    assert decompress(packed, coding, 4000) == b"abc" * 1000 + b"def"
    with pytest.raises(ServeError, match=r"too early|damaged"):
        decompress(packed[:-6], coding, 4000)
    with pytest.raises(ServeError, match="damaged"):
        decompress(b"\x78nonsense", coding, 4000)
    with pytest.raises(ServeError) as refused:
        decompress(packed, coding, 3002)
    assert refused.value.status is Status.TOO_LARGE


def test_the_coding_that_a_client_likes_best_is_chosen() -> None:
    assert accepted(b"gzip, deflate, br") == "gzip"
    assert accepted(b"gzip;q=0.2, deflate;q=0.5") == "deflate"
    assert accepted(b"gzip;q=0, identity") == ""
    assert accepted(b"*") == "gzip"
    assert accepted(b"br") == ""
