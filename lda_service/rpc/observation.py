"""Watches calls and generations, and tells metrics and traces.

The one place that knows both what happens to a call and that anybody counts it. Everything else says what it saw, in
one call each. An event costs a few additions here: there is no work per token unless tokens carry diagnostics.
"""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from prometheus_client import start_http_server

from lda_service.engine.request import Admitted, RequestFailed, ScoreBlock, ScoreRequest, SequenceDelta
from lda_service.errors import (
    Aborted,
    ConfigError,
    LdaError,
    OutOfMemory,
    PortInUse,
    Refused,
    RequestError,
    SlowConsumer,
    WorkerDied,
)
from lda_service.rpc.access import caller_of
from lda_service.rpc.interceptors import Layer
from lda_service.rpc.metrics import SCORED, Cause, Metrics
from lda_service.rpc.tracing import NOT_TRACED, OWN_PREFIX, CallSpan, Tracing, alphas_of, facts_of
from lda_service.telemetry import set_log_fields
from lda_service.worker.client import WorkerState
from lda_service.worker.messages import sequences_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    import grpc

    from lda_service.config import TelemetryConfig
    from lda_service.engine.request import Event, GenerationRequest, Role, TokenRecord

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

UNKNOWN_METHOD = "other"
# A caller's own timer fires a little before ours: the timeout on the wire is rounded up by as much as a hundredth.
DEADLINE_SLACK_S, DEADLINE_ROUNDING = 0.05, 0.01

CAUSES: dict[type[LdaError], Cause] = {
    SlowConsumer: Cause.SLOW_CONSUMER,
    WorkerDied: Cause.WORKER_DIED,
    OutOfMemory: Cause.OUT_OF_MEMORY,
    Aborted: Cause.SHUTDOWN,  # an operator's abort says so before it fails the stream
}

# Of the call that runs in this context.
method_name: ContextVar[str] = ContextVar("method_name", default=UNKNOWN_METHOD)
call_span: ContextVar[CallSpan] = ContextVar("call_span", default=NOT_TRACED)


class Telemetry:
    """What one server tells of itself.

    Args:
        config: where metrics are served.
        tracing: begins spans.
    """

    def __init__(self, config: TelemetryConfig, tracing: Tracing) -> None:
        self._config = config
        self._tracing = tracing
        self._endpoint: tuple[WSGIServer, Thread] | None = None  # set by start
        self.metrics = Metrics()

    @property
    def metrics_url(self) -> str | None:
        """Where metrics are served; None if they are not."""
        if self._endpoint is None:
            return None
        host = self._config.metrics_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._endpoint[0].server_port}/metrics"

    def start(self) -> None:
        """Serve metrics, if that was asked for.

        Raises:
            PortInUse: the address is taken.
            ConfigError: it cannot be listened on for another reason.
        """
        host, port = self._config.metrics_host, self._config.metrics_port
        if port is None:
            return
        try:
            self._endpoint = start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"Another process listens on {host}:{port}; choose another port for metrics with METRICS_PORT or "
                    "--metrics-port (0 picks a free one)."
                ) from error
            reason = error.strerror or str(error)
            raise ConfigError(
                f"Cannot serve metrics on {host}:{port}: {reason}; choose another METRICS_HOST or METRICS_PORT."
            ) from error

    async def close(self) -> None:
        """Stop serving metrics, and send the last traces. May be called twice."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            await asyncio.to_thread(_stop, *endpoint)
        await self._tracing.close()

    def follow_worker(self, state: WorkerState) -> None:
        """The worker changed its state. The first load is no change, so LOADING means that a fresh one starts."""
        self.metrics.worker_up.set(state is WorkerState.READY)
        if state is WorkerState.LOADING:
            self.metrics.worker_restarts.inc()

    def call_began(self, context: Context) -> CallSpan:
        """A call came; everything about it that ends with it is done by one callback, which gRPC never leaves out."""
        began, method = time.perf_counter(), method_name.get()
        span = self._tracing.begin(method, context.invocation_metadata() or ())
        call_span.set(span)
        set_log_fields(trace_id=span.trace_id, caller=caller_of(context))

        def end(_: Any) -> None:
            duration_s = time.perf_counter() - began
            status = _status(context, duration_s)
            self.metrics.call_ended(method, status, duration_s)
            # Callbacks run in the order of their registration; what its generations have to say comes first.
            asyncio.get_running_loop().call_soon(span.end, status)

        context.add_done_callback(end)  # type: ignore[arg-type]
        return span

    def submitted(self, request: GenerationRequest | ScoreRequest, model_id: str, now: float) -> GenerationWatch:
        """A request went to the engine."""
        self.metrics.submitted(alphas_of(request))
        span = call_span.get()
        if span is not NOT_TRACED:
            span.note(facts_of(request, model_id))
        return GenerationWatch(request, self.metrics, span, now)


class GenerationWatch:
    """Follows one request from submission to its end, or to that of its call."""

    __slots__ = (
        "_admitted_at",
        "_first_token_at",
        "_generation_id",
        "_has_diagnostics",
        "_last_at",
        "_metrics",
        "_open_sequences",
        "_over",
        "_prompt_tokens",
        "_reasons",
        "_span",
        "_submitted_at",
        "_tokens",
    )

    def __init__(
        self, request: GenerationRequest | ScoreRequest, metrics: Metrics, span: CallSpan, submitted_at: float
    ) -> None:
        self._metrics = metrics
        self._span = span
        self._generation_id = request.request_id
        self._prompt_tokens = len(request.prompt_ids)
        if isinstance(request, ScoreRequest):
            self._prompt_tokens += len(request.continuation_ids)
        self._submitted_at = self._admitted_at = submitted_at
        self._first_token_at: float | None = None
        # When the latest tokens of each sequence came: a list of one, so that a message costs one look-up.
        self._last_at: dict[tuple[Role, int], list[float]] = {}
        self._has_diagnostics = isinstance(request, ScoreRequest) or request.output.diagnostics
        self._tokens = 0
        self._reasons: list[str] = []
        self._open_sequences = sequences_of(request)
        self._over = False

    def saw(self, event: Event, now: float) -> None:
        """An event was taken from the stream, in its order."""
        if isinstance(event, SequenceDelta):
            self._delta(event, now)
        elif isinstance(event, Admitted):
            self._admitted_at = now
            self._metrics.admitted(now - self._submitted_at, self._prompt_tokens)
            self._event("admitted")
        elif isinstance(event, ScoreBlock):
            self._divergence(event.tokens)
            if event.is_last:
                self._sequence_finished(SCORED, now)
        elif not isinstance(event, RequestFailed):
            self._sequence_finished(event.reason.value, now)

    def _delta(self, event: SequenceDelta, now: float) -> None:
        """The hot path: once for each message of a stream."""
        count, key = len(event.tokens), (event.role, event.sequence_index)
        self._tokens += count
        self._metrics.tally.add(count)
        if (last_at := self._last_at.get(key)) is None:
            self._last_at[key] = [now]
            self._sequence_began(now)
        else:
            self._metrics.tally.add_gap(now - last_at[0])
            last_at[0] = now
        if self._has_diagnostics:
            self._divergence(event.tokens)

    def _sequence_began(self, now: float) -> None:
        if self._first_token_at is None:
            self._first_token_at = now
            self._metrics.first_token(now - self._submitted_at, now - self._admitted_at)
            self._event("first_token")

    def _divergence(self, tokens: Iterable[TokenRecord]) -> None:
        for token in tokens:
            if token.diagnostics is not None:
                self._metrics.diverged(token.diagnostics.after_before_kl)

    def _sequence_finished(self, reason: str, now: float) -> None:
        self._metrics.sequence_finished(reason)
        self._reasons.append(reason)
        self._open_sequences -= 1
        if self._open_sequences:
            return
        self._over = True
        first_at = self._first_token_at
        self._metrics.finished(now - self._submitted_at, None if first_at is None else now - first_at)
        self._span.note({"gen_ai.usage.output_tokens": self._tokens, "gen_ai.response.finish_reasons": self._reasons})
        self._event("finished")

    def call_ended(self, error: LdaError | None, context: Context) -> None:
        """Its call is over; `error` is what ended the stream of its events, if anything did."""
        if self._over:
            return
        elapsed_s = time.perf_counter() - self._submitted_at
        cause = _cause_of_call(context, elapsed_s) if error is None else _cause_of(error)
        if cause is not None:
            self.ended_early(cause)

    def ended_early(self, cause: Cause) -> None:
        """It was ended before its end; the first to say so is right."""
        if self._over:
            return
        self._over = True
        self._metrics.ended_early(cause)
        self._span.note({"gen_ai.usage.output_tokens": self._tokens, "lda.cancel_cause": cause.value})

    def _event(self, name: str) -> None:
        self._span.event(name, generation_id=self._generation_id)


class TelemetryLayer(Layer):
    """Watches every call with one request message; the names of methods are those that exist."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def found(self, handler: Handler | None, method: str) -> Handler | None:
        """Remember the method, which a handler is not told."""
        if handler is None:
            self._telemetry.metrics.call_ended(UNKNOWN_METHOD, "UNIMPLEMENTED", 0.0)
        else:
            method_name.set(method.removeprefix("/"))
        return handler

    @asynccontextmanager
    async def around(self, request: Any, context: Context) -> AsyncIterator[None]:
        """Errors pass; their text is told to nobody."""
        span = self._telemetry.call_began(context)
        try:
            yield
        except LdaError as error:
            span.note({"error.type": error.reason})
            if isinstance(error, Refused) and method_name.get().startswith(OWN_PREFIX):
                self._telemetry.metrics.refused(error.reason)
            raise


def _status(context: Context, elapsed_s: float) -> str:
    """The name of the status that a call ended with."""
    code: grpc.StatusCode | None = context.code()  # None unless we set one
    if code is not None:
        return str(code.name)
    if context.done():
        return "OK"
    return "DEADLINE_EXCEEDED" if _deadline_passed(context, elapsed_s) else "CANCELLED"


def _cause_of_call(context: Context, elapsed_s: float) -> Cause:
    """Why a call ended a generation whose stream was sound."""
    code: grpc.StatusCode | None = context.code()
    if code is not None:
        return Cause.INTERNAL if code.name == "INTERNAL" else Cause.BATCH
    return Cause.DEADLINE if _deadline_passed(context, elapsed_s) else Cause.CLIENT


def _cause_of(error: LdaError) -> Cause | None:
    """None for what was not taken on in the first place."""
    if isinstance(error, Refused | RequestError):
        return None
    return CAUSES.get(type(error), Cause.INTERNAL)


def _deadline_passed(context: Context, elapsed_s: float) -> bool:
    remaining_s: float | None = context.time_remaining()
    return remaining_s is not None and remaining_s <= DEADLINE_SLACK_S + DEADLINE_ROUNDING * (elapsed_s + remaining_s)


def _stop(server: WSGIServer, thread: Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
