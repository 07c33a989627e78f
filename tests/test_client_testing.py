"""The fake server of `lda_client.testing`: what users' tests rely on."""

import asyncio
import logging

import lda_client
import pytest
from lda_client import AsyncLdaClient, LdaClient, LdaClientError, pb
from lda_client._errors import ERRORS_BY_REASON
from lda_client.testing import HOLD, FakeServer, delta, finished, started, token


def test_texts_for_every_sequence_that_is_asked_for():
    """One answer serves any number of sequences and either verb; seed and alpha are those of the request."""
    with FakeServer("Hello") as server, LdaClient(server.target) as client:
        completions = client.complete("Hi", num_sequences=3, seed=5, alpha=2.5, score_alphas=[0, 1])
        assert [(item.sequence_index, item.text) for item in completions] == [(0, "Hello"), (1, "Hello"), (2, "Hello")]
        assert (completions.started.seed, completions.started.alpha) == (5, 2.5)
        assert completions[0].alpha_scores == {0: -1, 1: -1}
        both = client.generate_both("Hi").gather()
        assert [item.role_name for item in both] == ["AFTER", "BEFORE"]
        assert not both.started.HasField("alpha")
        assert server.requests[-1].prompt.chat.messages[0].content == "Hi"


def test_tokens_with_diagnostics():
    """Tokens arrive as they were made, whole characters as text, and score as blocks."""
    tokens = [token("yes", id=4, after=-1, before=-3), token(b"\xf0\x9f", id=5)]
    with FakeServer(tokens) as server, LdaClient(server.target) as client:
        completion = client.complete("Hi")[0]
        assert (completion.tokens, completion.text) == (tokens, "yes")
        scored = client.score("Hi", "yes", score_alphas=[0.5]).gather()
        assert (scored.tokens, scored.alpha_scores) == (tokens, {0.5: -2})


@pytest.mark.parametrize("kind", [kind for number, kind in ERRORS_BY_REASON.items() if number])
def test_what_is_answered_is_raised(kind):
    """An error that is answered, raised by a function, or put after some text, is raised by the client as it is."""
    error = kind("Why.", metadata={"limit": "1"}, retry_after_s=0.5)

    def refuse(request):
        raise error

    def break_off(request):
        yield "Hel"
        raise error

    with FakeServer() as server, LdaClient(server.target) as client:
        for answer in (refuse, break_off, ["Hel", error], error):
            server.answer = answer
            with pytest.raises(kind) as caught:
                client.complete("Hi", raw=True)
            assert type(caught.value) is kind
            assert (caught.value.message, caught.value.metadata) == ("Why.", {"limit": "1"})


def test_codes_are_those_of_the_contract():
    """A reason travels with the code that the contract gives it."""
    expected = {
        lda_client.NoChatTemplate: "FAILED_PRECONDITION",
        lda_client.TokenizersIncompatible: "FAILED_PRECONDITION",
        lda_client.UnknownGeneration: "NOT_FOUND",
        lda_client.Unauthenticated: "UNAUTHENTICATED",
        lda_client.PermissionDenied: "PERMISSION_DENIED",
        lda_client.ValidationFailed: "INVALID_ARGUMENT",
        lda_client.QueueFull: "RESOURCE_EXHAUSTED",
        lda_client.DeadlineTooShort: "DEADLINE_EXCEEDED",
        lda_client.Aborted: "ABORTED",
        lda_client.InternalServerError: "INTERNAL",
        lda_client.Draining: "UNAVAILABLE",
    }
    with FakeServer() as server, LdaClient(server.target) as client:
        for kind, code in expected.items():
            server.answer = kind("Why.")
            with pytest.raises(LdaClientError) as caught:
                client.complete("Hi", raw=True)
            assert caught.value.code.name == code


def test_a_function_answers_by_request():
    """A function sees the request and may answer each call in its own way."""
    with FakeServer(lambda request: request.prompt.text.upper()) as server, LdaClient(server.target) as client:
        assert client.complete("hi", raw=True)[0].text == "HI"
        assert client.complete("you", raw=True)[0].text == "YOU"


def test_events_are_sent_as_they_stand():
    """A list of events has nothing added, so that a test can break the grammar."""
    with FakeServer([started(), delta("a")]) as server, LdaClient(server.target) as client:
        with pytest.raises(lda_client.StreamBroken):
            client.complete("Hi")
        server.answer = [started(sequence_count=2), delta("a", index=1), finished(index=1), finished()]
        assert [each.text for each in client.complete("Hi")] == ["", "a"]


async def test_hold_until_cancelled():
    """HOLD waits for the end of the call, which the server then knows; usable from asyncio too."""
    with FakeServer(["Hel", HOLD]) as server:
        with LdaClient(server.target) as client, client.generate("Hi", raw=True) as stream:
            assert next(stream.text()).text == "Hel"
            assert not server.calls[-1].cancelled.is_set()
        assert server.wait_cancelled()
        async with AsyncLdaClient(server.target) as client:
            async with client.generate("Hi", raw=True) as stream:
                assert (await anext(stream.text())).text == "Hel"
            assert await asyncio.to_thread(server.wait_cancelled)
        assert len(server.calls) == 2


def test_calls_are_recorded():
    """What came with a call: metadata and deadline; lookups are calls too."""
    with FakeServer() as server:
        assert not server.wait_cancelled(timeout_s=0)
        with LdaClient(server.target, token="secret") as client:
            client.model_pair(timeout_s=30)
            client.complete("Hi", raw=True)
        lookup, generation = server.calls
        assert isinstance(lookup.request, pb.GetModelPairRequest)
        assert 0 < lookup.deadline_s < 60
        assert generation.deadline_s is None
        assert generation.metadata["authorization"] == "Bearer secret"
        assert not generation.cancelled.is_set()


def test_lookups_answer_what_is_set():
    """The pair and the report are messages that a test changes."""
    with FakeServer() as server, LdaClient(server.target) as client:
        server.model_pair.device = "cuda:0"
        server.tokenizer_compat.compatible = False
        assert client.model_pair().device == "cuda:0"
        assert not client.tokenizer_compat().compatible


def test_a_stopped_server_ends_its_calls():
    """Leaving `with` does not wait for calls that hold, not even for one that comes just then."""
    with FakeServer([started(), HOLD]) as server:
        client = LdaClient(server.target)
        held = client.generate("Hi", raw=True)
        assert next(held).HasField("started")
        late = client.generate("Hi", raw=True)
    with pytest.raises(LdaClientError):
        next(held)
    late.close()
    client.close()


def test_a_mistake_in_an_answer_is_told(caplog):
    """An answer that is none, and an error of a user's function, reach the test as an error of the server."""
    with FakeServer() as server, LdaClient(server.target) as client, caplog.at_level(logging.CRITICAL, "grpc"):
        for answer in ([7], lambda request: request.nothing, lda_client.StreamBroken("never sent")):
            server.answer = answer
            with pytest.raises(lda_client.InternalServerError):
                client.complete("Hi", raw=True)
