"""The client's streams: the grammar, gathering, and that leaving early frees the server."""

import asyncio
import gc
import threading

import pytest
from lda_client import AsyncLdaClient, LdaClient, StreamBroken, pb
from lda_client.testing import HOLD, FakeServer, delta, finished, started, token

ENDLESS = [started(), delta("a"), HOLD]


@pytest.fixture
def server():
    """A server that answers as it is told."""
    with FakeServer(["Hel", "lo"]) as running:
        yield running


@pytest.fixture
def client(server):
    """A synchronous client of that server."""
    with LdaClient(server.target) as opened:
        yield opened


@pytest.fixture
async def async_client(server):
    """An asyncio client of that server."""
    async with AsyncLdaClient(server.target) as opened:
        yield opened


async def cancelled(server):
    """Whether a call was cancelled on the server, now or soon."""
    return await asyncio.to_thread(server.wait_cancelled)


def test_a_stream_yields_the_events_of_the_contract(server, client):
    """Iteration gives the messages themselves; `started` is remembered."""
    with client.generate("Hi", raw=True) as stream:
        assert stream.started is None
        kinds = [event.WhichOneof("event") for event in stream]
        assert kinds == ["started", "delta", "delta", "finished"]
        assert stream.generation_id == "fake"
        assert stream.started.seed == 7
    assert not server.calls[-1].cancelled.is_set()


async def test_async_stream_yields_the_events_of_the_contract(server, async_client):
    """The asyncio stream gives the same."""
    async with async_client.generate("Hi", raw=True) as stream:
        assert stream.started is None
        kinds = [event.WhichOneof("event") async for event in stream]
        assert kinds == ["started", "delta", "delta", "finished"]
        assert stream.generation_id == "fake"
    assert not server.calls[-1].cancelled.is_set()


async def test_text(client, async_client):
    """`text` gives the texts alone, with index and role."""
    expected = [(0, pb.MODEL_ROLE_AMPLIFIED, "Hel"), (0, pb.MODEL_ROLE_AMPLIFIED, "lo")]
    assert list(client.generate("Hi", raw=True).text()) == expected
    assert [piece async for piece in async_client.generate("Hi", raw=True).text()] == expected


def test_sync_break_in_with_cancels(server, client):
    """Leaving `with` early cancels the call on the server."""
    server.answer = ENDLESS
    with client.generate("Hi", raw=True) as stream:
        for _ in stream:
            break
        assert not server.calls[-1].cancelled.is_set()
    assert server.wait_cancelled()
    assert list(stream) == []


def test_sync_bare_break_cancels(server, client):
    """Breaking out of a bare `for` drops the stream, and that cancels the call."""
    server.answer = ENDLESS
    for _ in client.generate("Hi", raw=True):
        break
    assert server.wait_cancelled()


def test_sync_bare_break_out_of_text_cancels(server, client):
    """So does breaking out of the texts."""
    server.answer = ENDLESS
    for _ in client.generate("Hi", raw=True).text():
        break
    assert server.wait_cancelled()


def test_sync_close_from_another_thread(server, client):
    """`close()` ends an iteration that waits in another thread, without an error."""
    server.answer = ENDLESS
    stream = client.generate("Hi", raw=True)
    seen, waiting = [], threading.Event()

    def read():
        for event in stream:
            seen.append(event)
            if len(seen) == 2:
                waiting.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert waiting.wait(10)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert server.wait_cancelled()


def test_an_exception_in_the_body_cancels(server, client):
    """An error of the caller inside `with` cancels too, and is the one that is raised."""
    server.answer = ENDLESS

    def fail():
        with client.generate("Hi", raw=True) as stream:
            raise KeyError(next(stream))

    with pytest.raises(KeyError):
        fail()
    assert server.wait_cancelled()


async def test_async_with_break_cancels(server, async_client):
    """Leaving `async with` cancels the call on the server, although `break` alone does not end a call of grpc.aio."""
    server.answer = ENDLESS
    async with async_client.generate("Hi", raw=True) as stream:
        async for _ in stream:
            break
        assert not server.calls[-1].cancelled.is_set()
    assert await cancelled(server)
    assert [event async for event in stream] == []


async def test_async_bare_break_cancels(server, async_client):
    """A bare `break` drops the stream, and that cancels the call."""
    server.answer = ENDLESS
    async for _ in async_client.generate("Hi", raw=True):
        break
    assert await cancelled(server)


async def test_async_bare_break_out_of_text_cancels(server, async_client):
    """So does breaking out of the texts."""
    server.answer = ENDLESS
    async for _ in async_client.generate("Hi", raw=True).text():
        break
    assert await cancelled(server)


async def test_async_stream_collected_in_another_thread(server, async_client):
    """A stream that is collected outside the thread of its loop cancels its call all the same."""
    server.answer = ENDLESS
    holder = [async_client.generate("Hi", raw=True)]
    await anext(holder[0])
    await asyncio.to_thread(holder.clear)
    assert await cancelled(server)


async def test_task_cancellation_cancels(server, async_client):
    """Cancelling the reading task cancels the call, and the task sees its CancelledError."""
    server.answer = ENDLESS
    reading = asyncio.Event()

    async def read():
        async for event in async_client.generate("Hi", raw=True):
            if event.HasField("delta"):
                reading.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(reading.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await cancelled(server)


async def test_task_cancellation_of_complete(server, async_client):
    """`asyncio.timeout` around `complete` frees the server."""
    server.answer = ENDLESS
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await async_client.complete("Hi", raw=True)
    assert await cancelled(server)


async def test_async_close_from_another_task(server, async_client):
    """`close()` ends an iteration that waits in another task, without an error."""
    server.answer = ENDLESS
    stream = async_client.generate("Hi", raw=True)
    reading = asyncio.Event()

    async def read():
        async for event in stream:
            if event.HasField("delta"):
                reading.set()
        return "ended"

    task = asyncio.create_task(read())
    await asyncio.wait_for(reading.wait(), 10)
    await stream.close()
    assert await asyncio.wait_for(task, 10) == "ended"
    assert await cancelled(server)


async def test_score_streams_cancel_too(server, client, async_client):
    """Leaving a score early cancels it."""
    server.answer = [pb.ScoreResponse(tokens=[token("a")], total_token_count=2), HOLD]
    with client.score("a", "b", raw=True) as stream:
        next(stream)
    assert server.wait_cancelled()
    async with async_client.score("a", "b", raw=True) as async_stream:
        await anext(async_stream)
    assert await cancelled(server)


def test_a_finished_stream_is_not_kept_alive(client):
    """A stream read to its end leaves nothing behind."""
    import weakref

    stream = client.generate("Hi", raw=True)
    stream.gather()
    gone = weakref.ref(stream)
    del stream
    gc.collect()
    assert gone() is None


BROKEN = {
    "empty": [],
    "no finished": [started(), delta("a")],
    "no started": [delta("a"), finished()],
    "started twice": [started(), started(), finished()],
    "delta after finished": [started(), finished(), delta("a")],
    "finished twice": [started(), finished(), finished()],
    "one of two finished": [started(), delta("a"), delta("b", index=1), finished()],
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
async def test_broken_grammar(server, client, async_client, script):
    """A stream against the grammar, also one that ends with OK before every sequence finished, is `StreamBroken`."""
    server.answer = script
    sequences = 2 if script is BROKEN["one of two finished"] else None
    with pytest.raises(StreamBroken):
        list(client.generate("Hi", raw=True, num_sequences=sequences))
    with pytest.raises(StreamBroken):
        await async_client.complete("Hi", raw=True, num_sequences=sequences)


async def test_a_broken_stream_is_cancelled(server, client, async_client):
    """The client does not go on reading what it cannot trust."""
    server.answer = [delta("a"), HOLD]
    with pytest.raises(StreamBroken):
        list(client.generate("Hi", raw=True))
    assert server.wait_cancelled()
    with pytest.raises(StreamBroken):
        await async_client.complete("Hi", raw=True)
    assert await cancelled(server)


# A field of some newer contract: number 15, a message of two bytes.
UNKNOWN = b"\x7a\x02\x08\x01"


async def test_an_unknown_event_is_skipped(server, client, async_client):
    """An event of a newer contract is no error and not handed on, wherever it comes; nor is an unknown field."""
    newer = pb.GenerateLDAResponse.FromString(UNKNOWN)
    more = pb.TokenDelta.FromString(delta("a").SerializeToString() + UNKNOWN)
    server.answer = [newer, started(), newer, more, finished(), newer]
    kinds = [event.WhichOneof("event") for event in client.generate("Hi", raw=True)]
    assert kinds == ["started", "delta", "finished"]
    assert [event async for event in async_client.generate("Hi", raw=True)] == list(client.generate("Hi", raw=True))
    assert client.complete("Hi", raw=True)[0].text == "a"
    server.answer = [pb.ScoreResponse.FromString(UNKNOWN), pb.ScoreResponse(tokens=[token("a")], total_token_count=1)]
    assert len(list(client.score("a", "b", raw=True))) == 1


def test_unknown_enum_values(server, client):
    """A role and a reason of a newer contract arrive as their numbers."""
    server.answer = [started(), delta("a", role=17), finished(role=17, reason=99)]
    completion = client.complete("Hi", raw=True)[0]
    assert (completion.role, completion.role_name) == (17, "17")
    assert (completion.finish_reason, completion.reason_name) == (99, "99")


def test_the_server_says_how_many_sequences_come(server, client):
    """What `started` announces counts, not what was asked for: fewer and more are both against the grammar."""
    server.answer = [started(sequence_count=2), delta("a"), finished(), finished(1)]
    assert len(client.complete("Hi", raw=True)) == 2
    server.answer = [started(sequence_count=2), finished()]
    with pytest.raises(StreamBroken, match="1 of 2"):
        client.complete("Hi", raw=True, num_sequences=1)
    server.answer = [started(sequence_count=1), finished(), finished(role=pb.MODEL_ROLE_AFTER)]
    with pytest.raises(StreamBroken, match="more than 1"):
        client.complete("Hi", raw=True, num_sequences=2)
    server.answer = [started(sequence_count=1), finished(1)]
    with pytest.raises(StreamBroken, match="never announced"):
        client.complete("Hi", raw=True, num_sequences=2)


def test_a_stream_knows_its_request_and_whether_it_was_left(server, client):
    """`request` is what was sent, `cancelled` whether the end was not waited for."""
    server.model_pair.has_chat_template = False
    with client.generate("Hi") as stream:
        list(stream)
        assert stream.request == server.requests[-1] == pb.GenerateLDARequest(prompt=pb.Prompt(text="Hi"))
    assert not stream.cancelled
    with client.generate("Hi") as stream:
        next(stream)
    assert stream.cancelled


async def test_gather_interleaved(server, client, async_client):
    """Interleaved sequences are taken apart: texts, tokens, reasons, scores, in the order of their index."""
    server.answer = [
        started(alpha=2.0),
        delta("B", index=1),
        delta("a"),
        delta("C", index=1),
        finished(index=1, reason=pb.FINISH_REASON_STOP, stop_string="END"),
        delta("", tokens=[pb.Token(id=9, piece=b"\xf0\x9f")]),
        delta("b"),
        finished(
            reason=pb.FINISH_REASON_STOP,
            stop_token_id=4,
            usage=pb.Usage(output_token_count=3),
            alpha_scores=[pb.AlphaScore(alpha=0.1, logprob=-2.5), pb.AlphaScore(alpha=2, logprob=-1)],
        ),
    ]
    completions = client.generate("Hi", raw=True, num_sequences=2, score_alphas=[0.1, 2]).gather()
    assert completions.started.alpha == 2.0
    assert [(item.sequence_index, item.text, item.matched_stop) for item in completions] == [
        (0, "ab", 4),
        (1, "BC", "END"),
    ]
    assert [each.piece for each in completions[0].tokens] == [b"a", b"\xf0\x9f", b"b"]
    assert completions.as_finished == (completions[1], completions[0])
    assert completions[0].alpha_scores == {0.1: -2.5, 2: -1}
    assert completions[0].usage.output_token_count == 3
    assert (completions[0].reason_name, completions[0].role_name) == ("STOP", "AMPLIFIED")
    assert await async_client.complete("Hi", raw=True, num_sequences=2, score_alphas=[0.1, 2]) == completions


def test_gather_both(server, client):
    """`generate_both` expects every sequence of either model, and tells them apart by role."""
    after, before = pb.MODEL_ROLE_AFTER, pb.MODEL_ROLE_BEFORE
    server.answer = [started(), delta("x", role=after), delta("y", role=before), finished(role=before)]
    with pytest.raises(StreamBroken, match="1 of 2"):
        client.generate_both("Hi", raw=True).gather()
    server.answer = [*server.answer, finished(role=after)]
    completions = client.generate_both("Hi", raw=True).gather()
    assert [item.text for item in completions.of_role(before)] == ["y"]
    assert [item.role_name for item in completions] == ["AFTER", "BEFORE"]


def test_gather_needs_the_whole_stream(server, client):
    """Gathering after tokens were read, or closing before the end, never passes a part off as the whole."""
    with client.generate("Hi", raw=True) as stream:
        next(stream)
        assert stream.gather()[0].text == "Hello"
    with client.generate("Hi", raw=True) as stream:
        next(stream), next(stream)
        with pytest.raises(RuntimeError, match="whole stream"):
            stream.gather()
    stream.close()
    closed = client.generate("Hi", raw=True)
    closed.close()
    with pytest.raises(StreamBroken):
        closed.gather()


async def test_score(server, client, async_client):
    """Blocks add up to the scored text; a gap or a missing end is `StreamBroken`."""
    one, two = token("a", before=-2, amplified_logprob=-0.5), token("b", after=-3, before=-2, amplified_logprob=-0.5)
    server.answer = [
        pb.ScoreResponse(tokens=[one], total_token_count=2),
        pb.ScoreResponse(
            offset=1, tokens=[two], total_token_count=2, alpha_scores=[pb.AlphaScore(alpha=0.3, logprob=-4)]
        ),
    ]
    scored = client.score("a", "b", raw=True, score_alphas=[0.3]).gather()
    assert (scored.tokens, scored.alpha_scores) == ([one, two], {0.3: -4})
    assert (scored.after_logprob, scored.before_logprob, scored.amplified_logprob) == (-4.0, -4.0, -1.0)
    assert await async_client.score("a", "b", raw=True, score_alphas=[0.3]).gather() == scored
    for broken in ([], server.answer[:1], server.answer[1:]):
        server.answer = broken
        with pytest.raises(StreamBroken):
            client.score("a", "b", raw=True).gather()


async def test_the_chat_template_is_asked_for_once(server, client, async_client):
    """The form of a plain string hangs on the pair; the client asks once, and not at all where nothing hangs on it."""
    server.model_pair.has_chat_template = False
    client.complete("Hi", raw=True)
    client.complete([("user", "Hi")])
    assert not any(isinstance(request, pb.GetModelPairRequest) for request in server.requests)
    client.complete("Hi")
    client.complete("Hi")
    assert server.requests[-1].prompt.text == "Hi"
    assert sum(isinstance(request, pb.GetModelPairRequest) for request in server.requests) == 1
    server.model_pair.has_chat_template = True
    await async_client.complete("Hi")
    assert server.requests[-1].prompt.chat.messages[0].role == "user"


async def test_lookups(server, client, async_client):
    """`model_pair` and `tokenizer_compat` return the messages of the contract."""
    server.model_pair.device = "cpu"
    server.tokenizer_compat.verdict = "fine"
    assert client.model_pair() == await async_client.model_pair() == server.model_pair
    assert client.tokenizer_compat() == await async_client.tokenizer_compat() == server.tokenizer_compat


def test_an_async_client_is_made_anywhere():
    """An `AsyncLdaClient` may be made before there is a loop, and closed unused."""

    async def use(client, server):
        async with client:
            return await client.complete("Hi", raw=True)

    with FakeServer() as server:
        client = AsyncLdaClient(server.target)
        assert asyncio.run(use(client, server))[0].text == "Hello"
    assert asyncio.run(AsyncLdaClient().close()) is None
