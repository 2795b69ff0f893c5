"""What the protocol front ends and the serving core say to each other, and nothing else.

A front end (REST, gRPC) turns bytes into an :class:`InferRequest` and an :class:`InferResponse` into bytes; the core
(repository, queues, workers) does everything between.  Neither imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class Status(Enum):
    """Why a request failed: the HTTP status, and the name of the gRPC status code."""

    INVALID = (400, "INVALID_ARGUMENT")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED")
    FORBIDDEN = (403, "PERMISSION_DENIED")
    NOT_FOUND = (404, "NOT_FOUND")
    TIMEOUT = (408, "DEADLINE_EXCEEDED")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED")
    FULL = (429, "RESOURCE_EXHAUSTED")
    CANCELLED = (499, "CANCELLED")
    INTERNAL = (500, "INTERNAL")
    UNSUPPORTED = (501, "UNIMPLEMENTED")
    UNAVAILABLE = (503, "UNAVAILABLE")


class ServeError(Exception):
    """A request that can't be answered: one message for the client, and its status.

    ``retry_after`` is in seconds; front ends send it where their protocol can say it.  Who logs it sets ``logged``,
    so that it is logged once.
    """

    def __init__(self, status: Status, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.logged = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Metadata of one input or output: Open Inference Protocol datatype ("FP32") and shape, -1 for any size.

    ``labels`` name the positions of an output's last axis, for clients that ask for a classification.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What ``GET /v2/models/NAME`` answers."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    """One inference, already parsed.

    Attributes:
        model: name of the model.
        version: the version asked for; "" for the one that the traffic policy picks.
        inputs: name -> array; views into the request's body, C-contiguous, native byte order.  BYTES tensors are
            object arrays of bytes; BF16 ones are uint16 arrays listed in ``bf16``.
        outputs: names asked for; empty for all.
        id: the client's; echoed.
        priority: 0 is the model's default, 1 the highest.
        timeout_us: longest time in the queue; 0 for the model's default.
        bf16: names of inputs whose arrays hold bfloat16 bits.
        parameters: the request's other parameters.
        arrived: ``time.monotonic_ns()`` when the request was complete.
    """

    model: str
    version: str
    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...] = ()
    id: str = ""
    priority: int = 0
    timeout_us: int = 0
    bf16: frozenset[str] = frozenset()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arrived: int = 0


@dataclass(slots=True)
class InferResponse:
    """The answer: every output asked for, in the contract's order (or the order asked for)."""

    model: str
    version: str
    id: str
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One model version of the repository index: state READY, LOADING, UNLOADING or UNAVAILABLE, and why."""

    name: str
    version: str
    state: str
    reason: str = ""


class Core(Protocol):
    """The serving core, as front ends see it.  All methods are called on the event loop's thread.

    Every method raises :class:`ServeError` (NOT_FOUND for an unknown model or version, and so on).
    """

    def live(self) -> bool: ...

    def ready(self) -> bool:
        """Whether every model that should serve does."""
        ...

    def model_ready(self, name: str, version: str = "") -> bool: ...

    def metadata(self, name: str, version: str = "") -> ModelMetadata: ...

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """The model's configuration in the JSON form of Triton's ModelConfig."""
        ...

    def statistics(self, name: str = "", version: str = "") -> list[dict[str, Any]]:
        """Triton's ``model_stats``: counts and nanoseconds by model version; all of them for no name."""
        ...

    async def infer(self, request: InferRequest) -> InferResponse:
        """Validates against the contract, queues, runs.  Cancelling the task takes the request from the queue."""
        ...

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """The answer of :meth:`infer`, where it can be had without waiting; None: ask :meth:`infer`.

        What fails is answered by :meth:`infer` too, so nothing is counted or logged here unless there is an answer.
        """
        ...

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]: ...

    async def load(self, name: str, parameters: Mapping[str, Any] | None = None) -> None: ...

    async def unload(self, name: str) -> None: ...

    def metrics(self) -> bytes:
        """The Prometheus text exposition."""
        ...
