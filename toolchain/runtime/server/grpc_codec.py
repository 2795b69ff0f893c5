"""Inference requests and responses of the gRPC protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from toolchain.runtime.server.api import Core, InferRequest, InferResponse, ServeError, Status
from toolchain.runtime.server.datatypes import check_shape, dtype_of, from_raw, invalid, to_raw
from toolchain.runtime.server.grpc_repeat import KnownAnswers, KnownRequests
from toolchain.runtime.server.proto import stubs
from toolchain.runtime.server.rest_answer import Encoder
from toolchain.runtime.server.rest_codec import Wish, apply_parameters, place_of
from toolchain.runtime.server.shared_memory import Place

if TYPE_CHECKING:
    from toolchain.runtime.server.shared_memory import SharedMemory

pb = stubs()
#: The field of ``InferTensorContents`` that holds a datatype; there is none for FP16 and BF16.
_FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Codec:
    """Between messages and the core's requests and responses."""

    def __init__(self, core: Core, memory: SharedMemory) -> None:
        self._memory = memory
        self._encoder = Encoder(core, memory)
        self._requests, self._answers = KnownRequests(), KnownAnswers()

    def read(self, data: bytes) -> tuple[InferRequest, dict[str, Wish]]:
        """As :meth:`decode`, of a message's bytes.

        Raises:
            ServeError: as :meth:`decode`, and INVALID for what is no message.
        """
        known = self._requests.request(data)
        if known is not None:
            return known
        message = parsed(pb.ModelInferRequest.FromString, data)
        request, wishes = self.decode(message)
        self._requests.meet(data, message, request, wishes)
        return request, wishes

    def write(self, response: InferResponse, wishes: Mapping[str, Wish]) -> bytes:
        """The bytes of what :meth:`encode` gives.

        Raises:
            ServeError: as :meth:`encode`.
        """
        known = self._answers.answer(response, wishes)
        if known is not None and known[1] is not None:
            return known[1]
        message = self.encode(response, wishes)
        if known is not None:
            self._answers.keep(known[0], message)
        return bytes(message.SerializeToString())

    def decode(self, message: Any) -> tuple[InferRequest, dict[str, Wish]]:
        """The request in a ``ModelInferRequest``, and how to return its outputs.

        Raises:
            ServeError: INVALID and, for shared memory, NOT_FOUND.
        """
        request = InferRequest(message.model_name, message.model_version, {}, id=message.id)
        if message.parameters:
            apply_parameters({**parameters_of(message.parameters, "the request")}, request)
        self._inputs(message, request)
        wishes: dict[str, Wish] = {}
        names = []
        for output in message.outputs:
            name = output.name
            if name in names:
                invalid(f"output {name!r} is asked for twice")
            names.append(name)
            if output.parameters:
                wishes[name] = self._wish(name, parameters_of(output.parameters, f"output {name!r}"))
        request.outputs = tuple(names)
        request.arrived = time.monotonic_ns()
        return request, wishes

    def _inputs(self, message: Any, request: InferRequest) -> None:
        entries, raw = message.inputs, message.raw_input_contents
        if not entries:
            invalid("the request has no inputs")
        used, inputs = 0, request.inputs
        for entry in entries:
            name, datatype = entry.name, entry.datatype
            if not name:
                invalid("an input needs a name")
            if name in inputs:
                invalid(f"input {name!r} is given twice")
            place = None
            if entry.parameters:
                place = place_of(parameters_of(entry.parameters, f"input {name!r}"), f"input {name!r}")
            typed = entry.HasField("contents")
            if typed and (place is not None or raw):
                invalid(f"input {name!r} has contents of its own besides raw contents or shared memory")
            if place is not None:
                dtype_of(name, datatype)
                array = from_raw(name, datatype, list(entry.shape), self._memory.read(place))
            elif typed or not raw:
                array = _typed(name, datatype, list(entry.shape), entry.contents)
            elif used >= len(raw):
                invalid(f"raw_input_contents has {len(raw)} entries, too few for input {name!r}")
            else:
                array = from_raw(name, datatype, list(entry.shape), raw[used])
                used += 1
            inputs[name] = array
            if datatype == "BF16":
                request.bf16 |= {name}
        if used != len(raw):
            invalid(f"raw_input_contents has {len(raw)} entries, the inputs take {used}")

    def _wish(self, name: str, parameters: Mapping[str, Any]) -> Wish:
        place = place_of(dict(parameters), f"output {name!r}")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            invalid(f"output {name!r}: 'classification' is a whole number of at least 0")
        if place is not None:
            self._memory.check(place)
        return Wish(True, place, classes)

    def encode(self, response: InferResponse, wishes: Mapping[str, Wish]) -> Any:
        """The ``ModelInferResponse`` of one response, all outputs as raw contents.

        Raises:
            ServeError: an output doesn't fit its place in shared memory.
        """
        message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
        for name, array in response.outputs.items():
            wish = wishes.get(name) if wishes else None
            if wish is not None and wish.classes:
                array = self._encoder.classified(response, name, array, wish.classes)
            output = message.outputs.add(
                name=name, datatype=self._encoder.datatype(response, name, array), shape=array.shape
            )
            raw = to_raw(array)
            if wish is not None and wish.place is not None:
                self._put(wish.place, output, raw)
            else:
                message.raw_output_contents.append(bytes(raw))
        return message

    def _put(self, place: Place, output: Any, raw: bytes | memoryview) -> None:
        self._memory.write(place, output.name, raw)
        output.parameters["shared_memory_region"].string_param = place.region
        output.parameters["shared_memory_offset"].int64_param = place.offset
        output.parameters["shared_memory_byte_size"].int64_param = len(raw)


def parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """The message in ``data``.

    Raises:
        ServeError: INVALID, there is none.
    """
    try:
        return parse(data)
    except DecodeError as error:
        raise ServeError(Status.INVALID, f"the request is no message of this method: {error}") from None


def parameters_of(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``InferParameter`` messages as values.

    Raises:
        ServeError: INVALID, one has no value.
    """
    values: dict[str, Any] = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            invalid(f"{where}: parameter {key!r} has no value")
        values[key] = getattr(parameter, kind)
    return values


def _typed(name: str, datatype: str, shape: Sequence[int], contents: Any) -> np.ndarray:
    """The tensor in typed contents."""
    dtype = dtype_of(name, datatype)
    field = _FIELDS.get(datatype)
    if field is None:
        invalid(f"input {name!r}: {datatype} has no typed contents; send raw_input_contents")
    count = check_shape(name, shape, dtype.itemsize)
    others = [descriptor.name for descriptor, _ in contents.ListFields() if descriptor.name != field]
    if others:
        invalid(f"input {name!r}: {datatype} belongs in {field}, not in {', '.join(others)}")
    values = getattr(contents, field)
    if len(values) != count:
        invalid(f"input {name!r}: shape {list(shape)} has {count} elements, {field} has {len(values)}")
    if datatype == "BYTES":
        elements = np.empty(count, np.object_)
        elements[:] = list(values)
        return elements.reshape(shape)
    try:
        return np.array(list(values), dtype).reshape(shape)
    except OverflowError:
        invalid(f"input {name!r}: a value lies outside the range of {datatype}")
