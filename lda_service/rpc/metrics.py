"""The figures that Prometheus reads: names, units and buckets.

Is told what happened; knows neither gRPC, nor requests, nor clocks. Names and units are vLLM's with our prefix where
vLLM has the figure. No label holds what a caller may choose freely.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from lda_service.engine.request import FinishReason, Load
from lda_service.errors import AccessError, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import Metric

REFUSALS = tuple(kind.reason for kind in Refused.__subclasses__())
ACCESS_REFUSALS = tuple(kind.reason for kind in AccessError.__subclasses__())
SCORED = "scored"  # the end of a scored text, which was not generated
FINISHED_REASONS = (*(reason.value for reason in FinishReason), SCORED)

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, *REQUEST_S[6:])
ALPHAS = (-10.0, -5.0, -2.0, -1.0, -0.5, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
KL_NATS = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Cause(Enum):
    """Why a generation was ended before its end."""

    CLIENT = "client"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"
    OPERATOR = "operator"
    SLOW_CONSUMER = "slow_consumer"
    WORKER_DIED = "worker_died"
    OUT_OF_MEMORY = "out_of_memory"
    BATCH = "batch"  # another prompt of the same call failed
    INTERNAL = "internal"


class TokenTally(Collector):
    """What is counted for every message of a stream: tokens, and the time between two messages.

    The library's own counters take a lock for each addition and walk the buckets, which costs more than all else that
    is done for a message here. Only the event loop adds; a scrape reads from another thread.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._gaps = [0] * (len(BETWEEN_TOKENS_S) + 1)  # by bucket, not summed up
        self._gap_sum_s = 0.0

    def add(self, tokens: int) -> None:
        """Tokens of a sequence came."""
        self._tokens += tokens

    def add_gap(self, gap_s: float) -> None:
        """They came so long after those before them."""
        self._gaps[bisect_left(BETWEEN_TOKENS_S, gap_s)] += 1
        self._gap_sum_s += gap_s

    def collect(self) -> Iterable[Metric]:
        """For a scrape."""
        yield CounterMetricFamily("lda_generation_tokens", "Tokens generated.", self._tokens)
        bounds = [*map(str, BETWEEN_TOKENS_S), "+Inf"]
        yield HistogramMetricFamily(
            "lda_inter_token_latency_seconds",
            "Between two events with tokens of one sequence.",
            buckets=list(zip(bounds, accumulate(self._gaps), strict=True)),
            sum_value=self._gap_sum_s,
        )


class Metrics:
    """All figures of one server, in a registry of its own. Attributes are for reading; methods say what happened."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.tally = TokenTally()
        self.registry.register(self.tally)
        self._load = Load()
        self._add_gauges()
        self._add_latencies()
        self._add_counters()
        self._add_amplification()
        self._add_calls()

    def _add_gauges(self) -> None:
        self.requests_running = self._gauge("lda_num_requests_running", "Requests admitted and not ended.")
        self.requests_waiting = self._gauge("lda_num_requests_waiting", "Requests in the queue.")
        self.sequences_running = self._gauge("lda_num_sequences_running", "Sequences in the decoding batch.")
        self.kv_cache_usage = self._gauge("lda_kv_cache_usage_perc", "Share of KV cache pages in use, 0 to 1.")
        self.worker_up = self._gauge("lda_worker_up", "1 while the process that owns the models serves, else 0.")

    def _add_latencies(self) -> None:
        self.first_token_s = self._seconds(
            "lda_time_to_first_token", "From submission to the first token of a request.", FIRST_TOKEN_S
        )
        self.e2e_s = self._seconds(
            "lda_e2e_request_latency", "From submission to the end, of requests that came to their end.", REQUEST_S
        )
        self.queue_s = self._seconds("lda_request_queue_time", "From submission to admission.", REQUEST_S)
        self.prefill_s = self._seconds("lda_request_prefill_time", "From admission to the first token.", REQUEST_S)
        self.decode_s = self._seconds("lda_request_decode_time", "From the first token to the last.", REQUEST_S)

    def _add_counters(self) -> None:
        self.prompt_tokens = self._counter("lda_prompt_tokens", "Tokens of admitted prompts and scored texts.")
        self.success = self._counter(
            "lda_request_success", "Sequences that ended by themselves.", finished_reason=FINISHED_REASONS
        )
        self.prefix_hits = self._counter(
            "lda_prefix_cache_hits", "Prompt positions that a model found in its cache, both models counted."
        )
        self.preemptions = self._counter("lda_num_preemptions", "Sequences put back because the KV cache was full.")
        self.cancelled = self._counter(
            "lda_cancelled", "Requests ended before their end.", cause=[cause.value for cause in Cause]
        )
        self.rejected = self._counter("lda_admission_rejected", "Calls refused for now.", reason=REFUSALS)
        self.access_refused = self._counter(
            "lda_access_refused", "Calls whose caller is not known or not allowed.", reason=ACCESS_REFUSALS
        )
        self.slow_consumers = self._counter("lda_slow_consumers", "Requests ended because the caller read too slowly.")
        self.worker_restarts = self._counter("lda_worker_restarts", "Times a dead or stuck worker was replaced.")

    def _add_amplification(self) -> None:
        self.alpha = Histogram("lda_alpha", "Alphas asked for.", buckets=ALPHAS, registry=self.registry)
        self.kl_nats = Histogram(
            "lda_after_before_kl_nats",
            "Kullback-Leibler divergence of after from before, of tokens with diagnostics.",
            buckets=KL_NATS,
            registry=self.registry,
        )

    def _add_calls(self) -> None:
        self.calls = Counter(
            "grpc_server_handled",
            "Calls that ended, by method and status.",
            ("grpc_method", "grpc_status"),
            registry=self.registry,
        )
        self.call_s = Histogram(
            "grpc_server_call_duration_seconds",
            "From the first byte of a call to its end.",
            ("grpc_method",),
            buckets=CALL_S,
            registry=self.registry,
        )

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self.registry)

    def _seconds(self, name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"{name}_seconds", help_text, buckets=tuple(buckets), registry=self.registry)

    def _counter(self, name: str, help_text: str, **labels: Iterable[str]) -> Counter:
        """A counter with at most one label, whose values are known and start at 0."""
        counter = Counter(name, help_text, tuple(labels), registry=self.registry)
        for values in labels.values():
            for value in values:
                counter.labels(value)
        return counter

    def follow(self, *, open_requests: Callable[[], int], waiting_requests: Callable[[], int]) -> None:
        """Where to look, at each scrape, for what is open."""
        self.requests_running.set_function(lambda: open_requests() - waiting_requests())
        self.requests_waiting.set_function(waiting_requests)
        self.sequences_running.set_function(lambda: self._load.running_sequences)
        self.kv_cache_usage.set_function(lambda: _usage(self._load))

    def load_changed(self, load: Load) -> None:
        """The engine said how busy it is. Its counts begin again at 0 with each worker; ours go on."""
        reused = load.reused_prompt_tokens - self._load.reused_prompt_tokens
        preempted = load.preemptions - self._load.preemptions
        self._load = load
        if reused > 0:
            self.prefix_hits.inc(reused)
        if preempted > 0:
            self.preemptions.inc(preempted)

    def submitted(self, alphas: Iterable[float]) -> None:
        """A request went to the engine."""
        for alpha in alphas:
            self.alpha.observe(alpha)

    def admitted(self, queue_s: float, prompt_tokens: int) -> None:
        """A request left the queue."""
        self.queue_s.observe(queue_s)
        self.prompt_tokens.inc(prompt_tokens)

    def first_token(self, since_submission_s: float, since_admission_s: float) -> None:
        """The first token of a request came."""
        self.first_token_s.observe(since_submission_s)
        self.prefill_s.observe(since_admission_s)

    def diverged(self, kl_nats: float) -> None:
        """A token came with diagnostics."""
        if math.isfinite(kl_nats):  # one infinity would make the sum useless for good
            self.kl_nats.observe(kl_nats)

    def finished(self, e2e_s: float, decode_s: float | None) -> None:
        """A request came to its end; a scored text has no decoding."""
        self.e2e_s.observe(e2e_s)
        if decode_s is not None:
            self.decode_s.observe(decode_s)

    def sequence_finished(self, reason: str) -> None:
        """A sequence ended by itself."""
        self.success.labels(reason).inc()

    def ended_early(self, cause: Cause) -> None:
        """A request was ended before its end."""
        self.cancelled.labels(cause.value).inc()
        if cause is Cause.SLOW_CONSUMER:
            self.slow_consumers.inc()

    def refused(self, reason: str) -> None:
        """A call was refused for now."""
        self.rejected.labels(reason).inc()

    def access_was_refused(self, reason: str) -> None:
        """A caller was not let in."""
        self.access_refused.labels(reason).inc()

    def call_ended(self, method: str, status: str, duration_s: float) -> None:
        """A call ended; `method` is one that exists."""
        self.calls.labels(method, status).inc()
        self.call_s.labels(method).observe(duration_s)


def _usage(load: Load) -> float:
    return 1.0 - load.pages_free / load.pages_total if load.pages_total else 0.0
