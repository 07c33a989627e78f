"""A fake server for tests of code that uses this client: the contract without models, over real gRPC on loopback.

    from lda_client.testing import HOLD, FakeServer

    with FakeServer("Hello") as server, LdaClient(server.target) as client:
        assert client.complete("Hi")[0].text == "Hello"
        assert server.requests[-1].prompt.chat.messages[0].content == "Hi"

It answers every generation and every score with its `answer`, which may be set at any time:

    "Hello"                                 one token, for each sequence that the request asks for
    ["Hel", "lo"]                           two tokens
    [token("yes", after=-1, before=-3)]     a token with diagnostics
    ["Hel", HOLD]                           then nothing until the call is cancelled or its deadline passes
    ["Hel", WorkerDied("Gone.")]            then an error, raised by the client as it stands here
    QueueFull("Full.", retry_after_s=2)     a refusal
    [started(), delta("a", index=1), ...]   exactly these events, whether or not they keep the grammar
    lambda request: ...                     a function that returns or raises any of these

`started` and `finished` are put around texts and tokens where the list has none of its own. The server runs in threads,
so tests of both clients can use it; in asyncio, wait with `await asyncio.to_thread(server.wait_cancelled)`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeAlias, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.rpc import error_details_pb2, status_pb2

from lda_client import _errors
from lda_client._errors import ERROR_DOMAIN, ERRORS_BY_CODE, ERRORS_BY_REASON, LdaClientError, StreamBroken
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceServicer, add_LdaServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from google.protobuf.message import Message

CALLS_AT_ONCE = 64
NO_DEADLINE_S = 1e9


class _Hold:
    def __repr__(self) -> str:
        return "HOLD"


HOLD: Final = _Hold()

Event: TypeAlias = (
    "pb.Started | pb.TokenDelta | pb.Finished | pb.ScoreResponse | pb.GenerateLDAResponse | pb.GenerateBothResponse"
)
Step: TypeAlias = "str | pb.Token | Event | LdaClientError | _Hold"
StreamRequest: TypeAlias = "pb.GenerateLDARequest | pb.GenerateBothRequest | pb.ScoreRequest"
Script: TypeAlias = "str | Iterable[Step] | LdaClientError"
Answer: TypeAlias = "Script | Callable[[StreamRequest], Script]"
ResponseT = TypeVar("ResponseT", pb.GenerateLDAResponse, pb.GenerateBothResponse, pb.ScoreResponse)


def token(text: str | bytes, *, id: int = 0, after: float = -1.0, before: float = -1.0, **values: Any) -> pb.Token:
    """A token with diagnostics.

    Args:
        text: its piece; bytes for half a character.
        id: its vocabulary id.
        after: its log-probability under the after model.
        before: its log-probability under the before model.
        values: further fields of `pb.TokenDiagnostics`.
    """
    found = {"after_logprob": after, "before_logprob": before, "amplified_logprob": after, **values}
    return pb.Token(id=id, piece=_piece(text), diagnostics=pb.TokenDiagnostics(**found))


def started(**fields: Any) -> pb.Started:
    """The first event of a generation: seed 7 and alpha 1 unless given."""
    return pb.Started(**{"generation_id": "fake", "seed": 7, "alpha": 1.0, "pair_fingerprint": "fake-pair", **fields})


def delta(
    text: str,
    index: int = 0,
    role: pb.ModelRole.ValueType = pb.MODEL_ROLE_AMPLIFIED,
    tokens: Sequence[pb.Token] | None = None,
) -> pb.TokenDelta:
    """New text of one sequence, of one token unless the tokens are given."""
    drawn = [pb.Token(piece=text.encode())] if tokens is None else tokens
    return pb.TokenDelta(sequence_index=index, role=role, text=text, tokens=drawn)


def finished(
    index: int = 0,
    role: pb.ModelRole.ValueType = pb.MODEL_ROLE_AMPLIFIED,
    reason: pb.FinishReason.ValueType = pb.FINISH_REASON_EOS,
    **fields: Any,
) -> pb.Finished:
    """The end of one sequence."""
    return pb.Finished(sequence_index=index, role=role, reason=reason, **fields)


@dataclass
class Call:
    """One call as the server saw it.

    Attributes:
        request: the message of the contract.
        metadata: what came with it, such as `authorization`.
        deadline_s: seconds that the caller gave it; None without a deadline.
        cancelled: set when the call ended before its answer did.
    """

    request: Message
    metadata: dict[str, str]
    deadline_s: float | None
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False)


class FakeServer:
    """A server on a free port of loopback that answers as it is told; a context manager.

    Attributes:
        target: its address, for `LdaClient(server.target)`. Nobody listens there once the server has stopped.
        answer: what generations and scores are answered with: see the module.
        model_pair: the answer to `model_pair`.
        tokenizer_compat: the answer to `tokenizer_compat`.
        calls: every call so far, the oldest first.
    """

    def __init__(self, answer: Answer = "Hello") -> None:
        self.answer = answer
        self.model_pair = pb.GetModelPairResponse(has_chat_template=True, pair_fingerprint="fake-pair")
        self.tokenizer_compat = pb.TokenizerCompatResponse(compatible=True)
        self.calls: list[Call] = []
        self._threads = ThreadPoolExecutor(CALLS_AT_ONCE)
        self._server = grpc.server(self._threads)
        add_LdaServiceServicer_to_server(_Servicer(self), self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @property
    def requests(self) -> list[Any]:
        """The requests of all calls so far, lookups too."""
        return [call.request for call in self.calls]

    def wait_cancelled(self, timeout_s: float = 10.0) -> bool:
        """Whether the latest call was cancelled, now or within this time."""
        return bool(self.calls) and self.calls[-1].cancelled.wait(timeout_s)

    def stop(self) -> None:
        """Stop; calls under way are cancelled."""
        self._server.stop(None).wait()
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Servicer(LdaServiceServicer):
    """The service, as its server says."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def GenerateLDA(self, request: pb.GenerateLDARequest, context: Any) -> Iterator[pb.GenerateLDAResponse]:  # noqa: N802
        """Play the answer."""
        return self._play(request, context, pb.GenerateLDAResponse)

    def GenerateBoth(self, request: pb.GenerateBothRequest, context: Any) -> Iterator[pb.GenerateBothResponse]:  # noqa: N802
        """Play the answer."""
        return self._play(request, context, pb.GenerateBothResponse)

    def Score(self, request: pb.ScoreRequest, context: Any) -> Iterator[pb.ScoreResponse]:  # noqa: N802
        """Play the answer."""
        return self._play(request, context, pb.ScoreResponse)

    def GetModelPair(self, request: pb.GetModelPairRequest, context: Any) -> pb.GetModelPairResponse:  # noqa: N802
        """The pair."""
        self._record(request, context)
        return self._server.model_pair

    def TokenizerCompat(self, request: pb.TokenizerCompatRequest, context: Any) -> pb.TokenizerCompatResponse:  # noqa: N802
        """The report."""
        self._record(request, context)
        return self._server.tokenizer_compat

    def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:  # noqa: N802
        """A server that nobody uses."""
        self._record(request, context)
        return pb.GetLoadResponse(accepts_work=True)

    def _record(self, request: Message, context: Any) -> Call:
        left_s = context.time_remaining()
        # Without a deadline gRPC says that centuries are left.
        deadline_s = left_s if left_s is not None and left_s < NO_DEADLINE_S else None
        call = Call(request, dict(context.invocation_metadata()), deadline_s)
        self._server.calls.append(call)
        return call

    def _play(self, request: StreamRequest, context: Any, kind: type[ResponseT]) -> Iterator[ResponseT]:
        call, over, complete = self._record(request, context), threading.Event(), threading.Event()

        def ended() -> None:
            over.set()
            if not complete.is_set():
                call.cancelled.set()

        if not context.add_callback(ended):  # it ended before we came here
            ended()
        for step in _steps(self._server.answer, request):
            if isinstance(step, _Hold):
                over.wait()
                return
            if isinstance(step, LdaClientError):
                complete.set()
                _abort(context, step)
            yield _response(step, kind)
        complete.set()


def _steps(answer: Answer, request: StreamRequest) -> list[Event | LdaClientError | _Hold]:
    """What to do for this request, step by step."""
    steps: list[Step] = []
    try:
        script = answer(request) if callable(answer) else answer
        for step in [script] if isinstance(script, str | LdaClientError) else script:
            steps.append(step)  # noqa: PERF402 - a generator may raise after some steps, which count
    except LdaClientError as error:
        steps.append(error)
    if isinstance(request, pb.ScoreRequest):
        return list(_scored(steps, request))
    return list(_generated(steps, request))


def _scored(steps: list[Step], request: pb.ScoreRequest) -> Iterator[Event | LdaClientError | _Hold]:
    """Texts and tokens become blocks of one token, the last with a score for each alpha that was asked for."""
    count = sum(isinstance(step, str | pb.Token) for step in steps)
    offset = 0
    for step in steps:
        if isinstance(step, str | pb.Token):
            block = pb.ScoreResponse(offset=offset, tokens=[_compared(step)], total_token_count=count)
            offset += 1
            if offset == count:
                block.alpha_scores.extend(_alpha_scores(request.score_alphas, count))
            yield block
        else:
            yield step


def _compared(step: str | pb.Token) -> pb.Token:
    return token(step) if isinstance(step, str) else step


def _generated(
    steps: list[Step], request: pb.GenerateLDARequest | pb.GenerateBothRequest
) -> Iterator[Event | LdaClientError | _Hold]:
    """Texts and tokens become deltas of every sequence; `started` and `finished` are added where they are missing."""
    sequences = _sequences(request)
    drawn = sum(isinstance(step, str | pb.Token) for step in steps)
    if drawn and not isinstance(steps[0], pb.Started):
        yield _started_for(request, len(sequences))
    for step in steps:
        if isinstance(step, str | pb.Token):
            yield from (_delta_of(step, index, role) for role, index in sequences)
        else:
            yield step
    if drawn and not any(isinstance(step, pb.Finished | LdaClientError | _Hold) for step in steps):
        usage = pb.Usage(output_token_count=drawn)
        scores = _alpha_scores(request.output.score_alphas, drawn)
        yield from (finished(index, role, usage=usage, alpha_scores=scores) for role, index in sequences)


def _sequences(
    request: pb.GenerateLDARequest | pb.GenerateBothRequest,
) -> list[tuple[pb.ModelRole.ValueType, int]]:
    both = (pb.MODEL_ROLE_AFTER, pb.MODEL_ROLE_BEFORE)
    roles = both if isinstance(request, pb.GenerateBothRequest) else (pb.MODEL_ROLE_AMPLIFIED,)
    return [(role, index) for role in roles for index in range(request.num_sequences or 1)]


def _started_for(request: pb.GenerateLDARequest | pb.GenerateBothRequest, sequences: int) -> pb.Started:
    event = started(sequence_count=sequences)
    if request.sampling.HasField("seed"):
        event.seed = request.sampling.seed
    if isinstance(request, pb.GenerateBothRequest):
        event.ClearField("alpha")
    elif request.HasField("alpha"):
        event.alpha = request.alpha
    return event


def _delta_of(step: str | pb.Token, index: int, role: pb.ModelRole.ValueType) -> pb.TokenDelta:
    if isinstance(step, str):
        return delta(step, index, role)
    return delta(step.piece.decode(errors="ignore"), index, role, [step])


def _alpha_scores(alphas: Iterable[float], tokens: int) -> list[pb.AlphaScore]:
    """One nat for each token, at every alpha."""
    return [pb.AlphaScore(alpha=alpha, logprob=-float(tokens)) for alpha in alphas]


def _piece(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _response(event: Event, kind: type[ResponseT]) -> ResponseT:
    """An event in the message that carries it."""
    names = {pb.Started: "started", pb.TokenDelta: "delta", pb.Finished: "finished"}
    if name := names.get(type(event)):
        parts: dict[str, Any] = {name: event}
        return kind(**parts)
    if not isinstance(event, kind):
        raise TypeError(f"{type(event).__name__} is no event of this call.")
    return event


# Where the code of a reason is not the first one of its class.
_CODES: dict[type[LdaClientError], grpc.StatusCode] = {
    _errors.NoChatTemplate: grpc.StatusCode.FAILED_PRECONDITION,
    _errors.TokenizersIncompatible: grpc.StatusCode.FAILED_PRECONDITION,
    _errors.UnknownGeneration: grpc.StatusCode.NOT_FOUND,
    _errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    _errors.ServerAway: grpc.StatusCode.UNAVAILABLE,
}


def _abort(context: Any, error: LdaClientError) -> NoReturn:
    """End the call with the status from which the client makes this error."""
    if isinstance(error, StreamBroken):
        raise TypeError("No status makes a StreamBroken; answer with events that break the grammar.")
    code = error.code or _code(type(error))
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in _details(error):
        packed = PackedAny()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, error.message)
    raise AssertionError("abort() raises")


def _code(kind: type[LdaClientError]) -> grpc.StatusCode:
    if kind in _CODES:
        return _CODES[kind]
    by_class = {of: code for code, of in reversed(ERRORS_BY_CODE.items())}
    return next((by_class[base] for base in kind.__mro__ if base in by_class), grpc.StatusCode.UNKNOWN)


def _details(error: LdaClientError) -> Iterator[Message]:
    numbers = {of: number for number, of in ERRORS_BY_REASON.items() if number}
    names = {int(number): name.removeprefix("ERROR_REASON_") for name, number in pb.ErrorReason.items()}
    reason = error.reason or names.get(numbers.get(type(error), -1))
    if reason:
        yield error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    if error.violations:
        pairs = [{"field": path, "description": text} for path, text in error.violations]
        yield error_details_pb2.BadRequest(field_violations=pairs)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        yield retry
