"""What the server tells of itself: the metrics as Prometheus reads them, the spans of calls, the lines of the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
import yaml
from click.testing import CliRunner
from grpc_health.v1 import health_pb2
from lda_client.gen.lda.v1 import admin_service_pb2 as admin_pb
from lda_client.gen.lda.v1 import admin_service_pb2_grpc, completion_service_pb2_grpc
from lda_client.gen.lda.v1 import completion_service_pb2 as completion_pb
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Client, failure, make_server, outcome, serving

from lda_service import cli
from lda_service.config import TelemetryConfig
from lda_service.errors import ConfigError, PortInUse
from lda_service.rpc import tracing
from lda_service.rpc.metrics import Cause, Metrics
from lda_service.rpc.tracing import Tracing, open_tracing

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
HARNESS = Path(__file__).with_name("server_harness.py")
GENERATE = "lda.v1.LdaService/GenerateLDA"
TRACE_ID, PARENT_ID = "ab" * 16, "cd" * 8
TRACEPARENT = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
MARKER = "xyzzy-marker"
METERED = TelemetryConfig(metrics_port=0)


@asynccontextmanager
async def metered(**options):
    """A server with an endpoint for metrics, and a client of it."""
    async with serving(telemetry=METERED, **options) as (server, client):
        yield server, client


async def scrape(server):
    """Every figure of the endpoint, by its name and the values of its labels."""
    return parsed(await asyncio.to_thread(fetch, server.telemetry.metrics_url))


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def parsed(text):
    families = text_string_to_metric_families(text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


async def until(server, *figure, value=1):
    """Scrape until a figure has a value; all figures of that scrape."""
    async with asyncio.timeout(20):
        while (figures := await scrape(server)).get(figure) != value:
            pass
    return figures


def counts(figures, before):
    """What moved, apart from buckets, sums, gauges and the process."""
    kinds = ("_total", "_count")
    return {
        name: value - before.get(name, 0)
        for name, value in figures.items()
        if name[0].endswith(kinds) and not name[0].startswith("process_") and value != before.get(name, 0)
    }


async def test_a_stream_moves_exactly_its_metrics():
    """One stream to its end: tokens, latencies, alpha and the call are counted once, and nothing else is."""
    async with metered() as (server, client):
        before = await scrape(server)
        assert await outcome(client.generate("hello", alpha=2.0, tokens=4, num_sequences=2)) == "OK"
        after = await until(server, "grpc_server_handled_total", GENERATE, "OK")
        assert counts(after, before) == {
            ("lda_prompt_tokens_total",): 5,
            ("lda_generation_tokens_total",): 8,
            ("lda_request_success_total", "max_tokens"): 2,
            ("lda_time_to_first_token_seconds_count",): 1,
            ("lda_inter_token_latency_seconds_count",): 6,
            ("lda_e2e_request_latency_seconds_count",): 1,
            ("lda_request_queue_time_seconds_count",): 1,
            ("lda_request_prefill_time_seconds_count",): 1,
            ("lda_request_decode_time_seconds_count",): 1,
            ("lda_alpha_count",): 1,
            ("grpc_server_handled_total", GENERATE, "OK"): 1,
            ("grpc_server_call_duration_seconds_count", GENERATE): 1,
        }
        assert after["lda_alpha_bucket", "2.0"] - after["lda_alpha_bucket", "1.5"] == 1
        parts = ("lda_request_queue_time", "lda_request_prefill_time", "lda_request_decode_time")
        whole_s = after["lda_e2e_request_latency_seconds_sum",]
        assert sum(after[f"{part}_seconds_sum",] for part in parts) == pytest.approx(whole_s)
        assert after["lda_num_requests_running",] == after["lda_num_sequences_running",] == 0


async def test_divergence_is_counted_where_diagnostics_were_asked_for():
    """The divergence of both models comes from tokens with diagnostics and from scored texts."""
    async with metered() as (server, client):
        output = pb.OutputOptions(diagnostics=True)
        assert await outcome(client.generate(tokens=5, output=output)) == "OK"
        text = pb.Prompt(text="abcdefg")
        score = pb.ScoreRequest(prompt=pb.Prompt(text="p"), continuation=text, alpha=-3)
        assert await outcome(client.lda.Score(score, timeout=30)) == "OK"
        figures = await until(server, "lda_request_success_total", "scored")
        assert figures["lda_after_before_kl_nats_count",] == 5 + 7
        assert figures["lda_after_before_kl_nats_sum",] == 12 * 0.25
        assert figures["lda_prompt_tokens_total",] == 2 + 8
        assert (figures["lda_alpha_count",], figures["lda_alpha_bucket", "-2.0"]) == (2, 1)
        assert figures["lda_time_to_first_token_seconds_count",] == 1


async def test_the_two_models_alone_are_no_alpha_of_a_caller():
    """GenerateBoth counts the tokens and ends of both models; its alphas were not asked for."""
    async with metered() as (server, client):
        request = pb.GenerateBothRequest(prompt=pb.Prompt(text="hi"), stopping=pb.Stopping(max_new_tokens=3))
        assert await outcome(client.lda.GenerateBoth(request, timeout=30)) == "OK"
        figures = await until(server, "lda_e2e_request_latency_seconds_count")
        assert figures["lda_generation_tokens_total",] == 6
        assert figures["lda_request_success_total", "max_tokens"] == 2
        assert figures["lda_alpha_count",] == 0


async def test_gauges_follow_what_runs():
    """While a generation is open the gauges show it and its pages; the worker's own counts come through too."""
    async with metered() as (server, client):
        assert await outcome(client.generate("preempted")) == "OK"
        assert await outcome(client.generate("preempted")) == "OK"
        call = client.generate("hold")
        await call.read()
        figures = await until(server, "lda_num_requests_running")
        assert figures["lda_num_sequences_running",] == figures["lda_worker_up",] == 1
        assert figures["lda_kv_cache_usage_perc",] == 1 / 1024
        assert figures["lda_num_preemptions_total",] == 2
        assert figures["lda_prefix_cache_hits_total",] == len("preempted")
        call.cancel()
        await until(server, "lda_num_requests_running", value=0)


async def test_refusals_are_counted_by_reason():
    """Loading, a full queue, draining: each under its reason, all listed from the start; a bad request is none."""
    async with metered(ready=False) as (server, client):
        assert (await failure(client.generate())).reason == "LOADING"
        await server.ready()
        assert (await failure(client.generate("full"))).reason == "QUEUE_FULL"
        assert (await failure(client.generate("long"))).reason == "CONTEXT_EXCEEDED"
        assert (await failure(client.generate(num_sequences=0, alpha=1e9))).reason == "VALIDATION_FAILED"
        figures = await until(server, "grpc_server_handled_total", GENERATE, "INVALID_ARGUMENT", value=2)
        refused = {name[1]: value for name, value in figures.items() if name[0] == "lda_admission_rejected_total"}
        assert {reason for reason, value in refused.items() if value} == {"LOADING", "QUEUE_FULL"}
        assert set(refused) == {"LOADING", "QUEUE_FULL", "DEADLINE_TOO_SHORT", "CALLER_LIMIT", "DRAINING"}
        assert figures["grpc_server_handled_total", GENERATE, "UNAVAILABLE"] == 1
        assert figures["grpc_server_handled_total", GENERATE, "RESOURCE_EXHAUSTED"] == 1
        assert not any(value for name, value in figures.items() if name[0] == "lda_cancelled_total")
        held, watch = client.generate("hold"), client.watch()
        await held.read()
        draining = asyncio.ensure_future(server.drain_and_stop(30.0))
        while (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING:
            pass
        assert (await failure(client.generate())).reason == "DRAINING"
        await until(server, "lda_admission_rejected_total", "DRAINING")
        held.cancel()
        await draining


async def cancelled_by_client(server, client):
    call = client.generate("hold")
    await call.read()
    call.cancel()


async def dropped_while_writing(server, client):
    """The client stops reading until the handler is stuck in a write, then goes away."""
    call = client.generate("wide", tokens=400)
    await call.read()
    async with asyncio.timeout(20):
        tokens = -1
        while (figures := await scrape(server))["lda_generation_tokens_total",] != tokens:
            tokens = figures["lda_generation_tokens_total",]
            await asyncio.sleep(0.05)  # nothing more was written in that time
    call.cancel()


async def past_deadline(server, client):
    assert await outcome(client.generate("hold", timeout=0.3)) == "DEADLINE_EXCEEDED"


async def aborted_by_operator(server, client):
    call = client.generate("hold")
    started = (await call.read()).started
    stub = admin_service_pb2_grpc.AdminServiceStub(client.channel)
    await stub.AbortGeneration(admin_pb.AbortGenerationRequest(generation_id=started.generation_id), timeout=30)
    assert (await failure(call)).reason == "ABORTED"


async def out_of_memory(server, client):
    assert (await failure(client.generate("oom"))).reason == "OUT_OF_MEMORY"


async def engine_fault(server, client):
    assert (await failure(client.generate("crash"))).reason == "INTERNAL"


async def failed_batch(server, client):
    """Of two prompts one cannot be served, so the other is given up."""
    stub = completion_service_pb2_grpc.CompletionServiceStub(client.channel)
    request = completion_pb.CompleteLDABatchRequest(prompts=["hold", "long"], apply_chat_template=False)
    assert (await failure_of_unary(stub.CompleteLDABatch(request, timeout=30))) == "INVALID_ARGUMENT"


async def failure_of_unary(call):
    with suppress(grpc.aio.AioRpcError):
        await call
    return (await call.code()).name


async def worker_killed(server, client):
    call = client.generate("hold")
    await call.read()
    os.kill(server.worker.pid, signal.SIGKILL)
    assert (await failure(call)).reason == "WORKER_DIED"


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (cancelled_by_client, Cause.CLIENT),
        (dropped_while_writing, Cause.CLIENT),
        (past_deadline, Cause.DEADLINE),
        (aborted_by_operator, Cause.OPERATOR),
        (worker_killed, Cause.WORKER_DIED),
        (out_of_memory, Cause.OUT_OF_MEMORY),
        (failed_batch, Cause.BATCH),
        (engine_fault, Cause.INTERNAL),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
async def test_ends_are_counted_once_under_their_cause(end, cause):
    """A generation that is ended early is counted once, under what ended it, and is no success."""
    async with metered() as (server, client):
        await end(server, client)
        figures = await until(server, "lda_cancelled_total", cause.value)
        ended = {name[1]: value for name, value in figures.items() if name[0] == "lda_cancelled_total" and value}
        assert ended == {cause.value: 1}
        assert figures["lda_e2e_request_latency_seconds_count",] == 0


async def test_slow_readers_are_counted():
    """A stalled reader counts as a slow consumer and as a generation ended for that."""
    async with metered(max_buffered_tokens=50) as (server, client):
        stalled = client.generate("wide", tokens=4096)
        await stalled.read()
        neighbour = Client(client.port)
        generation_id = next(iter(server.generations.open))
        await neighbour.engine_cancelled(generation_id)
        await neighbour.channel.close()
        assert (await failure(stalled)).reason == "SLOW_CONSUMER"
        figures = await until(server, "lda_slow_consumers_total")
        assert figures["lda_cancelled_total", "slow_consumer"] == 1


async def test_what_a_shutdown_ends_is_counted():
    """A stream that outlives the grace period is counted under shutdown, and the endpoint is closed at the end."""
    async with metered() as (server, client):
        call = client.generate("hold")
        await call.read()
        url = server.telemetry.metrics_url
        await server.drain_and_stop(0.1)
        assert (await failure(call)).reason == "ABORTED"
        assert server.telemetry.metrics.registry.get_sample_value("lda_cancelled_total", {"cause": "shutdown"}) == 1
        with pytest.raises(urllib.error.URLError):
            await asyncio.to_thread(fetch, url)


async def test_a_replaced_worker_is_seen():
    """While the worker is dead the gauge is 0; its replacement is counted, and what it counts goes on from there."""
    async with metered() as (server, client):
        for _ in range(2):
            assert await outcome(client.generate("preempted")) == "OK"
        await until(server, "lda_num_preemptions_total", value=2)
        os.kill(server.worker.pid, signal.SIGKILL)
        await until(server, "lda_worker_up", value=0)
        await until(server, "lda_worker_up", value=1)
        assert await outcome(client.generate("preempted")) == "OK"
        figures = await until(server, "lda_num_preemptions_total", value=3)
        assert figures["lda_worker_restarts_total",] == 1
        assert figures["lda_prefix_cache_hits_total",] == len("preempted")


async def test_servers_in_one_process_count_apart():
    """Each server has figures of its own, and without a port it serves none."""
    async with metered() as (one, client), metered() as (other, _), serving() as (silent, _):
        assert await outcome(client.generate()) == "OK"
        await until(one, "grpc_server_handled_total", GENERATE, "OK")
        assert (await scrape(other))["lda_generation_tokens_total",] == 0
        assert silent.telemetry.metrics_url is None


async def test_a_taken_metrics_port_is_a_sentence():
    """The port for metrics is found taken before any model is touched, and the error names the remedy."""
    async with metered() as (server, _):
        port = int(server.telemetry.metrics_url.split(":")[2].split("/")[0])
        second = make_server(telemetry=TelemetryConfig(metrics_port=port))
        with pytest.raises(PortInUse, match=r"--metrics-port"):
            await second.start()
        assert second.worker.pid is None


async def test_callers_cannot_make_series():
    """Whatever callers choose, ids, alphas, names of methods, the number of series stays."""
    async with metered() as (server, client):
        unknown = client.channel.unary_unary("/lda.v1.LdaService/Unknown")
        assert await outcome(client.generate()) == "OK"
        assert await failure_of_unary(unknown(b"", timeout=30)) == "UNIMPLEMENTED"
        before = await until(server, "grpc_server_handled_total", "other", "UNIMPLEMENTED")
        for i in range(10):
            assert await outcome(client.generate(f"p{i}", alpha=i / 7, metadata=(("x-request-id", f"r{i}"),))) == "OK"
            method = client.channel.unary_unary(f"/lda.v1.LdaService/Unknown{i}")
            assert await failure_of_unary(method(b"", timeout=30)) == "UNIMPLEMENTED"
        after = await until(server, "grpc_server_handled_total", "other", "UNIMPLEMENTED", value=11)
        assert set(after) == set(before)


def our_names():
    """Names of the figures that this package keeps, without the suffixes of their samples."""
    return {family.name for family in Metrics().registry.collect() if not family.name.startswith("process_")}


def names_in(expressions):
    """Names of our figures in PromQL."""
    names = set(re.findall(r"\b(?:lda|grpc_server)_[a-z0-9_]+", " ".join(expressions)))
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}


def test_the_dashboard_shows_every_metric_and_no_other():
    """Grafana's file can be imported: ids differ, panels do not overlap; queries name our metrics, all of them."""
    dashboard = json.loads((DEPLOY / "grafana" / "lda-service.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert dashboard["schemaVersion"] >= 39
    assert {"title", "uid", "templating", "time", "refresh"} <= set(dashboard)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [cell for panel in dashboard["panels"] for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)
    targets = [target for panel in panels for target in panel["targets"]]
    assert all(panel["title"] and panel["description"] for panel in panels)
    assert all(target["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for target in targets)
    assert names_in(target["expr"] for target in targets) == our_names()


def _cells(grid):
    return [(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])]


def test_alerts_ask_for_metrics_that_exist():
    """Every rule has an expression over our metrics, a time, a severity, and says what to do."""
    rules = [
        rule
        for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert names_in(rule["expr"] for rule in rules) <= our_names()
    for rule in rules:
        assert names_in([rule["expr"]]), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= set(rule["annotations"])
        assert re.fullmatch(r"\d+m", rule["for"])


def test_the_page_lists_every_metric():
    """docs/telemetry.md names what the server keeps, and nothing that it does not."""
    named = re.findall(r"^\| `((?:lda|grpc)_\w+)", (ROOT / "docs" / "telemetry.md").read_text(), re.MULTILINE)
    assert {re.sub(r"_total$", "", name) for name in named} == our_names()


class Spans(InMemorySpanExporter):
    """Says when there is one."""

    def __init__(self):
        super().__init__()
        self.news = asyncio.Event()

    def export(self, spans):
        result = super().export(spans)
        self.news.set()
        return result


@asynccontextmanager
async def traced(**options):
    """A server whose spans are kept, a client of it, and the spans."""
    spans, provider = Spans(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    async with serving(tracing=Tracing(provider), **options) as (server, client):
        yield server, client, spans


async def ended_spans(spans):
    """Spans end with the call on the server, a moment after its client saw it."""
    await asyncio.wait_for(spans.news.wait(), 10)
    return spans.get_finished_spans()


async def test_a_stream_is_one_span_of_its_caller():
    """The span hangs under the caller's, tells the course of the stream, and carries counts and no text."""
    async with traced() as (_, client, spans):
        call = client.generate(MARKER, alpha=1.5, tokens=4, metadata=TRACEPARENT)
        generation_id = (await call.read()).started.generation_id
        assert await outcome(call) == "OK"
        (span,) = await ended_spans(spans)
        assert (span.name, span.kind.name, span.status.status_code.name) == (GENERATE, "SERVER", "UNSET")
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
        assert [event.name for event in span.events] == ["admitted", "first_token", "finished"]
        assert {event.attributes["lda.generation_id"] for event in span.events} == {generation_id}
        assert dict(span.attributes) == {
            "rpc.system.name": "grpc",
            "rpc.method": GENERATE,
            "rpc.response.status_code": "OK",
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "fake",
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.temperature": pytest.approx(0.8),
            "gen_ai.request.top_p": pytest.approx(0.95),
            "gen_ai.usage.input_tokens": len(MARKER),
            "gen_ai.usage.output_tokens": 4,
            "gen_ai.response.finish_reasons": ("max_tokens",),
            "lda.alpha": 1.5,
            "lda.generation_id": generation_id,
        }
        assert MARKER not in span.to_json()


async def test_a_cancelled_stream_is_one_span_too():
    """A stream that its caller leaves ends its span, with the cause and without "finished"; that is no error."""
    async with traced() as (_, client, spans):
        call = client.generate(tokens=4000)
        await call.read()
        await call.read()
        call.cancel()
        (span,) = await ended_spans(spans)
        assert [event.name for event in span.events] == ["admitted", "first_token"]
        assert span.attributes["lda.cancel_cause"] == "client"
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"
        assert span.status.status_code.name == "UNSET"
        assert span.parent is None


@pytest.mark.parametrize(
    ("prompt", "code", "reason", "status"),
    [
        ("crash", "INTERNAL", "INTERNAL", "ERROR"),
        ("exit", "UNAVAILABLE", "WORKER_DIED", "ERROR"),
        ("full", "RESOURCE_EXHAUSTED", "QUEUE_FULL", "ERROR"),
        ("long", "INVALID_ARGUMENT", "CONTEXT_EXCEEDED", "UNSET"),
    ],
)
async def test_failed_calls_mark_their_span(prompt, code, reason, status):
    """A failed call names its status and reason; a mistake of the caller's is no error of the server."""
    async with traced() as (_, client, spans):
        assert await outcome(client.generate(prompt)) == code
        (span,) = await ended_spans(spans)
        assert (span.attributes["rpc.response.status_code"], span.attributes["error.type"]) == (code, reason)
        assert span.status.status_code.name == status


async def test_questions_about_the_server_make_no_spans():
    """Health checks and GetLoad, which are asked all the time, are not traced; a whole answer is, as one span."""
    async with traced() as (_, client, spans):
        assert await client.health_of() == "SERVING"
        await client.lda.GetLoad(pb.GetLoadRequest(), timeout=30)
        stub = completion_service_pb2_grpc.CompletionServiceStub(client.channel)
        await stub.CompleteLDA(completion_pb.CompleteLDARequest(prompt="hi", apply_chat_template=False), timeout=30)
        (span,) = await ended_spans(spans)
        assert span.name == "lda.v1.CompletionService/CompleteLDA"
        assert [event.name for event in span.events] == ["admitted", "first_token", "finished"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans, as the OpenTelemetry collector does."""

    def __init__(self):
        self.spans, self.resources = [], []

    async def Export(self, request, context):  # noqa: N802
        for each in request.resource_spans:
            self.resources.append({pair.key: pair.value.string_value for pair in each.resource.attributes})
            self.spans += [span for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_a_collector_before_the_server_is_gone(monkeypatch):
    """The OTEL_ variables alone turn traces on, and the last spans are sent at shutdown."""
    collector, endpoint = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, endpoint)
    port = endpoint.add_insecure_port("127.0.0.1:0")
    await endpoint.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-service")
    async with serving() as (_, client):
        assert await outcome(client.generate(metadata=TRACEPARENT)) == "OK"
    assert [(span.name, span.trace_id.hex()) for span in collector.spans] == [(GENERATE, TRACE_ID)]
    assert collector.resources[0]["service.name"] == "my-service"
    await endpoint.stop(0)


async def test_a_dead_collector_does_not_hold_up_the_stop(monkeypatch):
    """Spans that nobody takes cost the shutdown a bounded time."""
    monkeypatch.setattr(tracing, "FLUSH_WAIT_S", 0.2)
    released = threading.Event()

    class Stuck(InMemorySpanExporter):
        def shutdown(self):
            released.wait(30)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Stuck()))
    begun = time.perf_counter()
    await Tracing(provider).close()
    assert 0.2 <= time.perf_counter() - begun < 2
    released.set()


@pytest.mark.parametrize(
    ("wanted", "environment", "traced"),
    [
        (None, {}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, False),
        (True, {"OTEL_TRACES_EXPORTER": "console"}, True),
    ],
)
async def test_when_traces_are_on(monkeypatch, wanted, environment, traced):
    """Traces are on when asked for or when the variables name a place for them, and never against the flag."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    opened = open_tracing(wanted)
    assert (opened.begin(GENERATE, ()) is not tracing.NOT_TRACED) is traced
    await opened.close()


def test_traces_without_the_library(monkeypatch, caplog):
    """Without OpenTelemetry, `--traces` is an error with its remedy; variables set for a whole cluster only warn."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=re.escape("lda-service[otel]")):
        open_tracing(True)
    assert open_tracing(None).begin(GENERATE, ()) is tracing.NOT_TRACED
    assert "lda-service[otel]" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match="zipkin"):
        open_tracing(True)


async def logged(calls, environment=None, **telemetry):
    """The log and the output of a server process while `calls(client)` runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HARNESS), "--telemetry", json.dumps(telemetry)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        printed = [(await process.stdout.readline()).decode().split() for _ in range(3)]
        client = Client(int(printed[0][1]))
        await calls(client)
        await client.channel.close()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return stderr.decode(), stdout.decode()


async def some_calls(client):
    """A stream, a cancelled one, a bad request, faults on both sides of the pipe; all prompts hold the marker."""
    metadata = (("x-request-id", "r-1"), *TRACEPARENT)
    assert await outcome(client.generate(MARKER, metadata=metadata)) == "OK"
    assert await outcome(client.generate(f"wide {MARKER}", alpha=1e9)) == "INVALID_ARGUMENT"
    assert await outcome(client.generate(MARKER, tokens=100_000)) == "INVALID_ARGUMENT"
    call = client.generate(MARKER, tokens=4000)
    await call.read()
    call.cancel()
    assert await outcome(client.generate("wide", tokens=2)) == "OK"
    assert await outcome(client.generate("renderer fault")) == "INTERNAL"
    assert await outcome(client.generate("crash")) == "INTERNAL"


async def test_json_lines_carry_their_ids_and_no_prompt():
    """Every line of both processes is one object; those about a generation carry its id; none holds prompt or text."""
    environment = {"OTEL_TRACES_EXPORTER": "console"}
    log, printed = await logged(some_calls, environment, log_format="json", log_level="debug")
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "process", "logger", "message"} <= set(line) for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", line["time"]) for line in lines)
    assert {line["process"] for line in lines} >= {"MainProcess", "worker"}
    about = [line for line in lines if re.search(r"generation g-\w+", line["message"])]
    assert all(line["generation_id"] in line["message"] for line in about)
    submitted = next(line for line in about if line.get("request_id") == "r-1")
    assert (submitted["trace_id"], submitted["caller"]) == (TRACE_ID, "ipv4:127.0.0.1")
    ended = next(line for line in lines if "VALIDATION_FAILED" in line["message"] or "refused" in line["message"])
    assert ended["request_id"] in ended["message"]
    assert any("Traceback" in line.get("exc_info", "") and line["process"] == "worker" for line in lines)
    assert GENERATE in printed
    for text in (MARKER, "w" * 16):
        assert text not in log
        assert text not in printed


async def test_prompts_are_logged_when_asked_for():
    """`--log-prompts` writes each prompt once, at submission, under its id; generated text still never."""

    async def call(client):
        assert await outcome(client.generate(MARKER, metadata=(("x-request-id", "r-1"),))) == "OK"
        assert await outcome(client.generate("wide", tokens=2)) == "OK"

    log, _ = await logged(call, log_format="json", log_prompts=True)
    lines = [json.loads(line) for line in log.splitlines()]
    (asked,) = [line for line in lines if MARKER in json.dumps(line)]
    assert asked["message"] == f"generation {asked['generation_id']} asks: {MARKER}"
    assert asked["request_id"] == "r-1"
    assert "w" * 16 not in log


async def test_text_lines_stay_as_they_are():
    """Without the flag a line is time, level, process, logger and message."""

    async def call(client):
        assert await outcome(client.generate(MARKER)) == "OK"

    log, _ = await logged(call, log_level="info")
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO MainProcess lda_service\.\S+: .+"
    assert all(re.fullmatch(line, each) for each in log.splitlines())
    assert re.search(r"generation g-\w+ complete after", log)
    assert MARKER not in log


def test_flags_reach_the_settings(monkeypatch, caplog):
    """Every flag and variable of telemetry ends in its field, and logging prompts is announced loudly."""
    seen = []

    async def serve(config, _http):
        seen.append(config.telemetry)

    monkeypatch.setattr(cli, "_serve", serve)
    environment = {"METRICS_PORT": "9100", "LOG_FORMAT": "json", "LOG_PROMPTS": "1"}
    arguments = ["serve", "--metrics-host", "0.0.0.0", "--no-traces", "--log-level", "DEBUG"]
    with caplog.at_level(logging.WARNING):
        assert CliRunner().invoke(cli.main, arguments, env=environment).exit_code == 0
    assert seen == [TelemetryConfig("0.0.0.0", 9100, False, "json", "debug", True)]
    assert "PROMPTS ARE LOGGED" in caplog.text
    assert CliRunner().invoke(cli.main, ["serve"]).exit_code == 0
    assert seen[1] == TelemetryConfig()


@pytest.mark.parametrize(("field", "value"), [("log_format", "xml"), ("log_level", "loud")])
def test_impossible_settings(field, value):
    """A setting with an impossible value says which values are possible."""
    with pytest.raises(ConfigError, match="use one of"):
        TelemetryConfig(**{field: value})
