"""Traces: one server span for each call that generates, under the caller's `traceparent`.

Knows OpenTelemetry, its conventions for gRPC and generative AI, and how it is set up; nothing of when a thing happens.
OpenTelemetry is imported only where traces are wanted: it is an extra. A span never holds prompts or text.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from lda_service import __version__
from lda_service.engine.request import GenerationRequest, Role
from lda_service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from lda_service.engine.request import ScoreRequest

OWN_PREFIX = "lda.v1."  # of our methods; health checks and reflection have others
UNTRACED = "lda.v1.LdaService/GetLoad"  # balancers ask it all the time
FLUSH_WAIT_S = 3.0
# A call that ends with another status is the caller's affair, by the conventions for server spans.
SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
OWN_ENDS = ("ABORTED", "RESOURCE_EXHAUSTED")  # ours too: a stream was cut short, or there was no room

log = logging.getLogger(__name__)


class CallSpan:
    """The span of one call. This one is of a call that is not traced."""

    trace_id = ""

    def event(self, name: str, **attributes: Any) -> None:
        """Something happened now."""

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Facts about the whole call."""

    def end(self, status: str) -> None:
        """The call is over."""


class RecordedSpan(CallSpan):
    """A span that is sent."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def event(self, name: str, **attributes: Any) -> None:
        """Something happened now; attributes of ours get our prefix."""
        self._span.add_event(name, {f"lda.{key}": value for key, value in attributes.items()})

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Facts about the whole call."""
        self._span.set_attributes(attributes)

    def end(self, status: str) -> None:
        """The call is over."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("rpc.response.status_code", status)
        if status in SERVER_FAULTS or status in OWN_ENDS:
            self._span.set_status(StatusCode.ERROR, status)
        self._span.end()


NOT_TRACED = CallSpan()


class Tracing:
    """Begins spans and sees that they are sent.

    Args:
        provider: where spans go; None traces nothing.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lda_service", __version__) if provider is not None else None

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> CallSpan:
        """The span of a call that begins, under the parent that its metadata names."""
        if self._tracer is None or not method.startswith(OWN_PREFIX) or method == UNTRACED:
            return NOT_TRACED
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        parent = propagate.extract({key: value for key, value in metadata if isinstance(value, str)})
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        return RecordedSpan(span)

    async def close(self) -> None:
        """Send what is left; a collector that does not answer costs no more than `FLUSH_WAIT_S`."""
        provider, self._provider = self._provider, None
        if provider is None:
            return
        # A daemon: it may outlive the wait, and must not hold up the end of the process.
        flush = threading.Thread(target=provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        await asyncio.to_thread(flush.join, FLUSH_WAIT_S)
        if flush.is_alive():
            log.warning("the collector did not take the last traces within %.0f s", FLUSH_WAIT_S)


def open_tracing(wanted: bool | None) -> Tracing:
    """Traces as the OTEL_ variables say, which are the library's own settings.

    Args:
        wanted: whether an operator asked for traces; None if that is left to the variables.

    Raises:
        ConfigError: traces were asked for and cannot be had.
    """
    if wanted is False or (wanted is None and not _configured()):
        return Tracing()
    try:
        return Tracing(_provider())
    except ImportError as error:
        message = "Traces need OpenTelemetry: pip install 'lda-service[otel]', or leave out --traces."
        if wanted:
            raise ConfigError(message) from error
        log.warning("%s", message)
        return Tracing()


def _configured() -> bool:
    names = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    off = os.environ.get("OTEL_TRACES_EXPORTER") == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not off and any(os.environ.get(name) for name in names)


def _provider() -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "lda-service", "service.version": __version__})
    resource = resource.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME has the last word
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return provider


def _exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    kind = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if kind not in ("otlp", "console"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {kind!r}; use otlp or console, or --no-traces.")
    return OTLPSpanExporter() if kind == "otlp" else ConsoleSpanExporter()


def facts_of(request: GenerationRequest | ScoreRequest, model_id: str) -> dict[str, Any]:
    """What a span says of a request: numbers and ids, nothing of what was asked."""
    facts: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": model_id,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "lda.generation_id": request.request_id,
    }
    if not isinstance(request, GenerationRequest):
        return facts | {"lda.alpha": request.alpha}
    alphas = alphas_of(request)
    return facts | {
        "gen_ai.request.max_tokens": request.stopping.max_new_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        **({"lda.alpha": alphas[0]} if alphas else {}),
    }


def alphas_of(request: GenerationRequest | ScoreRequest) -> list[float]:
    """The alphas that a caller chose; those of `GenerateBoth` are no choice."""
    if isinstance(request, GenerationRequest):
        return [branch.alpha for branch in request.branches if branch.role is Role.AMPLIFIED]
    return [request.alpha]
