"""Every error this client raises on purpose, and the one table that makes them from a gRPC status.

    LdaClientError
    ├── RequestRejected         the request cannot be served as it stands; change it
    │   ├── ValidationFailed        a field breaks a rule of the contract; `.violations` names it
    │   ├── ContextExceeded         prompt and output do not fit the context window
    │   ├── PromptUnusable          the prompt renders to nothing, or holds ids outside the shared vocabulary
    │   ├── NoChatTemplate          a conversation was sent to a pair without a chat template
    │   ├── LimitExceeded           legal, but above a limit of this server
    │   ├── TokenizersIncompatible  the two vocabularies do not match
    │   ├── UnknownGeneration       no generation of this id is open
    │   └── AccessDenied            the server does not know this caller, or does not let it do this
    │       ├── Unauthenticated         no token, an unknown or an expired one
    │       └── PermissionDenied        the token or certificate does not allow this method
    ├── Unavailable             nothing is wrong with the request; try again later or elsewhere
    │   ├── Loading                 the models are still being loaded or warmed up
    │   ├── Draining                the server is shutting down
    │   ├── WorkerDied              the process that owns the models died
    │   └── ServerAway              nobody answers at the target, or the connection was lost
    ├── Exhausted               something ran out
    │   ├── QueueFull               as many requests wait as may wait
    │   ├── CallerLimit             this caller has as many requests open as it may
    │   ├── SlowConsumer            the stream was read too slowly
    │   └── OutOfMemory             device memory ran out while serving the request
    ├── DeadlineExceeded        `timeout_s` went by
    │   └── DeadlineTooShort        refused at once: the wait would have been longer
    ├── Aborted                 an operator or a shutdown ended the call
    ├── InternalServerError     a fault of the server
    └── StreamBroken            the stream ended or went on against the contract

A bad argument that never leaves this process is an ordinary `TypeError` or `ValueError`. This module reads statuses
only; it knows nothing of channels, requests or streams.
"""

# names say what happened; the base class says that they are errors

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ERROR_DOMAIN = "lda.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_REASON_PREFIX = "ERROR_REASON_"

MessageT = TypeVar("MessageT", bound=Message)


class Violation(NamedTuple):
    """One field that breaks a rule: its path, such as `sampling.top_p`, and the rule in words."""

    field: str
    description: str


class LdaClientError(Exception):
    """Base of all errors of this client.

    Attributes:
        message: what went wrong, in words of the server where it spoke.
        code: gRPC status code; None where no status was received.
        reason: name of the `ErrorReason` without its prefix, such as `QUEUE_FULL`; None where none was given.
        metadata: the facts which the contract documents for the reason, as text.
        retry_after_s: seconds after which the server suggests to try again; None where it does not.
        violations: fields at fault, for `ValidationFailed`; else empty.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Iterable[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)

    def __str__(self) -> str:
        unsaid = [f"{field}: {text}" for field, text in self.violations if field not in self.message]
        return "; ".join([self.message, *unsaid])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, so that an error survives the way out of a worker process."""
        facts = {name: value for name, value in vars(self).items() if name != "message"}
        return _rebuild, (type(self), self.message, facts)


def _rebuild(kind: type[LdaClientError], message: str, facts: dict[str, Any]) -> LdaClientError:
    return kind(message, **facts)


class RequestRejected(LdaClientError):
    """The request cannot be served as it stands; change it before trying again."""


class ValidationFailed(RequestRejected):
    """A field breaks a rule of the contract; `.violations` holds its path and the rule."""


class ContextExceeded(RequestRejected):
    """Prompt and output do not fit the context window. Metadata: `prompt_tokens`, `max_new_tokens`, `limit`."""


class PromptUnusable(RequestRejected):
    """The prompt renders to no tokens, or holds ids outside the shared vocabulary. Metadata: `token_id`."""


class NoChatTemplate(RequestRejected):
    """A conversation was sent to a pair without a chat template; send text with `raw=True`, or token ids."""


class LimitExceeded(RequestRejected):
    """A value is legal but above a limit of this server. Metadata: `field`, `limit`."""


class TokenizersIncompatible(RequestRejected):
    """The two vocabularies do not match; `tokenizer_compat` says where."""


class AccessDenied(RequestRejected):
    """The bearer token or client certificate is missing, wrong, or without the right to this call."""


class Unauthenticated(AccessDenied):
    """The call carries no token, or one that is unknown or expired."""


class PermissionDenied(AccessDenied):
    """The token or certificate does not allow this method. Metadata: `scope`, where one is missing."""


class UnknownGeneration(RequestRejected):
    """No generation of this id is open on this server. Metadata: `generation_id`."""


class Unavailable(LdaClientError):
    """Nothing is wrong with the request; try again later or at another server."""


class Loading(Unavailable):
    """The models are still being loaded or warmed up."""


class Draining(Unavailable):
    """The server is shutting down and takes no new work."""


class WorkerDied(Unavailable):
    """The process that owns the models died; a fresh one is being started."""


class ServerAway(Unavailable):
    """Nobody answers at the target, or the connection to it was lost."""


class Exhausted(LdaClientError):
    """Something ran out: room in the queue, patience with a slow reader, or memory."""


class QueueFull(Exhausted):
    """As many requests wait as may wait. Metadata: `depth`, `capacity`."""


class CallerLimit(Exhausted):
    """This caller has as many requests open as one caller may. Metadata: `open`, `limit`."""


class SlowConsumer(Exhausted):
    """The stream was read too slowly and the server ended it. Metadata: `buffered_tokens`."""


class OutOfMemory(Exhausted):
    """Device memory ran out while serving this request."""


class DeadlineExceeded(LdaClientError):
    """The deadline of the call, `timeout_s` or `Timeout`, went by. `time_budget_s` ends early without an error."""


class DeadlineTooShort(DeadlineExceeded):
    """Refused at once: the expected wait is longer than the deadline. Metadata: `expected_wait_ms`, `remaining_ms`."""


class Aborted(LdaClientError):
    """An operator or a shutdown ended the call."""


class InternalServerError(LdaClientError):
    """A fault of the server; its log holds more under the same id. Metadata: `request_id`."""


class StreamBroken(LdaClientError):
    """The stream ended or went on against the contract, such as an OK end before every sequence finished."""


ERRORS_BY_REASON: dict[int, type[LdaClientError]] = {
    pb.ERROR_REASON_UNSPECIFIED: LdaClientError,
    pb.ERROR_REASON_VALIDATION_FAILED: ValidationFailed,
    pb.ERROR_REASON_CONTEXT_EXCEEDED: ContextExceeded,
    pb.ERROR_REASON_PROMPT_UNUSABLE: PromptUnusable,
    pb.ERROR_REASON_NO_CHAT_TEMPLATE: NoChatTemplate,
    pb.ERROR_REASON_TOKENIZERS_INCOMPATIBLE: TokenizersIncompatible,
    pb.ERROR_REASON_LIMIT_EXCEEDED: LimitExceeded,
    pb.ERROR_REASON_QUEUE_FULL: QueueFull,
    pb.ERROR_REASON_SLOW_CONSUMER: SlowConsumer,
    pb.ERROR_REASON_LOADING: Loading,
    pb.ERROR_REASON_DRAINING: Draining,
    pb.ERROR_REASON_WORKER_DIED: WorkerDied,
    pb.ERROR_REASON_OUT_OF_MEMORY: OutOfMemory,
    pb.ERROR_REASON_ABORTED: Aborted,
    pb.ERROR_REASON_INTERNAL: InternalServerError,
    pb.ERROR_REASON_DEADLINE_TOO_SHORT: DeadlineTooShort,
    pb.ERROR_REASON_CALLER_LIMIT: CallerLimit,
    pb.ERROR_REASON_UNAUTHENTICATED: Unauthenticated,
    pb.ERROR_REASON_PERMISSION_DENIED: PermissionDenied,
    pb.ERROR_REASON_UNKNOWN_GENERATION: UnknownGeneration,
}

# For a status without a reason we know: one made by gRPC itself, a proxy, or a newer server.
ERRORS_BY_CODE: dict[grpc.StatusCode, type[LdaClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestRejected,
    grpc.StatusCode.FAILED_PRECONDITION: RequestRejected,
    grpc.StatusCode.OUT_OF_RANGE: RequestRejected,
    grpc.StatusCode.NOT_FOUND: RequestRejected,
    grpc.StatusCode.ALREADY_EXISTS: RequestRejected,
    grpc.StatusCode.UNIMPLEMENTED: RequestRejected,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.CANCELLED: Aborted,
    grpc.StatusCode.INTERNAL: InternalServerError,
    grpc.StatusCode.UNKNOWN: InternalServerError,
    grpc.StatusCode.DATA_LOSS: InternalServerError,
}


def error_from_rpc(error: grpc.RpcError, target: str, *, answered: bool = False) -> LdaClientError:
    """Turn the error of a call, sync or asyncio, into its class.

    Args:
        error: what grpc raised; it carries code, details and trailing metadata.
        target: the address called, for the message.
        answered: whether the server had begun to answer, so that the connection was lost and not refused.
    """
    code = error.code()
    details = _Details.read(error)
    reason = details.info.reason or None
    kind = ERRORS_BY_REASON.get(_reason_number(reason)) if reason else None
    message = error.details() or code.name
    if reason is None and code is grpc.StatusCode.UNAVAILABLE:
        kind, message = ServerAway, _away(message, target, answered)
    return (kind or ERRORS_BY_CODE.get(code, LdaClientError))(
        message,
        code=code,
        reason=reason,
        metadata=details.info.metadata,
        retry_after_s=details.retry_after_s,
        violations=details.violations,
    )


def server_away(target: str, waited_s: float) -> ServerAway:
    """The error for a connection that did not come up in time."""
    return ServerAway(_away(f"no connection within {waited_s:g} s", target, answered=False))


def _away(cause: str, target: str, answered: bool) -> str:
    if answered:
        return f"The connection to {target} was lost before the answer was complete ({cause})."
    return (
        f"No LDA server answers at {target} ({cause}): "
        "start it with `lda-service serve`, or give another address with --target."
    )


def _reason_number(reason: str) -> int:
    """The enum value of a reason on the wire; -1 for one that a newer server knows and we do not."""
    return dict(pb.ErrorReason.items()).get(_REASON_PREFIX + reason, -1)


class _Details(NamedTuple):
    """The `google.rpc` details of a status that we read; empty where the status has none."""

    info: error_details_pb2.ErrorInfo
    violations: tuple[Violation, ...]
    retry_after_s: float | None

    @classmethod
    def read(cls, error: grpc.RpcError) -> _Details:
        status = _packed_status(error)
        info = _detail(status, error_details_pb2.ErrorInfo)
        bad = _detail(status, error_details_pb2.BadRequest)
        retry = _detail(status, error_details_pb2.RetryInfo)
        if info is None or info.domain != ERROR_DOMAIN:
            info = error_details_pb2.ErrorInfo()
        return cls(
            info,
            tuple(Violation(item.field, item.description) for item in bad.field_violations) if bad else (),
            retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
        )


def _packed_status(error: grpc.RpcError) -> status_pb2.Status:
    """The status in the trailing metadata; an empty one if there is none or it cannot be read."""
    metadata: Iterable[Any] = error.trailing_metadata() or ()
    packed = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:
        return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[MessageT]) -> MessageT | None:
    """The first detail of this kind."""
    for item in status.details:
        if item.Is(kind.DESCRIPTOR):
            found = kind()
            item.Unpack(found)
            return found
    return None
