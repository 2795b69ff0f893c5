"""The gRPC inference service, all RPCs of the published proto."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from toolchain.runtime.server.api import Core, InferRequest, ServeError, Status
from toolchain.runtime.server.frontend import check_admin
from toolchain.runtime.server.grpc_codec import Codec, parameters_of, parsed
from toolchain.runtime.server.grpc_connection import Method
from toolchain.runtime.server.log_settings import TRACE_SETTINGS, LogSettings
from toolchain.runtime.server.proto import stubs
from toolchain.runtime.server.rest_codec import Wish
from toolchain.runtime.server.routes import extensions
from toolchain.version import __version__

if TYPE_CHECKING:
    from toolchain.runtime.server.frontend import FrontendSettings
    from toolchain.runtime.server.shared_memory import SharedMemory

pb = stubs()
_log = logging.getLogger("toolchain.serve")
_OPEN = frozenset({"ServerLive", "ServerReady", "ModelReady"})
_STREAM_WINDOW = 64


class InferenceService:
    """One method for each RPC, named as it is, in lower case with underscores."""

    def __init__(
        self,
        core: Core,
        settings: FrontendSettings,
        memory: SharedMemory,
        refused: Callable[[str, ServeError], None],
    ) -> None:
        self._refused = refused
        self._core = core
        self._settings = settings
        self._memory = memory
        self._codec = Codec(core, memory)

    def methods(self) -> dict[str, Method]:
        """The service's methods by path, made from the proto's descriptor."""
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        found = {}
        for method in service.methods:
            parse, is_open = getattr(pb, method.input_type.name).FromString, method.name in _OPEN
            if method.name == "ModelStreamInfer":
                made = Method(method.name, is_open, stream=self.model_stream_infer)
            elif method.name == "ModelInfer":
                made = Method(method.name, is_open, answer=self.model_infer)
            else:
                behaviour = getattr(self, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method.name).lower())
                made = Method(method.name, is_open, answer=_answer(behaviour, parse))
            found[f"/{service.full_name}/{method.name}"] = made
        return found

    def server_live(self, request: Any) -> Any:
        return pb.ServerLiveResponse(live=self._core.live())

    def server_ready(self, request: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._core.ready())

    def model_ready(self, request: Any) -> Any:
        return pb.ModelReadyResponse(ready=self._core.model_ready(request.name, request.version))

    def server_metadata(self, request: Any) -> Any:
        name, listed = self._settings.server_name, extensions(self._settings)
        return pb.ServerMetadataResponse(name=name, version=__version__, extensions=listed)

    def model_metadata(self, request: Any) -> Any:
        found = self._core.metadata(request.name, request.version)
        message = pb.ModelMetadataResponse(name=found.name, versions=found.versions, platform=found.platform)
        for specs, tensors in ((found.inputs, message.inputs), (found.outputs, message.outputs)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return message

    def model_infer(self, data: bytes) -> bytes | Awaitable[bytes]:
        """The answer to a request, or what gives it if it has to be waited for."""
        inference, wishes = self._codec.read(data)
        response = self._core.infer_now(inference)
        if response is None:
            return self._later(inference, wishes)
        return self._codec.write(response, wishes)

    async def _later(self, inference: InferRequest, wishes: Mapping[str, Wish]) -> bytes:
        return self._codec.write(await self._core.infer(inference), wishes)

    async def model_stream_infer(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Answers in the order of the requests, up to 64 of which are worked on at the same time."""
        waiting: asyncio.Queue[asyncio.Task[Any] | ServeError | None] = asyncio.Queue(_STREAM_WINDOW)

        async def read() -> None:
            end: ServeError | None = None
            try:
                async for request in requests:
                    await waiting.put(asyncio.create_task(self._one_of_stream(request)))
            except ServeError as error:
                end = error
            finally:
                await waiting.put(end)

        reader = asyncio.create_task(read())
        try:
            while (task := await waiting.get()) is not None:
                if isinstance(task, ServeError):
                    raise task
                answer = await task
                yield answer.SerializeToString()
        finally:
            reader.cancel()
            while not waiting.empty():
                left = waiting.get_nowait()
                if isinstance(left, asyncio.Task):
                    left.cancel()

    async def _one_of_stream(self, data: bytes) -> Any:
        """The answer to one request of a stream; an error doesn't end the stream."""
        request = pb.ModelInferRequest()
        try:
            request = parsed(pb.ModelInferRequest.FromString, data)
            inference, wishes = self._codec.decode(request)
            message = self._codec.encode(await self._core.infer(inference), wishes)
        except ServeError as error:
            self._refused("ModelStreamInfer", error)
            failed = pb.ModelStreamInferResponse(error_message=error.message)
            failed.infer_response.id = request.id
            return failed
        except Exception:
            _log.exception("request failed", extra={"facts": {"rpc": "ModelStreamInfer"}})
            return pb.ModelStreamInferResponse(error_message="the server failed to answer; its log says why")
        if request.parameters.get("triton_enable_empty_final_response") is not None:
            message.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=message)

    def model_config(self, request: Any) -> Any:
        config = self._core.config(request.name, request.version)
        message = pb.ModelConfigResponse()
        json_format.ParseDict(config, message.config, ignore_unknown_fields=True)
        return message

    def model_statistics(self, request: Any) -> Any:
        found = self._core.statistics(request.name, request.version)
        return json_format.ParseDict({"model_stats": found}, pb.ModelStatisticsResponse(), ignore_unknown_fields=True)

    def repository_index(self, request: Any) -> Any:
        message = pb.RepositoryIndexResponse()
        for entry in self._core.index(ready_only=request.ready):
            message.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return message

    async def repository_model_load(self, request: Any) -> Any:
        check_admin(self._settings, "loading a model")
        await self._core.load(request.model_name, parameters_of(request.parameters, "load") or None)
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any) -> Any:
        check_admin(self._settings, "unloading a model")
        await self._core.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def system_shared_memory_status(self, request: Any) -> Any:
        message = pb.SystemSharedMemoryStatusResponse()
        for region in self._memory.status(request.name):
            status = pb.SystemSharedMemoryStatusResponse.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.size
            )
            message.regions[region.name].CopyFrom(status)
        return message

    def system_shared_memory_register(self, request: Any) -> Any:
        self._memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def system_shared_memory_unregister(self, request: Any) -> Any:
        self._memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_shared_memory_status(self, request: Any) -> Any:
        return pb.CudaSharedMemoryStatusResponse()

    def cuda_shared_memory_register(self, request: Any) -> Any:
        raise ServeError(Status.UNSUPPORTED, "shared memory of CUDA devices is not supported")

    def cuda_shared_memory_unregister(self, request: Any) -> Any:
        return pb.CudaSharedMemoryUnregisterResponse()

    def trace_setting(self, request: Any) -> Any:
        if request.settings:
            raise ServeError(Status.UNSUPPORTED, "trace settings can't be changed while the server runs")
        if request.model_name:
            self._core.metadata(request.model_name)
        message = pb.TraceSettingResponse()
        for key, value in TRACE_SETTINGS.items():
            message.settings[key].value.extend(value if isinstance(value, list) else [value])
        return message

    def log_settings(self, request: Any) -> Any:
        if request.settings:
            check_admin(self._settings, "changing log settings")
            LogSettings.update(parameters_of(request.settings, "log settings"))
        message = pb.LogSettingsResponse()
        for key, value in LogSettings.current().items():
            kind = "bool_param" if isinstance(value, bool) else "uint32_param" if isinstance(value, int) else ""
            setattr(message.settings[key], kind or "string_param", value)
        return message


def _answer(behaviour: Callable[[Any], Any], parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """From messages as objects to messages as bytes."""

    def now(data: bytes) -> bytes:
        return bytes(behaviour(parsed(parse, data)).SerializeToString())

    async def later(data: bytes) -> bytes:
        return bytes((await behaviour(parsed(parse, data))).SerializeToString())

    return later if asyncio.iscoroutinefunction(behaviour) else now
