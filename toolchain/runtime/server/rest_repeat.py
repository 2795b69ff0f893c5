"""The JSON in front of binary tensors, when it came before with the same bytes, and the JSON of answers to it.

A client sends the same description of its tensors in front of each request's bytes.  What such a description says was
checked in full the first time; when it comes again, all that can be wrong with the request is how many bytes follow,
and with any other number it goes the long way.  In answers everything but the values is the same again, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from toolchain.runtime.server.api import InferRequest, InferResponse
from toolchain.runtime.server.datatypes import DTYPES, NAMES, to_raw
from toolchain.runtime.server.repeats import Repeats, renewed

if TYPE_CHECKING:
    from toolchain.runtime.server.rest_codec import Plan

#: The longest description that is kept, and how many are.
LONGEST = 4096
KEPT = 512
#: Their values have to be looked at, or taken apart.
LOOKED_AT = frozenset({"BOOL", "BYTES"})
#: Numbers of the dtypes that are told by themselves: BF16 has UINT16's, and text is objects.
TOLD = frozenset(dtype.num for name, dtype in DTYPES.items() if name not in ("UINT16", "BF16", "BYTES"))


class _Tensor(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class Known(NamedTuple):
    """What a description says."""

    tensors: tuple[_Tensor, ...]
    nbytes: int
    request: InferRequest
    plan: Plan


class Descriptions:
    """Descriptions that came before, by their exact bytes."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        self._repeats = Repeats()

    def request(self, text: bytes, tail: memoryview, model: str, version: str) -> tuple[InferRequest, Plan] | None:
        """The request of a known description and the bytes after it; None: it has to be read."""
        known = self._known.get(text)
        if known is None or len(tail) != known.nbytes:
            return None
        inputs = {}
        for name, dtype, shape, start in known.tensors:
            array: np.ndarray = np.ndarray(shape, dtype, tail, start)
            inputs[name] = array if array.flags.aligned else array.copy()
        like = known.request
        request = renewed(like, model, version, inputs)
        return request, known.plan

    def meet(self, text: bytes, tail: memoryview, document: dict[str, Any], request: InferRequest, plan: Plan) -> None:
        """Note a description that was read and found good; the second time it is kept, if all inputs are binary."""
        if not self._repeats.again(text) or any(wish.place for wish in plan.wishes.values()):
            return
        tensors, at = [], 0
        for entry in document["inputs"]:
            parameters = entry.get("parameters") or {}
            array = request.inputs[entry["name"]]
            binary = "binary_data_size" in parameters and parameters.get("shared_memory_region") is None
            if not binary or entry["datatype"] in LOOKED_AT or not array.size:
                return
            tensors.append(_Tensor(entry["name"], array.dtype, array.shape, at))
            at += array.nbytes
        if len(self._known) >= KEPT:
            self._known.clear()
        like = InferRequest(
            "",
            "",
            {},
            request.outputs,
            request.id,
            request.priority,
            request.timeout_us,
            request.bf16,
            dict(request.parameters),
        )
        self._known[text] = Known(tuple(tensors), at, like, plan)


class Frames:
    """The JSON of usual answers without the values, by everything that is in it.

    Answers are not usual that hold what isn't told by dtype and shape alone: text, bfloat16, shared memory,
    classifications; or what is another each time: an id.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bytes] = {}
        self._starts: dict[tuple[Any, ...], bytes] = {}

    def json(self, response: InferResponse) -> tuple[list[bytes | memoryview], None] | None:
        """The body of an answer with one output, as JSON; None: it has to be written in full.

        That is so too for values that JSON has no numbers for.
        """
        outputs = response.outputs
        if response.id or len(outputs) != 1:
            return None
        ((name, array),) = outputs.items()
        kind = array.dtype.num
        if kind not in TOLD:
            return None
        text = orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)
        if b"null" in text:
            return None
        key = response.model, response.version, name, kind, array.shape
        start = self._starts.get(key)
        if start is None:
            entry = {"name": name, "datatype": NAMES[array.dtype], "shape": array.shape, "data": []}
            document = {"model_name": response.model, "model_version": response.version, "outputs": [entry]}
            if len(self._starts) >= KEPT:
                self._starts.clear()
            start = self._starts[key] = orjson.dumps(document)[: -len("[]}]}")]
        return [b"%b%b}]}" % (start, text)], None

    def binary(self, response: InferResponse, plan: Plan) -> tuple[list[bytes | memoryview], int] | None:
        """The parts of a body whose outputs are all binary, and the length of its JSON; None: it has to be written."""
        default, wishes = plan
        if response.id or not response.outputs:
            return None
        key: list[Any] = [response.model, response.version]
        parts: list[bytes | memoryview] = [b""]
        for name, array in response.outputs.items():
            wish = wishes.get(name, default) if wishes else default
            kind = array.dtype.num
            if not wish.binary or wish.classes or wish.place is not None or kind not in TOLD:
                return None
            key += (name, kind, array.shape)
            parts.append(to_raw(array))
        known = tuple(key)
        head = self._known.get(known)
        if head is None:
            head = self._make(response)
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[known] = head
        parts[0] = head
        return parts, len(head)

    def _make(self, response: InferResponse) -> bytes:
        outputs = [
            {
                "name": name,
                "datatype": NAMES[array.dtype],
                "shape": array.shape,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in response.outputs.items()
        ]
        document = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
        return orjson.dumps(document)
