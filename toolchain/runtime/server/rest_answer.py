"""Inference responses of the REST protocol as bytes; see :mod:`rest_codec` for what becomes of NaN and infinities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from toolchain.runtime.server.api import Core, InferResponse, ServeError, Status
from toolchain.runtime.server.classification import classify
from toolchain.runtime.server.datatypes import NAMES, bf16_floats, invalid, to_raw
from toolchain.runtime.server.rest_codec import AS_JSON, Plan, Wish
from toolchain.runtime.server.rest_repeat import Frames

if TYPE_CHECKING:
    from toolchain.runtime.server.shared_memory import SharedMemory

_UINT16 = np.dtype(np.uint16)
_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class Answer(NamedTuple):
    """A body in parts, and the length of its JSON where binary tensors follow."""

    parts: list[bytes | memoryview]
    json_length: int | None


class Encoder:
    """Turns the core's responses into bodies."""

    def __init__(self, core: Core, memory: SharedMemory) -> None:
        self._core = core
        self._memory = memory
        self._frames = Frames()

    def encode(self, response: InferResponse, plan: Plan) -> Answer:
        """The body of one response.

        Raises:
            ServeError: an output doesn't fit its place in shared memory, or bytes that are no text are wanted as JSON.
        """
        known = self._frames.json(response) if plan is AS_JSON else self._frames.binary(response, plan)
        return Answer(*known) if known is not None else self.written(response, plan)

    def written(self, response: InferResponse, plan: Plan) -> Answer:
        """The body of one response, written in full; what :meth:`encode` gives is the same, byte for byte.

        Raises:
            ServeError: see :meth:`encode`.
        """
        default, wishes = plan
        outputs: list[dict[str, Any]] = []
        tails: list[bytes | memoryview] = []
        for name, array in response.outputs.items():
            wish = wishes.get(name, default) if wishes else default
            if wish.classes:
                array = self.classified(response, name, array, wish.classes)
            datatype = self.datatype(response, name, array)
            entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
            if wish.place is None and not wish.binary:
                entry["data"] = _values(name, datatype, array)
            else:
                entry["parameters"] = self._send(name, wish, to_raw(array), tails)
            outputs.append(entry)
        document = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
        if response.id:
            document["id"] = response.id
        head = orjson.dumps(document, option=_NUMPY)
        if b"null" in head and not all(_finite(entry.get("data")) for entry in outputs):
            head = _with_infinities(document)  # null is what orjson writes for them
        return Answer([head, *tails], len(head) if tails else None)

    def _send(self, name: str, wish: Wish, raw: bytes | memoryview, tails: list[bytes | memoryview]) -> dict[str, Any]:
        """Put an output into shared memory or behind the JSON, and say so."""
        place = wish.place
        if place is None:
            tails.append(raw)
            return {"binary_data_size": len(raw)}
        self._memory.write(place, name, raw)
        return {
            "shared_memory_region": place.region,
            "shared_memory_offset": place.offset,
            "shared_memory_byte_size": len(raw),
        }

    def datatype(self, response: InferResponse, name: str, array: np.ndarray) -> str:
        """The datatype of an output; bits of bfloat16 are told from UINT16 by the model's metadata."""
        datatype = NAMES.get(array.dtype)
        if datatype is None:
            raise ServeError(Status.INTERNAL, f"output {name!r} has dtype {array.dtype}, which the protocol can't name")
        if array.dtype == _UINT16:
            for spec in self._core.metadata(response.model, response.version).outputs:
                if spec.name == name:
                    return spec.datatype
        return datatype

    def classified(self, response: InferResponse, name: str, array: np.ndarray, classes: int) -> np.ndarray:
        """The highest values of an output, with the labels that the model has for it."""
        specs = self._core.metadata(response.model, response.version).outputs
        labels = next((spec.labels for spec in specs if spec.name == name), ())
        batched = array.ndim > 1 or bool(self._core.config(response.model, response.version).get("max_batch_size"))
        if self.datatype(response, name, array) == "BF16":
            array = bf16_floats(array)
        return classify(name, array, classes, labels, batched=batched and array.ndim > 0)


def _values(name: str, datatype: str, array: np.ndarray) -> Any:
    """An output's elements for orjson: an array where it can write it."""
    if datatype == "BF16":
        return bf16_floats(array).ravel()
    if datatype == "BYTES":
        try:
            return [e if isinstance(e, str) else bytes(e).decode() for e in array.ravel().tolist()]
        except UnicodeDecodeError:
            invalid(f"output {name!r} holds bytes that are no UTF-8; ask for it with 'binary_data': true")
    return array.ravel()


def _finite(values: Any) -> bool:
    """Whether JSON can say all of these, NaN aside, which becomes null."""
    return not isinstance(values, np.ndarray) or values.dtype.kind != "f" or not np.isinf(values).any()


def _with_infinities(document: dict[str, Any]) -> bytes:
    """The document with infinities as Triton writes them; slow, and as rare as infinities."""
    import json

    def plain(values: np.ndarray | list[Any]) -> list[Any]:
        if isinstance(values, list):
            return values
        # By way of orjson: the shortest text of a float32, and null for what isn't finite.
        items = orjson.loads(orjson.dumps(np.where(np.isinf(values), values.dtype.type(0), values), option=_NUMPY))
        for index in np.flatnonzero(np.isinf(values)).tolist():
            items[index] = float(values[index])
        return list(items)

    outputs = [{**e, "data": plain(e["data"])} if "data" in e else e for e in document["outputs"]]
    return json.dumps({**document, "outputs": outputs}, separators=(",", ":"), ensure_ascii=False).encode()
