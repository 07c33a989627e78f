"""The client's errors: every status arrives as its class, with everything the server said."""

import pickle

import grpc
import lda_client
import pytest
from lda_client import AsyncLdaClient, LdaClient, LdaClientError, Timeout, pb
from lda_client._errors import ERRORS_BY_CODE, ERRORS_BY_REASON
from scripted_server import HOLD, Fail, free_target, scripted_server, started

REASONS = sorted(set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED})


@pytest.fixture
def server():
    """A server that plays scripts."""
    with scripted_server() as running:
        yield running


@pytest.fixture
def client(server):
    """A synchronous client of that server."""
    with LdaClient(server.target) as opened:
        yield opened


def test_every_reason_and_code_has_a_class():
    """No reason of the contract, and no code of gRPC but OK, is without a class."""
    assert set(ERRORS_BY_REASON) == set(pb.ErrorReason.values())
    assert set(ERRORS_BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    named = [kind for reason, kind in ERRORS_BY_REASON.items() if reason]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("number", REASONS)
async def test_a_reason_arrives_as_its_class(server, client, number):
    """Each reason is raised as its class, with message, metadata and delay, by the sync and the asyncio client."""
    reason = pb.ErrorReason.Name(number).removeprefix("ERROR_REASON_")
    failure = Fail(grpc.StatusCode.INTERNAL, "It says why.", reason, {"limit": "12"}, (), 1.5)
    server.script = [failure]
    with pytest.raises(LdaClientError) as sync_caught:
        client.complete("Hi", raw=True)
    async with AsyncLdaClient(server.target) as async_client:
        with pytest.raises(LdaClientError) as async_caught:
            await async_client.complete("Hi", raw=True)
    for error in (sync_caught.value, async_caught.value):
        assert type(error) is ERRORS_BY_REASON[number]
        assert (error.message, error.reason, error.code) == ("It says why.", reason, grpc.StatusCode.INTERNAL)
        assert (error.metadata, error.retry_after_s) == ({"limit": "12"}, 1.5)


def test_violations(server, client):
    """A refused field arrives with its path and the rule, also in the text of the error."""
    violations = (("sampling.top_p", "must be at most 1"), ("alpha", "must be finite"))
    server.script = [Fail(grpc.StatusCode.INVALID_ARGUMENT, "Bad alpha.", "VALIDATION_FAILED", violations=violations)]
    with pytest.raises(lda_client.ValidationFailed) as caught:
        client.complete("Hi", raw=True)
    assert caught.value.violations == violations
    assert str(caught.value) == "Bad alpha.; sampling.top_p: must be at most 1"


@pytest.mark.parametrize("code", sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK}, key=lambda code: code.value))
def test_a_code_without_reason(server, client, code):
    """A status of gRPC itself or of a proxy, or of another domain, gets its class from the code."""
    server.script = [Fail(code, "plain", "QUEUE_FULL", domain="proxy.example")]
    with pytest.raises(LdaClientError) as caught:
        client.complete("Hi", raw=True)
    expected = lda_client.ServerAway if code is grpc.StatusCode.UNAVAILABLE else ERRORS_BY_CODE[code]
    assert type(caught.value) is expected
    assert caught.value.reason is None


async def test_remote_cancellation_is_an_error_not_a_cancelled_task(server):
    """A CANCELLED that the server sends is an error of the client, never asyncio.CancelledError out of nothing."""
    server.script = [started(), Fail(grpc.StatusCode.CANCELLED)]
    async with AsyncLdaClient(server.target) as client:
        with pytest.raises(lda_client.Aborted):
            await client.complete("Hi", raw=True)


def test_a_reason_of_a_newer_server(server, client):
    """A reason that this client does not know still arrives, under the class of its code."""
    server.script = [Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "new", "SOMETHING_NEW")]
    with pytest.raises(lda_client.Exhausted) as caught:
        client.complete("Hi", raw=True)
    assert (type(caught.value), caught.value.reason) == (lda_client.Exhausted, "SOMETHING_NEW")


def test_unavailable_is_retried(server, client):
    """UNAVAILABLE before the first event is retried by the channel; nothing else is."""
    server.scripts = [[Fail(grpc.StatusCode.UNAVAILABLE, reason="LOADING")]]
    assert client.complete("Hi", raw=True)[0].text == "Hello"
    assert len(server.requests) == 2
    server.scripts = [[Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")]]
    with pytest.raises(lda_client.QueueFull):
        client.complete("Hi", raw=True)


async def test_server_away():
    """A server that is away is reported at once, with the address and the remedy, from every verb."""
    target = free_target()
    with LdaClient(target) as client:
        verbs = [lambda: client.complete("Hi"), client.model_pair, lambda: client.score("a", "b", raw=True).gather()]
        for verb in verbs:
            with pytest.raises(lda_client.ServerAway, match=target) as caught:
                verb()
            assert "lda-service serve" in str(caught.value)
            assert "--target" in str(caught.value)
    async with AsyncLdaClient(target) as async_client:
        with pytest.raises(lda_client.ServerAway, match=target):
            await async_client.tokenizer_compat()


async def test_connect_timeout():
    """With `connect_s` the client waits that long for the server to come up, and no longer."""
    target, timeout = free_target(), Timeout(connect_s=0.1)
    with LdaClient(target, timeout=timeout) as client, pytest.raises(lda_client.ServerAway, match=r"within 0.1 s"):
        client.model_pair()
    async with AsyncLdaClient(target, timeout=timeout) as async_client:
        with pytest.raises(lda_client.ServerAway, match=r"within 0.1 s"):
            await async_client.complete("Hi")


async def test_connect_timeout_of_a_server_that_is_there(server):
    """Waiting for a server that is there costs nothing and changes nothing."""
    timeout = Timeout(connect_s=5)
    with LdaClient(server.target, timeout=timeout) as client:
        assert client.complete("Hi", raw=True)[0].text == "Hello"
    async with AsyncLdaClient(server.target, timeout=timeout) as async_client:
        assert (await async_client.complete("Hi", raw=True))[0].text == "Hello"


async def test_deadline(server, client):
    """The deadline of a call reaches the server, and passing it is `DeadlineExceeded`."""
    server.script = [started(), HOLD]
    with pytest.raises(lda_client.DeadlineExceeded):
        client.complete("Hi", raw=True, timeout_s=0.2)
    assert server.deadline_s <= 0.2
    assert server.wait_cancelled()
    async with AsyncLdaClient(server.target, timeout=Timeout(total_s=0.2)) as async_client:
        with pytest.raises(lda_client.DeadlineExceeded):
            await async_client.complete("Hi", raw=True)


def test_a_lost_connection(server, client):
    """A connection that is lost in the middle is not mistaken for a server that never answered."""
    server.script = [started(), Fail(grpc.StatusCode.UNAVAILABLE, "Socket closed")]
    with pytest.raises(lda_client.ServerAway, match="was lost"):
        client.complete("Hi", raw=True)


def test_unreadable_details_do_not_hide_the_error(server, client, monkeypatch):
    """Details that cannot be parsed leave code and message."""
    monkeypatch.setattr(Fail, "packed", lambda self: b"\xff\xff\xff")
    server.script = [Fail(grpc.StatusCode.ABORTED, "The operator stopped it.")]
    with pytest.raises(lda_client.Aborted, match="The operator stopped it"):
        client.complete("Hi", raw=True)


def test_errors_cross_processes():
    """An error survives pickling with all its facts."""
    error = lda_client.QueueFull(
        "Full.",
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason="QUEUE_FULL",
        metadata={"depth": "3"},
        retry_after_s=2.0,
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy)) == (type(error), vars(error))


def test_token(server):
    """The bearer token travels with every call, and shows in no repr."""
    with LdaClient(server.target, token="secret") as client:
        client.complete("Hi", raw=True)
        assert server.metadata["authorization"] == "Bearer secret"
        client.model_pair()
        assert server.metadata["authorization"] == "Bearer secret"
        assert "secret" not in repr(client)
    assert server.metadata["user-agent"].startswith(f"lda-client-python/{lda_client.__version__}")


def test_public_names():
    """`__all__` is importable and holds every error class, and so does the tree at the top of the module."""
    import lda_client._errors as errors

    assert all(hasattr(lda_client, name) for name in lda_client.__all__)
    classes = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LdaClientError)
    }
    assert classes <= set(lda_client.__all__)
    assert all(name in errors.__doc__ for name in classes)
