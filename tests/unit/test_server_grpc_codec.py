"""Messages of gRPC: what is known of earlier ones gives what parsing and writing them in full gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.helpers.serving import SmallCore
from toolchain.runtime.server.api import InferResponse, ServeError
from toolchain.runtime.server.datatypes import DTYPES, NAMES, to_raw
from toolchain.runtime.server.grpc_codec import Codec, parsed
from toolchain.runtime.server.proto import stubs
from toolchain.runtime.server.rest_codec import Wish
from toolchain.runtime.server.shared_memory import SharedMemory

pb = stubs()
CODEC = Codec(SmallCore(), SharedMemory(allowed=True))
KINDS = st.sampled_from([DTYPES[name] for name in sorted(DTYPES) if name not in ("BYTES", "BF16")])


def outcome(read: Any, data: bytes) -> Any:
    """What a reader makes of a message, in a form that can be compared."""
    try:
        request, wishes = read(data)
    except ServeError as error:
        return error.status, error.message
    inputs = [(name, array.dtype, array.shape, array.tobytes()) for name, array in request.inputs.items()]
    rest = (request.model, request.version, request.outputs, request.id, request.priority, request.timeout_us)
    return inputs, rest, request.bf16, dict(request.parameters), wishes


def in_full(data: bytes) -> Any:
    return CODEC.decode(parsed(pb.ModelInferRequest.FromString, data))


@st.composite
def messages(draw: st.DrawFn) -> Any:
    message = pb.ModelInferRequest(model_name="double", model_version=draw(st.sampled_from(["", "1"])))
    message.id = draw(st.sampled_from(["", "seven", ":" * 70]))
    if draw(st.booleans()):
        message.parameters["priority"].int64_param = draw(st.integers(0, 2))
    for name in draw(st.sampled_from([("x",), ("x", "y"), ("x", "x")])):
        array = draw(npst.arrays(draw(KINDS), npst.array_shapes(max_dims=2, max_side=70, min_side=0)))
        lie = draw(st.sampled_from([0, 0, 0, 0, 1]))
        message.inputs.add(name=name, datatype=NAMES[array.dtype], shape=[size + lie for size in array.shape])
        message.raw_input_contents.append(array.tobytes())
    if draw(st.booleans()):
        message.outputs.add(name="y")
    if draw(st.sampled_from([0, 0, 0, 1])):
        message.raw_input_contents.append(b"surplus")
    return message


@settings(max_examples=150, deadline=None)
@given(messages(), st.sampled_from([b"", b"", b"\x1a\x02ab", b"\x3a\x00", b"\xff", b"\x32\x03\x0a\x01z"]), st.data())
def test_a_message_like_an_earlier_one_is_read_the_same(message: Any, more: bytes, data: st.DataObject) -> None:
    text = message.SerializeToString() + more
    expected = outcome(in_full, text)
    assert [outcome(CODEC.read, text) for _ in range(3)] == [expected] * 3
    changed = bytearray(text)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    other = bytes(changed)
    assert [outcome(CODEC.read, other) for _ in range(2)] == [outcome(in_full, other)] * 2


def test_values_are_those_of_the_message_that_came() -> None:
    for value in range(5):
        x = np.full((1, 40), value, np.float32)
        message = pb.ModelInferRequest(model_name="double", raw_input_contents=[x.tobytes()])
        message.inputs.add(name="x", datatype="FP32", shape=x.shape)
        text = message.SerializeToString()
        request, _ = CODEC.read(text)
        assert (request.inputs["x"] == value).all()
    assert CODEC._requests.request(text) is not None, "by now its like is known"


def test_the_same_bytes_cut_into_other_contents_are_refused() -> None:
    def text(*sizes: int) -> bytes:
        message = pb.ModelInferRequest(model_name="cut", raw_input_contents=[bytes(size) for size in sizes])
        for name in ("x", "y"):
            message.inputs.add(name=name, datatype="FP32", shape=(1, 4))
        return bytes(message.SerializeToString())

    for _ in range(3):
        CODEC.read(text(16, 16))
    assert CODEC._requests.request(text(16, 16)) is not None
    for sizes in ((12, 20), (16, 12), (16, 16, 0), (32,)):
        with pytest.raises(ServeError):
            CODEC.read(text(*sizes))


def test_contents_that_only_look_like_the_last_fields_are_not_remembered() -> None:
    x = np.zeros((1, 4), np.float32).tobytes()
    message = pb.ModelInferRequest(model_name="double", raw_input_contents=[x])
    message.inputs.add(name="x", datatype="FP32", shape=(1, 4))
    field = b"\x3a\x10" + x
    text = message.SerializeToString() + b"\x1a" + bytes([len(field)]) + field  # an id that holds the same bytes
    expected = outcome(in_full, text)
    assert [outcome(CODEC.read, text) for _ in range(4)] == [expected] * 4
    assert CODEC._requests.request(text) is None


@pytest.mark.parametrize("wishes", [{}, {"y": Wish(True, None, 1)}])
@settings(deadline=None)
@given(identity=st.sampled_from(["", "", "one"]), data=st.data())
def test_an_answer_like_an_earlier_one_is_written_the_same(wishes: Any, identity: str, data: st.DataObject) -> None:
    shapes = npst.array_shapes(max_dims=2, min_side=1, max_side=200)
    arrays = {name: data.draw(npst.arrays(data.draw(KINDS), shapes, fill=st.just(0))) for name in ("y", "z")}
    response = InferResponse("double", "1", identity, arrays)
    expected = CODEC.encode(response, wishes).SerializeToString()
    assert [CODEC.write(response, wishes) for _ in range(3)] == [expected] * 3
    if not wishes:
        raw = pb.ModelInferResponse.FromString(expected).raw_output_contents
        assert list(raw) == [bytes(to_raw(array)) for array in arrays.values()]
