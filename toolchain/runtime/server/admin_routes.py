"""The REST protocol's administration: the model repository, shared memory, and log and trace settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.runtime.server.api import Core, ServeError, Status
from toolchain.runtime.server.compression import decompress
from toolchain.runtime.server.datatypes import invalid
from toolchain.runtime.server.frontend import check_admin
from toolchain.runtime.server.http_reply import JSON, Reply, json_reply
from toolchain.runtime.server.log_settings import TRACE_SETTINGS, LogSettings
from toolchain.runtime.server.rest_codec import parse_object

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.http_request import Request
    from toolchain.runtime.server.shared_memory import SharedMemory

Handler = Callable[["Request"], Reply] | Callable[["Request"], Awaitable[Reply]]
Maker = Callable[[str, str], Handler]
_EMPTY = Reply(200, [b""], JSON)
_LARGEST = 1024 * 1024


class Administration:
    """Handlers; each maker takes a model's and a region's name from the path."""

    def __init__(self, core: Core, settings: FrontendSettings, memory: SharedMemory) -> None:
        self._core = core
        self._settings = settings
        self._memory = memory

    def table(self) -> dict[str, dict[str, Maker]]:
        """Makers of handlers by path and method."""
        memory = "/v2/systemsharedmemory"
        cuda = "/v2/cudasharedmemory"
        table: dict[str, dict[str, Maker]] = {
            "/v2/repository/index": {"POST": lambda model, region: self.index},
            "/v2/repository/models/*/load": {"POST": lambda model, region: self._load(model)},
            "/v2/repository/models/*/unload": {"POST": lambda model, region: self._unload(model)},
            "/v2/logging": {"GET": lambda model, region: self.log, "POST": lambda model, region: self.set_log},
            "/v2/trace/setting": {
                "GET": lambda model, region: lambda request: self.trace(""),
                "POST": lambda model, region: lambda request: self.set_trace("", request),
            },
        }
        for at in ("", "/region/*"):
            table[f"{memory}{at}/status"] = {"GET": lambda model, region: lambda request: self._regions(region)}
            table[f"{memory}{at}/unregister"] = {"POST": lambda model, region: lambda request: self._forget(region)}
            table[f"{cuda}{at}/status"] = {"GET": lambda model, region: lambda request: json_reply([])}
            table[f"{cuda}{at}/unregister"] = {"POST": lambda model, region: lambda request: _EMPTY}
        table[f"{memory}/region/*/register"] = {
            "POST": lambda model, region: lambda request: self._add(region, request)
        }
        table[f"{cuda}/region/*/register"] = {"POST": lambda model, region: _no_cuda}
        return table

    def index(self, request: Request) -> Reply:
        """The repository's models, those that are ready for ``{"ready": true}``."""
        ready = self._document(request).get("ready", False)
        if type(ready) is not bool:
            invalid("'ready' is true or false")
        return json_reply([index_json(entry) for entry in self._core.index(ready_only=ready)])

    def _load(self, model: str) -> Handler:
        async def load(request: Request) -> Reply:
            check_admin(self._settings, "loading a model")
            parameters = self._document(request).get("parameters")
            if parameters is not None and type(parameters) is not dict:
                invalid("'parameters' is an object")
            await self._core.load(model, parameters)
            return _EMPTY

        return load

    def _unload(self, model: str) -> Handler:
        async def unload(request: Request) -> Reply:
            check_admin(self._settings, "unloading a model")
            self._document(request)
            await self._core.unload(model)
            return _EMPTY

        return unload

    def _regions(self, region: str) -> Reply:
        return json_reply([found.status() for found in self._memory.status(region)])

    def _add(self, region: str, request: Request) -> Reply:
        document = self._document(request)
        key, offset, size = document.get("key"), document.get("offset", 0), document.get("byte_size")
        if type(key) is not str or type(offset) is not int or type(size) is not int:
            invalid("registering shared memory takes 'key', a string, 'byte_size' and 'offset', whole numbers")
        self._memory.register(region, key, offset, size)
        return _EMPTY

    def _forget(self, region: str) -> Reply:
        self._memory.unregister(region)
        return _EMPTY

    def log(self, request: Request) -> Reply:
        """The log settings."""
        return json_reply(LogSettings.current())

    def set_log(self, request: Request) -> Reply:
        """Change log settings."""
        check_admin(self._settings, "changing log settings")
        return json_reply(LogSettings.update(self._document(request)))

    def trace(self, model: str) -> Reply:
        """The trace settings, of a model or of all."""
        if model:
            self._core.metadata(model)
        return json_reply(TRACE_SETTINGS)

    def set_trace(self, model: str, request: Request) -> Reply:
        """Refuse: traces are set up when the server starts."""
        self._document(request)
        return refuse_trace()

    def _document(self, request: Request) -> Mapping[str, Any]:
        body = request.body
        coding = request.headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if coding and coding != "identity":
            body = decompress(body, coding, _LARGEST)
        return parse_object(body) if len(body) else {}


def index_json(entry: Any) -> dict[str, str]:
    """One entry of the repository index."""
    document = {"name": entry.name, "version": entry.version, "state": entry.state}
    return document | ({"reason": entry.reason} if entry.reason else {})


def refuse_trace() -> Reply:
    raise ServeError(Status.UNSUPPORTED, "trace settings can't be changed while the server runs; see 'logs.traces'")


def _no_cuda(request: Request) -> Reply:
    raise ServeError(Status.UNSUPPORTED, "shared memory of CUDA devices is not supported")
