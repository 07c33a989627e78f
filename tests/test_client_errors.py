"""The client's errors: every status arrives as its class, with everything the server said."""

import pickle

import grpc
import lda_client
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from lda_client import AsyncLdaClient, LdaClient, LdaClientError, Timeout, Tls, Violation, pb
from lda_client._errors import ERRORS_BY_CODE, ERRORS_BY_REASON, error_from_rpc
from lda_client.testing import HOLD, FakeServer, started

REASONS = sorted(set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED})


@pytest.fixture
def server():
    """A server that answers as it is told."""
    with FakeServer() as running:
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
    code = grpc.StatusCode.INTERNAL
    server.answer = ERRORS_BY_REASON[number]("It says why.", code=code, metadata={"limit": "12"}, retry_after_s=1.5)
    with pytest.raises(LdaClientError) as sync_caught:
        client.complete("Hi", raw=True)
    async with AsyncLdaClient(server.target) as async_client:
        with pytest.raises(LdaClientError) as async_caught:
            await async_client.complete("Hi", raw=True)
    for error in (sync_caught.value, async_caught.value):
        assert type(error) is ERRORS_BY_REASON[number]
        assert (error.message, error.reason, error.code) == ("It says why.", reason, code)
        assert (error.metadata, error.retry_after_s) == ({"limit": "12"}, 1.5)


def test_violations(server, client):
    """A refused field arrives with its path and the rule, also in the text of the error."""
    violations = (("sampling.top_p", "must be at most 1"), ("alpha", "must be finite"))
    server.answer = lda_client.ValidationFailed("Bad alpha.", violations=map(Violation._make, violations))
    with pytest.raises(lda_client.ValidationFailed) as caught:
        client.complete("Hi", raw=True)
    assert caught.value.violations == violations
    assert str(caught.value) == "Bad alpha.; sampling.top_p: must be at most 1"


@pytest.mark.parametrize("code", sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK}, key=lambda code: code.value))
def test_a_code_without_reason(server, client, code):
    """A status of gRPC itself or of a proxy gets its class from the code."""
    server.answer = LdaClientError("plain", code=code)
    with pytest.raises(LdaClientError) as caught:
        client.complete("Hi", raw=True)
    expected = lda_client.ServerAway if code is grpc.StatusCode.UNAVAILABLE else ERRORS_BY_CODE[code]
    assert type(caught.value) is expected
    assert caught.value.reason is None


class Status(grpc.RpcError):
    """The error of a call, with these details."""

    def __init__(self, code, packed):
        self.code, self.details = lambda: code, lambda: "plain"
        self.trailing_metadata = lambda: (("grpc-status-details-bin", packed),)


def test_a_reason_of_another_domain():
    """A reason is ours only under our domain: a proxy may use the same word."""
    status, info = status_pb2.Status(), Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="proxy.example", metadata={"depth": "1"}))
    status.details.append(info)
    error = error_from_rpc(Status(grpc.StatusCode.ABORTED, status.SerializeToString()), "here")
    assert (type(error), error.reason, error.metadata) == (lda_client.Aborted, None, {})


def test_unreadable_details_do_not_hide_the_error():
    """Details that cannot be parsed leave code and message."""
    error = error_from_rpc(Status(grpc.StatusCode.ABORTED, b"\xff\xff\xff"), "here")
    assert (type(error), error.message) == (lda_client.Aborted, "plain")


async def test_remote_cancellation_is_an_error_not_a_cancelled_task(server):
    """A CANCELLED that the server sends is an error of the client, never asyncio.CancelledError out of nothing."""
    server.answer = [started(), LdaClientError("no", code=grpc.StatusCode.CANCELLED)]
    async with AsyncLdaClient(server.target) as client:
        with pytest.raises(lda_client.Aborted):
            await client.complete("Hi", raw=True)


def test_a_reason_of_a_newer_server(server, client):
    """A reason that this client does not know still arrives, under the class of its code."""
    server.answer = lda_client.Exhausted("new", reason="SOMETHING_NEW")
    with pytest.raises(lda_client.Exhausted) as caught:
        client.complete("Hi", raw=True)
    assert (type(caught.value), caught.value.reason) == (lda_client.Exhausted, "SOMETHING_NEW")


def test_unavailable_is_retried(server, client):
    """UNAVAILABLE before the first event is retried by the channel, four attempts in all; nothing else is."""
    answers = iter([lda_client.Loading("Not yet."), "Hello"])
    server.answer = lambda request: next(answers)
    assert client.complete("Hi", raw=True)[0].text == "Hello"
    assert len(server.calls) == 2
    for refusal, attempts in ((lda_client.Loading("Not yet."), 4), (lda_client.QueueFull("Full."), 1)):
        server.calls.clear()
        server.answer = refusal
        with pytest.raises(type(refusal)):
            client.complete("Hi", raw=True)
        assert len(server.calls) == attempts


def test_what_has_begun_is_not_retried(server, client):
    """After the first event a call is never sent again."""
    server.answer = ["Hel", lda_client.WorkerDied("Gone.")]
    with pytest.raises(lda_client.WorkerDied):
        client.complete("Hi", raw=True)
    assert len(server.calls) == 1


def away_target():
    """An address at which nobody listens."""
    with FakeServer() as server:
        return server.target


async def test_server_away():
    """A server that is away is reported at once, with the address and the remedy, from every verb."""
    target = away_target()
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
    target, timeout = away_target(), Timeout(connect_s=0.1)
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
    server.answer = [started(), HOLD]
    with pytest.raises(lda_client.DeadlineExceeded):
        client.complete("Hi", raw=True, timeout_s=0.2)
    assert 0 < server.calls[-1].deadline_s < 1
    assert server.wait_cancelled()
    async with AsyncLdaClient(server.target, timeout=Timeout(total_s=0.2)) as async_client:
        with pytest.raises(lda_client.DeadlineExceeded):
            await async_client.complete("Hi", raw=True)


def test_a_lost_connection(server, client):
    """A connection that is lost in the middle is not mistaken for a server that never answered."""
    server.answer = ["Hel", lda_client.ServerAway("Socket closed")]
    with pytest.raises(lda_client.ServerAway, match="was lost"):
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
        client.model_pair()
        assert "secret" not in repr(client)
    for call in server.calls:
        assert call.metadata["authorization"] == "Bearer secret"
        assert call.metadata["user-agent"].startswith(f"lda-client-python/{lda_client.__version__}")


def test_half_a_certificate():
    """A certificate without its key, or a key alone, is refused before anything is sent."""
    for half in ({"certificate": "me.pem"}, {"key": "me.key"}):
        with pytest.raises(ValueError, match="go together"):
            Tls(**half)


def test_public_names():
    """`__all__` is importable and holds every error class, and so does the tree at the top of the module."""
    import lda_client._errors as errors

    assert all(hasattr(lda_client, name) for name in lda_client.__all__)
    classes = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LdaClientError)
    }
    assert classes <= set(lda_client.__all__)
    assert all(name in errors.__doc__ for name in classes)
