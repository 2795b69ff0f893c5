"""Messages of inferences that came before, all but the tensors' bytes; as :mod:`rest_repeat` for the binary extension.

In a message the raw contents come last.  What is in front of them was parsed and checked in full when it came before;
when the same bytes come again, followed by raw contents of the same lengths, only the values are new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from toolchain.runtime.server.api import InferRequest, InferResponse
from toolchain.runtime.server.datatypes import to_raw
from toolchain.runtime.server.repeats import Repeats, renewed
from toolchain.runtime.server.rest_repeat import KEPT, LONGEST, LOOKED_AT, TOLD

if TYPE_CHECKING:
    from toolchain.runtime.server.rest_codec import Wish

#: Tags of raw_input_contents and raw_output_contents: their fields' numbers, with a length.
_RAW_INPUT, _RAW_OUTPUT = b"\x3a", b"\x32"
#: Messages of one length that are looked through.
_ALIKE = 8


class _Tensor(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    prefix: bytes
    start: int


class _Known(NamedTuple):
    before: bytes
    tensors: tuple[_Tensor, ...]
    request: InferRequest
    wishes: dict[str, Wish]


class KnownRequests:
    """``ModelInferRequest`` messages that came before."""

    def __init__(self) -> None:
        self._known: dict[int, list[_Known]] = {}
        self._repeats = Repeats()

    def request(self, data: bytes) -> tuple[InferRequest, dict[str, Wish]] | None:
        """The request in a message like one that is known; None: it has to be parsed."""
        for before, tensors, like, wishes in self._known.get(len(data), ()):
            if not data.startswith(before):
                continue
            inputs = {}
            for name, dtype, shape, prefix, start in tensors:
                if not data.startswith(prefix, start - len(prefix)):
                    return None
                array: np.ndarray = np.ndarray(shape, dtype, data, start)
                inputs[name] = array if array.flags.aligned else array.copy()
            request = renewed(like, like.model, like.version, inputs)
            return request, wishes
        return None

    def meet(self, data: bytes, message: Any, request: InferRequest, wishes: dict[str, Wish]) -> None:
        """Note a message that was parsed and found good; the second time it is kept, if all inputs are raw."""
        raw = message.raw_input_contents
        size = sum(len(_prefix(_RAW_INPUT, len(content))) + len(content) for content in raw)
        before = data[: len(data) - size]
        usual = len(raw) == len(message.inputs) and len(before) <= LONGEST and not any(w.place for w in wishes.values())
        if not usual or not self._repeats.again(before):
            return
        tensors = _tensors(data, len(before), message, request)
        if tensors is None or not _is_rest(before, message):
            return
        if len(self._known) >= KEPT // _ALIKE:
            self._known.clear()
        like = InferRequest(
            request.model,
            request.version,
            {},
            request.outputs,
            request.id,
            request.priority,
            request.timeout_us,
            request.bf16,
            request.parameters,
        )
        alike = self._known.setdefault(len(data), [])
        alike.insert(0, _Known(before, tensors, like, wishes))
        del alike[_ALIKE:]


def _tensors(data: bytes, at: int, message: Any, request: InferRequest) -> tuple[_Tensor, ...] | None:
    """Where the inputs lie in a message whose raw contents begin at ``at``; None where they don't, or aren't usual."""
    tensors = []
    for entry, content in zip(message.inputs, message.raw_input_contents, strict=True):
        prefix = _prefix(_RAW_INPUT, len(content))
        if entry.datatype in LOOKED_AT or not content or not data.startswith(prefix + content, at):
            return None
        at += len(prefix)
        array = request.inputs[entry.name]
        tensors.append(_Tensor(entry.name, array.dtype, array.shape, prefix, at))
        at += len(content)
    return tuple(tensors)


def _is_rest(before: bytes, message: Any) -> bool:
    """Whether ``before`` is all of a message but its raw contents, so that these are its last fields."""
    rest = type(message)()
    try:
        rest.ParseFromString(before)
    except DecodeError:
        return False
    if rest.raw_input_contents:
        return False
    rest.raw_input_contents.extend(message.raw_input_contents)
    return bool(rest == message)


class KnownAnswers:
    """``ModelInferResponse`` messages without their tensors' bytes, by everything that is in them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bytes] = {}

    def answer(
        self, response: InferResponse, wishes: Mapping[str, Wish]
    ) -> tuple[tuple[Any, ...], bytes | None] | None:
        """A key, and the message if it is known; None for what isn't told by dtype and shape alone, or has an id."""
        if response.id or wishes:
            return None
        key: list[Any] = [response.model, response.version]
        for name, array in response.outputs.items():
            kind = array.dtype.num
            if kind not in TOLD:
                return None
            key += (name, kind, array.shape)
        found = tuple(key)
        before = self._known.get(found)
        if before is None:
            return found, None
        parts: list[bytes | memoryview] = [before]
        for array in response.outputs.values():
            raw = to_raw(array)
            parts += (_prefix(_RAW_OUTPUT, len(raw)), raw)
        return found, b"".join(parts)

    def keep(self, key: tuple[Any, ...], message: Any) -> None:
        """Remember a message that was made for ``key``."""
        rest = type(message)()
        rest.CopyFrom(message)
        del rest.raw_output_contents[:]
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = rest.SerializeToString()


def _prefix(tag: bytes, size: int) -> bytes:
    """A field's tag and length (a varint)."""
    head = bytearray(tag)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)
