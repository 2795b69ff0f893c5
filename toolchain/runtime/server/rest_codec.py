"""Inference requests and responses of the REST protocol: JSON, and the binary tensor extension.

Not-a-number and infinities: JSON has none, so a request that holds a bare ``NaN`` or ``Infinity`` is malformed (400).
An answer must be able to say what the model computed: NaN is ``null``, which Triton's clients read as NaN, and an
infinity is ``Infinity`` or ``-Infinity``, as Triton writes it and its clients and Python's ``json`` read it.  Clients
whose JSON parser knows neither ask for binary outputs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from toolchain.runtime.server.api import Core, InferRequest, ServeError, Status
from toolchain.runtime.server.datatypes import check_shape, dtype_of, from_raw, from_values, invalid
from toolchain.runtime.server.rest_repeat import LONGEST, Descriptions
from toolchain.runtime.server.shared_memory import Place

if TYPE_CHECKING:
    import numpy as np

    from toolchain.runtime.server.shared_memory import SharedMemory

_RESERVED = frozenset({"priority", "timeout", "binary_data_output"})


class Wish(NamedTuple):
    """How one output is to be returned."""

    binary: bool = False
    place: Place | None = None
    classes: int = 0


class Plan(NamedTuple):
    """How the outputs of one request are to be returned: those in ``wishes`` so, all others as ``default`` says."""

    default: Wish
    wishes: dict[str, Wish]


#: What a request gets that says nothing of its outputs.
AS_JSON = Plan(Wish(), {})
_AS_BINARY = Plan(Wish(binary=True), {})


class Decoder:
    """Turns the bodies of inference requests into requests to the core."""

    def __init__(self, core: Core, memory: SharedMemory) -> None:
        self._core = core
        self._memory = memory
        self._descriptions = Descriptions()

    def decode(
        self, body: bytes | bytearray | memoryview, header_length: int | None, model: str, version: str
    ) -> tuple[InferRequest, Plan]:
        """The request in ``body``, and how to answer it.

        Args:
            body: the whole body, decompressed.  Binary tensors become views of it.
            header_length: of the JSON in front of binary tensors (``Inference-Header-Content-Length``); None without.
            model: name of the model, from the path.
            version: of the model, from the path; "" for none.

        Raises:
            ServeError: INVALID and, for shared memory, NOT_FOUND.
        """
        tail: memoryview | None = None
        if header_length is None:
            head = body
        elif header_length == 0 and len(body):
            return self._raw(memoryview(body), model, version)
        elif header_length > len(body):
            invalid(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
        else:
            view = memoryview(body)
            head, tail = view[:header_length], view[header_length:]
            if header_length <= LONGEST:
                head = bytes(head)
                known = self._descriptions.request(head, tail, model, version)
                if known is not None:
                    return known
        document = parse_object(head)
        request = InferRequest(model, version, {})
        self._inputs(document, tail, request)
        plan = AS_JSON
        parameters = document.get("parameters")
        if parameters is not None:
            plan = _request_parameters(parameters, request)
        outputs = document.get("outputs")
        if outputs:
            plan = self._outputs(outputs, plan, request)
        identity = document.get("id")
        if identity is not None:
            if type(identity) is not str:
                invalid("'id' is a string")
            request.id = identity
        request.arrived = time.monotonic_ns()
        if tail is not None and type(head) is bytes:
            self._descriptions.meet(head, tail, document, request, plan)
        return request, plan

    def _inputs(self, document: dict[str, Any], tail: memoryview | None, request: InferRequest) -> None:
        entries = document.get("inputs")
        if type(entries) is not list or not entries:
            invalid("'inputs' is an array of at least one tensor")
        at, inputs = 0, request.inputs
        for entry in entries:
            if type(entry) is not dict:
                invalid("an input is an object with name, datatype, shape and data")
            name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
            if type(name) is not str or not name:
                invalid("an input needs a 'name', a string")
            if type(datatype) is not str:
                invalid(f"input {name!r} needs a 'datatype', a string")
            if type(shape) is not list:
                invalid(f"input {name!r} needs a 'shape', an array of whole numbers")
            if name in inputs:
                invalid(f"input {name!r} is given twice")
            parameters = entry.get("parameters")
            if parameters is None:
                array = from_values(name, datatype, shape, _given(entry, name))
            else:
                array, at = self._placed(entry, parameters, tail, at)
            inputs[name] = array
            if datatype == "BF16":
                request.bf16 |= {name}
        if tail is not None and at != len(tail):
            invalid(f"{len(tail) - at} bytes follow the binary tensors that the inputs announce")

    def _placed(
        self, entry: dict[str, Any], parameters: object, tail: memoryview | None, at: int
    ) -> tuple[np.ndarray, int]:
        """An input with parameters, and where the next binary tensor begins."""
        name, datatype, shape = entry["name"], entry["datatype"], entry["shape"]
        checked = _parameters(parameters, f"input {name!r}")
        size = checked.get("binary_data_size")
        place = place_of(checked, f"input {name!r}")
        if size is None and place is None:
            return from_values(name, datatype, shape, _given(entry, name)), at
        if entry.get("data") is not None or (size is not None and place is not None):
            invalid(f"input {name!r}: give one of 'data', 'binary_data_size' and 'shared_memory_region'")
        if place is not None:
            dtype_of(name, datatype)
            return from_raw(name, datatype, shape, self._memory.read(place)), at
        if type(size) is not int or size < 0:
            invalid(f"input {name!r}: 'binary_data_size' is a whole number of at least 0")
        if tail is None:
            invalid(f"input {name!r} is binary: the header Inference-Header-Content-Length is needed")
        if size > len(tail) - at:
            invalid(f"input {name!r}: 'binary_data_size' is {size}, {len(tail) - at} bytes are left in the body")
        return from_raw(name, datatype, shape, tail[at : at + size]), at + size

    def _outputs(self, entries: object, plan: Plan, request: InferRequest) -> Plan:
        if type(entries) is not list:
            invalid("'outputs' is an array of objects with a name")
        wishes: dict[str, Wish] = {}
        for entry in entries:
            name = entry.get("name") if type(entry) is dict else None
            if type(name) is not str or not name:
                invalid("an output is an object with a 'name', a string")
            if name in wishes:
                invalid(f"output {name!r} is asked for twice")
            parameters = entry.get("parameters")
            wishes[name] = plan.default if parameters is None else self._wish(name, parameters, plan.default)
        request.outputs = tuple(wishes)
        return Plan(plan.default, wishes)

    def _wish(self, name: str, parameters: object, default: Wish) -> Wish:
        where = f"output {name!r}"
        checked = _parameters(parameters, where)
        binary, classes = checked.get("binary_data", default.binary), checked.get("classification", 0)
        if type(binary) is not bool:
            invalid(f"{where}: 'binary_data' is true or false")
        if type(classes) is not int or classes < 0:
            invalid(f"{where}: 'classification' is a whole number of at least 0")
        place = place_of(checked, where)
        if place is not None:
            self._memory.check(place)
        return Wish(binary, place, classes)

    def _raw(self, body: memoryview, model: str, version: str) -> tuple[InferRequest, Plan]:
        """A body that is the only input's bytes, all else being known from the model."""
        inputs = self._core.metadata(model, version).inputs
        if len(inputs) != 1:
            invalid(f"a body without JSON suits models with one input, model {model!r} has {len(inputs)}")
        spec = inputs[0]
        shape = list(spec.shape)
        if shape and shape[0] == -1 and self._core.config(model, version).get("max_batch_size", 0):
            shape[0] = 1
        if spec.datatype == "BYTES":
            shape, body = [1], memoryview(len(body).to_bytes(4, "little") + bytes(body))
        elif shape.count(-1) == 1:
            known = check_shape(spec.name, [size for size in shape if size != -1], 1)
            shape[shape.index(-1)] = len(body) // (dtype_of(spec.name, spec.datatype).itemsize * (known or 1))
        elif -1 in shape:
            invalid(f"a body without JSON can't say the sizes of input {spec.name!r} of model {model!r}")
        bf16 = frozenset({spec.name} if spec.datatype == "BF16" else ())
        array = from_raw(spec.name, spec.datatype, shape, body)
        return InferRequest(model, version, {spec.name: array}, bf16=bf16, arrived=time.monotonic_ns()), _AS_BINARY


def parse_object(text: bytes | bytearray | memoryview) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ServeError: INVALID.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        reason = str(error)
        raise ServeError(Status.INVALID, f"the request is no valid JSON: {reason}") from None
    if type(document) is not dict:
        invalid("the request is no JSON object")
    return document


def place_of(parameters: dict[str, Any], where: str) -> Place | None:
    """The place in shared memory that parameters name.

    Raises:
        ServeError: INVALID.
    """
    region, size = parameters.get("shared_memory_region"), parameters.get("shared_memory_byte_size")
    if region is None and size is None:
        return None
    offset = parameters.get("shared_memory_offset", 0)
    if type(region) is not str or type(size) is not int or type(offset) is not int or size < 0 or offset < 0:
        invalid(
            f"{where}: shared memory takes 'shared_memory_region', a string, 'shared_memory_byte_size' and, "
            "where it isn't 0, 'shared_memory_offset', whole numbers of at least 0"
        )
    return Place(region, offset, size)


def apply_parameters(parameters: dict[str, Any], request: InferRequest) -> bool:
    """Put a request's parameters into it; whether binary outputs are the default.

    Raises:
        ServeError: INVALID.
    """
    for key in ("priority", "timeout"):
        value = parameters.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            value = int(value)  # Triton's clients may send 64-bit numbers as strings
        if type(value) is not int or not 0 <= value < 2**63:
            invalid(f"parameter {key!r} is a whole number of at least 0")
        if key == "priority":
            request.priority = value
        else:
            request.timeout_us = value
    others = {key: value for key, value in parameters.items() if key not in _RESERVED}
    if others:
        request.parameters = others
    binary = parameters.get("binary_data_output", False)
    if type(binary) is not bool:
        invalid("parameter 'binary_data_output' is true or false")
    return binary


def _request_parameters(parameters: object, request: InferRequest) -> Plan:
    return _AS_BINARY if apply_parameters(_parameters(parameters, "the request"), request) else AS_JSON


def _parameters(parameters: object, where: str) -> dict[str, Any]:
    if type(parameters) is not dict:
        invalid(f"{where}: 'parameters' is an object")
    for key, value in parameters.items():
        if type(value) not in (int, bool, str, float):
            invalid(f"{where}: parameter {key!r} is a string, a number, true or false")
    return parameters


def _given(entry: dict[str, Any], name: str) -> object:
    if "data" not in entry:
        invalid(f"input {name!r} needs 'data', or parameters that say where it is")
    return entry["data"]
