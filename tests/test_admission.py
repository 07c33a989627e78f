"""Who comes in: limits, forecasts and places, counted exactly whatever happens to a request."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Places
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, rule
from lda_client.gen.lda.v1 import admin_service_pb2 as admin
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from server_harness import failure, messages, outcome, serving

from lda_service.config import AdmissionConfig, EngineConfig
from lda_service.engine.request import Branch, GenerationRequest, Role, Stopping
from lda_service.errors import CallerLimit, DeadlineTooShort, QueueFull
from lda_service.rpc.admission import Admission, EndRate

ENGINE = EngineConfig(max_running_sequences=4, max_queued_requests=5)


def request(sequences=1, prompt=2, new=3):
    branch = (Branch(Role.AMPLIFIED, 1.0),)
    return GenerationRequest("g", (1,) * prompt, branch, sequences, stopping=Stopping(max_new_tokens=new))


def test_queue_limits_count_requests_and_tokens():
    """As many requests, and as many of their tokens, wait as may wait; one request of any size may if none waits."""
    admission = Admission(ENGINE, AdmissionConfig(max_queued_tokens=20))
    big = admission.admit(request(new=1000), "a", None, 0.0)
    with pytest.raises(QueueFull, match="1002 tokens wait, and 20 may"):
        admission.admit(request(), "a", None, 0.0)
    admission.started(big, 1.0)
    waiting = [admission.admit(request(prompt=1, new=1), "a", None, 1.0) for _ in range(5)]
    with pytest.raises(QueueFull, match="5 requests wait, and 5 may") as full:
        admission.admit(request(), "a", None, 1.0)
    assert full.value.metadata == {"depth": "5", "capacity": "5"}
    admission.close(waiting[0], 1.0)
    admission.admit(request(), "a", None, 1.0)


def test_a_caller_may_have_so_much_open():
    """The limit is each caller's own, and a closed request gives its place back."""
    admission = Admission(ENGINE, AdmissionConfig(max_requests_per_caller=2))
    first, _ = (admission.admit(request(), "a", None, 0.0) for _ in range(2))
    with pytest.raises(CallerLimit):
        admission.admit(request(), "a", None, 0.0)
    admission.admit(request(), "b", None, 0.0)
    admission.close(first, 1.0)
    admission.admit(request(), "a", None, 1.0)


def test_forecast_of_the_wait():
    """Unknown before anything was seen, 0 while a row is free, else sequences ahead over the measured rate of ends."""
    admission = Admission(EngineConfig(max_running_sequences=4), AdmissionConfig())
    tickets = [admission.admit(request(), "a", 0.001, 0.0) for _ in range(4)]
    assert admission.expected_wait_s() is None
    for ticket in tickets:
        admission.started(ticket, 0.0)
    for ticket in tickets[:2]:
        admission.ended(ticket, 1.0)
        admission.close(ticket, 1.0)
    assert admission.expected_wait_s() == 0
    for _ in range(5):
        admission.admit(request(), "a", None, 1.0)
    # Seven sequences are here and four may run: four ends, at two a second.
    assert admission.expected_wait_s() == pytest.approx(2.0, rel=0.05)
    with pytest.raises(DeadlineTooShort) as short:
        admission.admit(request(), "a", 1.0, 1.0)
    assert short.value.metadata == {"expected_wait_ms": "2000", "remaining_ms": "1000"}


def test_a_cancelled_sequence_frees_its_row_too():
    """Callers that cancel make room: the forecast counts their rows, but no more of them than can run."""
    admission = Admission(EngineConfig(max_running_sequences=4), AdmissionConfig())
    cancelled, waiting = (admission.admit(request(sequences=8), "a", None, 0.0) for _ in range(2))
    admission.started(cancelled, 0.0)
    admission.close(waiting, 2.0)
    admission.admit(request(sequences=4), "a", None, 2.0)
    assert admission.expected_wait_s() is None
    admission.close(cancelled, 2.0)
    # Four rows in two seconds, and one more must become free.
    assert admission.expected_wait_s() == pytest.approx(0.5, rel=0.05)


def test_idle_time_does_not_slow_the_forecast():
    """The rate of ends is per second of busy time: a night without work changes nothing."""
    rate = EndRate()
    for second in range(10):
        rate.follow(second, busy=True)
        rate.freed(1)
    rate.follow(10.0, busy=False)
    before = rate.per_s
    rate.follow(10_000.0, busy=True)
    assert rate.per_s == before


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=5))
def test_the_wait_grows_with_what_is_ahead(ahead):
    """One more request ahead never makes the forecast shorter."""
    admission = Admission(ENGINE, AdmissionConfig(max_queued_tokens=0))
    done = admission.admit(request(), "a", None, 0.0)
    admission.started(done, 0.0)
    admission.ended(done, 1.0)
    waits = [admission.expected_wait_s()]
    for sequences, new in ahead:
        admission.admit(request(sequences, new=new), "a", None, 1.0)
        waits.append(admission.expected_wait_s())
    assert waits == sorted(waits)


class Course(RuleBasedStateMachine):
    """Any order of admissions, starts, ends and closes."""

    places = Places("places")

    def __init__(self):
        super().__init__()
        self.admission = Admission(ENGINE, AdmissionConfig(max_queued_tokens=60, max_requests_per_caller=3))
        self.now, self.open = 0.0, {}

    @rule(target=places, sequences=st.integers(1, 5), caller=st.sampled_from("ab"), remaining=st.floats(0.1, 9))
    def admit(self, sequences, caller, remaining):
        self.now += 0.1
        try:
            ticket = self.admission.admit(request(sequences), caller, remaining, self.now)
        except (QueueFull, CallerLimit, DeadlineTooShort):
            return None
        self.open[ticket] = [True, sequences]
        return ticket

    @rule(ticket=places)
    def start(self, ticket):
        if ticket in self.open:
            self.admission.started(ticket, self.now)
            self.open[ticket][0] = False

    @rule(ticket=places)
    def end(self, ticket):
        if ticket in self.open and self.open[ticket][1]:
            self.admission.ended(ticket, self.now)
            self.open[ticket][1] -= 1

    @rule(ticket=consumes(places))
    def close(self, ticket):
        if ticket is not None:
            self.admission.close(ticket, self.now)
            self.admission.close(ticket, self.now)
            self.open.pop(ticket, None)

    @invariant()
    def counts_are_those_of_the_open_ones(self):
        """What waits, what is open and how much is ahead follow from the open requests alone."""
        waiting = [ticket for ticket, (waits, _) in self.open.items() if waits]
        assert self.admission.open_requests == len(self.open)
        assert self.admission.waiting_requests == len(waiting) <= ENGINE.max_queued_requests
        assert self.admission.waiting_tokens == sum(ticket.tokens for ticket in waiting)
        ahead = sum(sequences for _, sequences in self.open.values())
        assert (self.admission.expected_wait_s() == 0) == (ahead < ENGINE.max_running_sequences)


TestCourse = Course.TestCase


async def started(call):
    """Wait until the call has left the queue."""
    assert (await call.read()).HasField("started")


async def until_waiting(client, count):
    """Wait until that many requests wait, by asking the server."""
    while (await client.load()).waiting_requests != count:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_refusals_come_before_headers_and_say_when_to_retry():
    """A full queue, a greedy caller and a short deadline are refused with their reason before response headers."""
    engine = EngineConfig(max_running_sequences=1, max_queued_requests=1)
    async with serving(engine=engine) as (_, client):
        running = client.generate("hold")
        await started(running)
        waiting = client.generate()
        await until_waiting(client, 1)
        refused = await failure(client.generate())
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert refused.metadata == {"depth": "1", "capacity": "1"}
        assert refused.initial == {}
        assert {"RetryInfo", "QuotaFailure"} <= set(refused.details)
        running.cancel()
        assert await outcome(waiting) == "OK"
    async with serving(admission=AdmissionConfig(max_requests_per_caller=1)) as (_, client):
        running = client.generate("hold")
        await started(running)
        refused = await failure(client.generate())
        assert (refused.code, refused.reason, refused.initial) == ("RESOURCE_EXHAUSTED", "CALLER_LIMIT", {})
        running.cancel()


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once():
    """With a measured rate of ends, a call whose time is too short for the queue is refused long before that."""
    engine = EngineConfig(max_running_sequences=1)
    async with serving(engine=engine) as (_, client):
        assert await outcome(client.generate(tokens=600)) == "OK"  # more than half a second: a rate is known
        running = client.generate("hold")
        await started(running)
        queue = [client.generate("hold", timeout=3600) for _ in range(60)]
        await until_waiting(client, 60)
        loop = asyncio.get_running_loop()
        began = loop.time()
        refused = await failure(client.generate(timeout=20))
        assert (refused.code, refused.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT")
        assert int(refused.metadata["expected_wait_ms"]) > int(refused.metadata["remaining_ms"]) > 19_000
        assert loop.time() - began < 5
        for call in (running, *queue):
            call.cancel()


async def test_load_tells_what_is_open_and_returns_to_zero():
    """GetLoad counts running, waiting and open requests, and all of it is given back after cancels and ends."""
    engine = EngineConfig(max_running_sequences=2)
    async with serving(engine=engine) as (_, client):
        running = client.generate("hold", num_sequences=2)
        await started(running)
        waiting = [client.generate("hold", tokens=10) for _ in range(3)]
        await until_waiting(client, 3)
        load = await client.load()
        assert (load.open_requests, load.waiting_tokens, load.max_running_sequences) == (4, 3 * 14, 2)
        assert load.accepts_work
        for call in (running, *waiting):
            call.cancel()
        while (await client.load()).open_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        load = await client.load()
        assert (load.waiting_requests, load.waiting_tokens, load.expected_wait.ToNanoseconds()) == (0, 0, 0)


async def test_an_operator_lists_and_ends_generations():
    """ListGenerations shows what is open; AbortGeneration ends one with ABORTED, and an unknown one is NOT_FOUND."""
    async with serving() as (_, client):
        call = client.generate("hold", num_sequences=2)
        first = await call.read()
        listed = (await client.admin.ListGenerations(admin.ListGenerationsRequest(), timeout=30)).generations
        assert [(each.generation_id, each.admitted, each.sequence_count) for each in listed] == [
            (first.started.generation_id, True, 2)
        ]
        target = admin.AbortGenerationRequest(generation_id=first.started.generation_id)
        await client.admin.AbortGeneration(target, timeout=30)
        ended = await failure(call)
        assert (ended.code, ended.reason) == ("ABORTED", "ABORTED")
        await client.engine_cancelled(first.started.generation_id)
        gone = await failure(client.admin.AbortGeneration(target, timeout=30))
        assert (gone.code, gone.reason) == ("NOT_FOUND", "UNKNOWN_GENERATION")


async def test_admin_and_reflection_can_be_turned_off():
    """Without them the methods are not there."""
    async with serving(has_admin=False, has_reflection=False) as (_, client):
        call = client.admin.ListGenerations(admin.ListGenerationsRequest(), timeout=30)
        assert await outcome(call) == "UNIMPLEMENTED"
        info = client.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await info(iter([b""]), timeout=30).read()
        assert missing.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_stuck_worker_is_replaced():
    """A step that never ends: streams fail UNAVAILABLE, health says so, and a fresh worker serves."""
    async with serving(worker_timeout_s=0.6) as (server, client):
        watch = client.watch()
        assert (await watch.read()).status == 1
        pid = server.worker.pid
        neighbour, stuck = client.generate("hold"), client.generate("stuck")
        ended = [await failure(each) for each in (neighbour, stuck)]
        assert [(each.code, each.reason) for each in ended] == [("UNAVAILABLE", "WORKER_DIED")] * 2
        assert [(await watch.read()).status for _ in range(2)] == [2, 1]
        assert server.worker.pid != pid
        assert await outcome(client.generate()) == "OK"


async def test_a_busy_worker_is_not_taken_for_a_stuck_one():
    """Steps that are shorter than the time allowed are signs of life, however long the generation."""
    async with serving(worker_timeout_s=0.6) as (server, client):
        pid = server.worker.pid
        call = client.generate("clock", tokens=45)
        assert await outcome(call) == "OK"
        assert server.worker.pid == pid


async def test_a_pause_of_the_server_is_not_the_workers():
    """A server that stood still for longer than a worker may be silent finds its worker as it left it."""
    async with serving(worker_timeout_s=0.6) as (server, client):
        pid = server.worker.pid
        time.sleep(1.5)  # noqa: ASYNC251 - the whole process stands still, as after SIGSTOP
        assert await outcome(client.generate("clock", tokens=45)) == "OK"
        assert server.worker.pid == pid


async def test_a_reader_that_falls_behind_gets_its_tokens_together():
    """What waits for a slow reader is merged by sequence, in order, and nothing of it is lost."""
    async with serving() as (_, client):
        # The transport takes some six megabytes before anything waits in the server.
        call = client.generate("broad", num_sequences=3, tokens=3000)
        await started(call)
        load = await client.load()
        while load.running_sequences:
            load = await client.load()
        texts, counts, most = {}, {}, 0
        async for message in messages(call):
            if message.HasField("delta"):
                index = message.delta.sequence_index
                texts[index] = texts.get(index, 0) + len(message.delta.text)
                counts[index] = counts.get(index, 0) + len(message.delta.tokens)
                most = max(most, len(message.delta.tokens))
        assert (await call.code()).name == "OK"
        assert set(counts.values()) == {3000}
        assert set(texts.values()) == {3000 * 1024}
        assert most > 1


async def test_score_and_both_are_counted_too():
    """Every kind of request takes a place and gives it back."""
    async with serving() as (server, client):
        score = pb.ScoreRequest(prompt=pb.Prompt(text="p"), continuation=pb.Prompt(text="abcdef"))
        both = pb.GenerateBothRequest(prompt=pb.Prompt(text="hi"), num_sequences=2)
        both.stopping.max_new_tokens = 3
        assert await outcome(client.lda.Score(score, timeout=30)) == "OK"
        assert await outcome(client.lda.GenerateBoth(both, timeout=30)) == "OK"
        assert server.generations.admission.open_requests == 0
        assert server.generations.open == {}
