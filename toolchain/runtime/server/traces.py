"""OpenTelemetry traces of inferences, where they are asked for and the packages are installed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from toolchain.errors import ExitCode, ToolchainError
from toolchain.runtime.server.api import InferRequest

_HINT = "pip install opentelemetry-sdk opentelemetry-exporter-otlp, or set logs.traces to false"


class Traces:
    """Makes a span for each inference, under the client's ``traceparent`` where it sent one.

    Spans go where the environment says (``OTEL_EXPORTER_OTLP_ENDPOINT`` and its kin).  A tracer provider that is set
    up already, as by ``opentelemetry-instrument``, is used as it is.

    Raises:
        ToolchainError: MISSING_TOOL, OpenTelemetry is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise _missing(error) from None
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(_provider())
        self._tracer: Any = trace.get_tracer("toolchain.serve")
        self._propagator: Any = TraceContextTextMapPropagator()

    def span(self, request: InferRequest) -> AbstractContextManager[Any]:
        """A span around one inference."""
        parent = request.parameters.get("traceparent")
        context = self._propagator.extract({"traceparent": str(parent)}) if parent else None
        attributes = {"model": request.model, "request.id": request.id}
        span: AbstractContextManager[Any] = self._tracer.start_as_current_span(
            "infer", context=context, attributes=attributes
        )
        return span

    def close(self) -> None:
        """Send what has not been sent."""
        from opentelemetry import trace

        shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
        if shutdown is not None:
            shutdown()


def _provider() -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing(error) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "toolchain"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _missing(error: ImportError) -> ToolchainError:
    return ToolchainError(
        f"traces need OpenTelemetry, which cannot be imported: {error}",
        where="logs.traces",
        hint=_HINT,
        code=ExitCode.MISSING_TOOL,
    )
