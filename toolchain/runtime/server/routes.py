"""The paths of the REST protocol: which handler answers which request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from toolchain.runtime.server.api import Core, InferRequest, ModelMetadata, ServeError, Status
from toolchain.runtime.server.compression import accepted, compress, decompress
from toolchain.runtime.server.datatypes import invalid
from toolchain.runtime.server.http_reply import BINARY, TEXT, Reply, error_reply, json_reply
from toolchain.runtime.server.rest_answer import Answer as Answer200
from toolchain.runtime.server.rest_answer import Encoder
from toolchain.runtime.server.rest_codec import Decoder, Plan
from toolchain.version import __version__

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.http_request import Request
    from toolchain.runtime.server.http_server import HttpServer
    from toolchain.runtime.server.shared_memory import SharedMemory

_EXTENSIONS = (
    "classification",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
SMALL_REQUEST = 1024 * 1024
_REMEMBERED = 4096
_COMPRESSED = 1024
_OFF_LOOP = 64 * 1024

Answer = Callable[["Request"], Reply]
#: From a body and the length of the JSON in it to the parts of an answer and the length of the JSON in these.
#: Instead of it what has to be waited for, or None where the request has to be answered by ``Route.wait``.
Quick = Callable[[bytes, "int | None"], "Answer200 | Awaitable[Reply] | None"]
Wait = Callable[["Request"], Awaitable[Reply]]


class Route(NamedTuple):
    """How one method and path are answered: at once by ``answer``, or by awaiting ``wait``.

    ``quick`` may know the answer to what ``wait`` would answer with 200 after a while.
    """

    answer: Answer
    wait: Wait
    waits: bool
    max_body: int
    open: bool = False
    quick: Quick | None = None


class Call(NamedTuple):
    """What a path names."""

    model: str = ""
    version: str = ""
    region: str = ""


class Router:
    """Finds routes, and answers inferences and questions; administration is in :mod:`admin_routes`."""

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory, server: HttpServer) -> None:
        from toolchain.runtime.server.admin_routes import Administration
        from toolchain.runtime.server.pages import Pages

        self.core = core
        self.settings = settings
        self._server = server
        self._decoder = Decoder(core, memory)
        self._encoder = Encoder(core, memory)
        self._known: dict[tuple[bytes, bytes], Route] = {}
        self.nowhere = _fixed(error_reply(404, "no such path"))
        self._admin = Administration(core, settings, memory)
        self._pages = Pages(core)
        self._shapes = self._table()

    def resolve(self, method: bytes, target: bytes) -> Route:
        """The route of a request line; never fails, an unknown path has a route that says so."""
        route = self._known.get((method, target))
        if route is None:
            route = self._find(method, target)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[(method, target)] = route
        return route

    def _table(self) -> dict[str, dict[str, Callable[[Call], Route]]]:
        """Route makers by path, its variable parts replaced, and by method."""
        core, admin, pages = self.core, self._admin, self._pages
        models: dict[str, dict[str, Callable[[Call], Route]]] = {
            "": {"GET": lambda c: _now(lambda r: json_reply(metadata_json(core.metadata(c.model, c.version))))},
            "/ready": {"GET": lambda c: _now(lambda r: self._model_ready(c), open_=True)},
            "/infer": {"POST": self._infer_route},
            "/config": {"GET": lambda c: _now(lambda r: json_reply(core.config(c.model, c.version)))},
            "/stats": {"GET": lambda c: _now(lambda r: self._statistics(c))},
            "/trace/setting": {
                "GET": lambda c: _now(lambda r: admin.trace(c.model)),
                "POST": lambda c: _now(lambda r: admin.set_trace(c.model, r), SMALL_REQUEST),
            },
        }
        table: dict[str, dict[str, Callable[[Call], Route]]] = {
            "/": {"GET": lambda c: _now(lambda r: pages.status())},
            "/metrics": {"GET": lambda c: _now(lambda r: Reply(200, [core.metrics(), self._server.metrics()], TEXT))},
            "/v2": {"GET": lambda c: _fixed(json_reply(server_json(self.settings)))},
            "/v2/openapi.json": {"GET": lambda c: _now(lambda r: pages.openapi())},
            "/v2/health/live": {"GET": lambda c: _now(lambda r: _health("live", core.live()), open_=True)},
            "/v2/health/ready": {"GET": lambda c: _now(lambda r: _health("ready", core.ready()), open_=True)},
            "/v2/models/stats": {"GET": lambda c: _now(lambda r: self._statistics(Call()))},
            **{f"/v2/models/*{rest}": makers for rest, makers in models.items()},
            **{f"/v2/models/*/versions/*{rest}": makers for rest, makers in models.items()},
        }
        for path, makers in admin.table().items():
            table[path] = {method: _adapted(maker) for method, maker in makers.items()}
        return table

    def _find(self, method: bytes, target: bytes) -> Route:
        path = target.decode("latin-1")
        if "://" in path.split("?", 1)[0] and not path.startswith("/"):
            path = "/" + path.split("://", 1)[1].partition("/")[2]
        path = path.split("?", 1)[0].split("#", 1)[0]
        if len(path) > 1:
            path = path.rstrip("/") or "/"
        shape, call = _shape(path)
        makers = self._shapes.get(shape)
        if makers is None:
            return _fixed(error_reply(404, f"no such path {path!r:.200}; /v2/openapi.json lists what there is"))
        verb = method.decode("latin-1")
        maker = makers.get("GET" if verb == "HEAD" else verb)
        if maker is None:
            allowed = ", ".join([*makers, *(["HEAD"] if "GET" in makers else [])])
            message = f"{verb} is not allowed here; {allowed} is"
            return _fixed(error_reply(405, message, f"Allow: {allowed}\r\n".encode()))
        return maker(call)

    def _infer_route(self, call: Call) -> Route:
        model, version = call.model, call.version

        async def infer(request: Request) -> Reply:
            headers, body = request.headers, request.body
            coding = headers.get(b"content-encoding")
            if coding is not None:
                body = await self._decompressed(request, coding)
            length = headers.get(b"inference-header-content-length")
            if length is not None and not (length.isdigit() and len(length) < 16):
                invalid("Inference-Header-Content-Length is a whole number of at least 0")
            json_length = None if length is None else int(length)
            inference, plan = self._decoder.decode(body, json_length, model, version)
            parent = headers.get(b"traceparent")
            if parent is not None:
                inference.parameters = {**inference.parameters, "traceparent": parent.decode("latin-1")}
            response = await self.core.infer(inference)
            reply = _inferred(self._encoder.encode(response, plan))
            encodings = headers.get(b"accept-encoding")
            if encodings is not None and self.settings.compress:
                return await self._compressed(reply, encodings)
            return reply

        decode, encode, infer_now = self._decoder.decode, self._encoder.encode, self.core.infer_now

        async def later(inference: InferRequest, plan: Plan) -> Reply:
            return _inferred(encode(await self.core.infer(inference), plan))

        def quick(body: bytes, json_length: int | None) -> Answer200 | Awaitable[Reply] | None:
            """Of requests whose headers say nothing else; what isn't right is left to ``infer``."""
            try:
                inference, plan = decode(body, json_length, model, version)
                response = infer_now(inference)
                return later(inference, plan) if response is None else encode(response, plan)
            except ServeError:
                return None

        return Route(_never, infer, True, self.settings.max_body, quick=quick)

    async def _decompressed(self, request: Request, header: bytes) -> bytes | bytearray | memoryview:
        coding, limit = header.decode("latin-1").strip().lower(), self.settings.max_body
        if coding == "identity":
            return request.body
        if len(request.body) < _OFF_LOOP // 16:
            body = decompress(request.body, coding, limit)
        else:
            body = await asyncio.to_thread(decompress, request.body, coding, limit)
        self._server.reserve(request, len(body))
        return body

    async def _compressed(self, reply: Reply, encodings: bytes) -> Reply:
        size = sum(map(len, reply.parts))
        coding = accepted(encodings) if size >= _COMPRESSED else ""
        if not coding:
            return reply
        headers = reply.headers + f"Content-Encoding: {coding}\r\nVary: Accept-Encoding\r\n".encode()
        if size < _OFF_LOOP:
            packed = compress(reply.parts, coding)
        else:
            packed = await asyncio.to_thread(compress, reply.parts, coding)
        return reply._replace(parts=[packed], headers=headers)

    def _model_ready(self, call: Call) -> Reply:
        ready = self.core.model_ready(call.model, call.version)
        document: dict[str, Any] = {"name": call.model, "ready": ready}
        if not ready:
            document["error"] = f"model {call.model!r} is not ready"
        return json_reply(document, 200 if ready else 503)

    def _statistics(self, call: Call) -> Reply:
        return json_reply({"model_stats": self.core.statistics(call.model, call.version)})


def _inferred(answer: Answer200) -> Reply:
    parts, json_length = answer
    if json_length is None:
        return Reply(200, parts)
    return Reply(200, parts, BINARY, b"Inference-Header-Content-Length: %d\r\n" % json_length)


def metadata_json(metadata: ModelMetadata) -> dict[str, Any]:
    """The answer to ``GET /v2/models/NAME``."""
    document: dict[str, Any] = {"name": metadata.name, "versions": metadata.versions, "platform": metadata.platform}
    for key, specs in (("inputs", metadata.inputs), ("outputs", metadata.outputs)):
        document[key] = [{"name": s.name, "datatype": s.datatype, "shape": s.shape} for s in specs]
    if metadata.properties:
        document["properties"] = dict(metadata.properties)
    return document


def extensions(settings: FrontendSettings) -> tuple[str, ...]:
    """The extensions of the protocol that clients may use of this server."""
    admin = ("model_repository", "logging") if settings.allow_admin else ()
    return (*_EXTENSIONS, *admin, *(("system_shared_memory",) if settings.allow_shared_memory else ()))


def server_json(settings: FrontendSettings) -> dict[str, Any]:
    """The answer to ``GET /v2``."""
    return {"name": settings.server_name, "version": __version__, "extensions": extensions(settings)}


def _shape(path: str) -> tuple[str, Call]:
    """A path with its variable parts replaced by ``*``, and these."""
    parts = path.split("/")
    found: dict[str, str] = {}
    places = {("v2", "models"): (3, "model"), ("v2", "repository", "models"): (4, "model")}
    places[("v2", "systemsharedmemory", "region")] = places[("v2", "cudasharedmemory", "region")] = (4, "region")
    for start, (at, key) in places.items():
        if tuple(parts[1 : len(start) + 1]) == start and len(parts) > at and path != "/v2/models/stats":
            found[key], parts[at] = unquote(parts[at]), "*"
            if key == "model" and len(start) == 2 and len(parts) > 5 and parts[4] == "versions":
                found["version"], parts[5] = unquote(parts[5]), "*"
    return "/".join(parts), Call(**found)


def _health(key: str, good: bool) -> Reply:
    document: dict[str, Any] = {key: good}
    if not good:
        document["error"] = f"the server is not {key}"
    return json_reply(document, 200 if good else 503)


def _never(request: Request) -> Reply:
    raise ServeError(Status.INTERNAL, "this path is answered asynchronously")


async def _never_waits(request: Request) -> Reply:
    raise ServeError(Status.INTERNAL, "this path is answered at once")


def _now(answer: Answer, max_body: int = 0, *, open_: bool = False) -> Route:
    """A route that is answered at once; a GET may carry a small body, which is ignored."""
    return Route(answer, _never_waits, False, max_body or SMALL_REQUEST, open_)


def _fixed(reply: Reply) -> Route:
    return _now(lambda request: reply)


def _adapted(maker: Callable[[str, str], Answer | Wait]) -> Callable[[Call], Route]:
    """A maker of administration's: from the model's and the region's name to a handler."""

    def make(call: Call) -> Route:
        handler: Any = maker(call.model, call.region)
        if asyncio.iscoroutinefunction(handler):
            return Route(_never, handler, True, SMALL_REQUEST)
        return _now(handler)

    return make
