"""The order of a stream, through the front door: real client, real server, worker process with a fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import grpc
import pytest
import pytest_asyncio
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from server_harness import failure, messages, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Grammar:
    """started (delta)* with one finished per sequence, then OK; any other end is not OK."""

    def __init__(self, *roles, num_sequences=1):
        self.open = {(role, index) for role in roles or (pb.MODEL_ROLE_AMPLIFIED,) for index in range(num_sequences)}
        self.started = False

    def feed(self, message):
        event = message.WhichOneof("event")
        assert self.started != (event == "started"), "started comes first, once"
        self.started = True
        if event != "started":
            body = getattr(message, event)
            assert (body.role, body.sequence_index) in self.open, "nothing follows finished"
            if event == "finished":
                self.open.remove((body.role, body.sequence_index))

    def end(self, code):
        assert (code is grpc.StatusCode.OK) == (self.started and not self.open)

    async def check(self, call):
        """Read the whole call against the grammar; its status code."""
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in messages(call):
                self.feed(message)
        self.end(await call.code())
        return (await call.code()).name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served():
    """A server and a client for the whole file."""
    async with serving() as both:
        yield both


@pytest.fixture
def client(served):
    """The client alone."""
    return served[1]


async def test_normal_end(client):
    """Three sequences: started, deltas, three ends, OK."""
    assert await Grammar(num_sequences=3).check(client.generate(num_sequences=3)) == "OK"


async def test_both_roles(client):
    """GenerateBoth sends sequences of either model, and none of the mixture."""
    call = client.lda.GenerateBoth(pb.GenerateBothRequest(prompt=pb.Prompt(text="hi"), num_sequences=2), timeout=30)
    grammar = Grammar(pb.MODEL_ROLE_AFTER, pb.MODEL_ROLE_BEFORE, num_sequences=2)
    assert await grammar.check(call) == "OK"


async def test_client_cancel_frees_the_engine(client):
    """A cancelled call ends CANCELLED, and the engine is told."""
    call, grammar = client.generate("hold"), Grammar()
    first = await call.read()
    grammar.feed(first)
    call.cancel()
    assert await grammar.check(call) == "CANCELLED"
    await client.engine_cancelled(first.started.generation_id)


async def test_client_deadline_frees_the_engine(client):
    """A call past its deadline ends DEADLINE_EXCEEDED, and the engine is told."""
    call, grammar = client.generate("hold", timeout=0.5), Grammar()
    first = await call.read()
    grammar.feed(first)
    assert await grammar.check(call) == "DEADLINE_EXCEEDED"
    await client.engine_cancelled(first.started.generation_id)


async def test_worker_killed(client, served):
    """Kill -9 of the worker ends every stream at once with WORKER_DIED; health follows; a fresh worker serves."""
    server, _ = served
    watch = client.watch()
    assert (await watch.read()).status == 1
    call, grammar = client.generate("hold"), Grammar()
    grammar.feed(await call.read())
    os.kill(server.worker.pid, signal.SIGKILL)
    assert await grammar.check(call) == "UNAVAILABLE"
    assert (await failure(call)).reason == "WORKER_DIED"
    assert [(await watch.read()).status for _ in range(2)] == [2, 1], "NOT_SERVING, then SERVING"
    watch.cancel()
    assert await Grammar().check(client.generate()) == "OK"


async def test_started_says_what_is_in_force(client):
    """Started echoes the ids, the seed (drawn when unset), alpha, prompt length and the pair's identity."""
    call = client.generate("hello", alpha=2.5, sampling=pb.Sampling(seed=7), metadata=(("x-request-id", "mine"),))
    started = (await call.read()).started
    assert (started.seed, started.alpha, started.prompt_token_count, started.pair_fingerprint) == (7, 2.5, 5, "f1")
    headers = dict(await call.initial_metadata())
    assert headers["x-generation-id"] == started.generation_id
    assert headers["x-request-id"] == "mine"
    async for _ in messages(call):
        pass
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
    seeds = {(await client.generate().read()).started.seed for _ in range(2)}
    assert len(seeds) == 2, "two calls draw two seeds"


async def test_refusal_sends_no_headers(client):
    """What the engine refuses is refused before headers, so that a mesh may retry it."""
    refused = await failure(client.generate("full"))
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert refused.metadata == {"depth": "4", "capacity": "4"}
    assert refused.details["RetryInfo"].retry_delay.seconds == 2
    assert "x-generation-id" not in refused.initial


async def test_one_token_per_event_unless_asked(client):
    """Unset options send a message per token; `max_tokens_per_event` sends fewer with the same text."""
    assert await sizes(client.generate(tokens=5)) == ([1] * 5, "abcde")
    options = pb.OutputOptions(max_tokens_per_event=2)
    assert await sizes(client.generate(tokens=5, output=options)) == ([2, 2, 1], "abcde")


async def test_event_delay_bounds_the_wait(client):
    """A token does not wait for company longer than `max_event_delay`."""
    options = pb.OutputOptions(max_tokens_per_event=256)
    options.max_event_delay.FromMilliseconds(0)
    assert await sizes(client.generate(tokens=3, output=options)) == ([1] * 3, "abc")


async def sizes(call):
    """Tokens in each message, and the text of all."""
    deltas = [message.delta async for message in messages(call) if message.HasField("delta")]
    return [len(delta.tokens) for delta in deltas], "".join(delta.text for delta in deltas)


async def test_finished_carries_usage_and_alpha_scores(client):
    """The end of a sequence says why, what it cost, and its score at each alpha asked for."""
    output = pb.OutputOptions(score_alphas=[0, 2])
    finished = [message async for message in client.generate(tokens=2, output=output)][-1].finished
    assert finished.reason == pb.FINISH_REASON_MAX_TOKENS
    assert (finished.usage.prompt_token_count, finished.usage.output_token_count) == (2, 2)
    assert [(each.alpha, each.logprob) for each in finished.alpha_scores] == [(0, 0), (2, -2)]


async def test_score_streams_blocks(client):
    """Score answers in blocks that cover the continuation; the last one has the scores."""
    request = pb.ScoreRequest(prompt=pb.Prompt(text="p"), continuation=pb.Prompt(text="abcdef"), score_alphas=[1])
    blocks = [block async for block in client.lda.Score(request, timeout=30)]
    assert [block.offset for block in blocks] == [0, 4]
    assert bytes(token.id for block in blocks for token in block.tokens) == b"abcdef"
    assert [len(block.alpha_scores) for block in blocks] == [0, 1]


async def test_chat_and_token_prompts(client):
    """A prompt may be a conversation or token ids."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hey")])
    for prompt in (pb.Prompt(chat=chat), pb.Prompt(tokens=pb.TokenIds(ids=[1, 2, 3]))):
        call = client.lda.GenerateLDA(pb.GenerateLDARequest(prompt=prompt), timeout=30)
        assert (await call.read()).started.prompt_token_count == 3
        assert await sizes(call) == ([1] * 80, ("abcdefghijklmnopqrstuvwxyz" * 4)[:80])


async def test_pair_and_compatibility_reports(client):
    """GetModelPair reports the defaults that requests get; TokenizerCompat the finding."""
    pair = await client.lda.GetModelPair(pb.GetModelPairRequest(), timeout=30)
    assert (pair.pair_fingerprint, pair.defaults.alpha, pair.defaults.stopping.max_new_tokens) == ("f1", 1.0, 80)
    assert not pair.defaults.sampling.HasField("seed")
    report = await client.lda.TokenizerCompat(pb.TokenizerCompatRequest(), timeout=30)
    assert report.compatible
    assert report.verdict == "The two vocabularies are equal."
