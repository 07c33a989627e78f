"""Every error this package raises on purpose, and what the wire makes of it.

    LdaError
    ├── RequestError            the caller's request cannot be served as it stands
    │   ├── InvalidRequest          a field breaks a rule
    │   ├── ContextExceeded         prompt and output do not fit the context window
    │   ├── PromptUnusable          the prompt renders to nothing, or holds ids outside the shared vocabulary
    │   ├── NoChatTemplate          a chat was sent to a pair without a template
    │   ├── LimitExceeded           legal, but above a limit of this server
    │   └── UnknownGeneration       no generation of this id is open
    ├── AccessError             the caller may not do this
    │   ├── Unauthenticated         no token, an unknown or an expired one
    │   └── PermissionDenied        the token does not allow it
    ├── Refused                 not now; the same request may succeed later or elsewhere
    │   ├── QueueFull
    │   ├── CallerLimit             this caller has enough open
    │   ├── DeadlineTooShort        it would wait longer than it has time
    │   ├── Loading
    │   └── Draining
    ├── StreamEnded             a running request was ended by the server
    │   ├── SlowConsumer
    │   ├── WorkerDied
    │   ├── OutOfMemory
    │   └── Aborted
    ├── StartupError            the server or the library cannot start; never sent to a client
    │   ├── ConfigError
    │   ├── ModelNotFound
    │   ├── ModelUnreadable
    │   ├── ModelUnsupported
    │   ├── PairIncompatible
    │   ├── PortInUse
    │   └── EnvoyEnded              the HTTP front could not start, or died
    └── InternalError           our own fault; its text stays in the log

Each class carries the name of its gRPC status code and of its `ErrorReason` (`proto/lda/v1/lda_service.proto`). This
module knows neither gRPC nor torch: `rpc` turns the names into a status.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LdaError(Exception):
    """Base of all. `message` says what is wrong and names the remedy; it is safe to show to a caller.

    Args:
        message: one or two sentences, without paths of the server or text of other exceptions.
        field: path of the request field at fault, such as `sampling.top_p`.
        metadata: the machine-readable facts that `ErrorReason` documents for the reason.
        retry_after_s: when trying again makes sense, if it does.
    """

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.metadata = metadata or {}
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.field, self.metadata, self.retry_after_s)


def _rebuild(
    kind: type[LdaError], message: str, field: str | None, metadata: dict[str, str], retry_after_s: float | None
) -> LdaError:
    """Unpickle: errors cross from the worker to the server process."""
    return kind(message, field=field, metadata=metadata, retry_after_s=retry_after_s)


class RequestError(LdaError):
    """The caller's request cannot be served as it stands."""

    code = "INVALID_ARGUMENT"
    reason = "VALIDATION_FAILED"


class InvalidRequest(RequestError):
    """A field breaks a rule of the contract."""


class ContextExceeded(RequestError):
    """Prompt and output do not fit the context window."""

    reason = "CONTEXT_EXCEEDED"


class PromptUnusable(RequestError):
    """The prompt renders to no tokens, or holds ids outside the shared vocabulary."""

    reason = "PROMPT_UNUSABLE"


class NoChatTemplate(RequestError):
    """A chat was sent to a pair without a chat template."""

    code = "FAILED_PRECONDITION"
    reason = "NO_CHAT_TEMPLATE"


class LimitExceeded(RequestError):
    """A value is legal, but above a limit of this server."""

    reason = "LIMIT_EXCEEDED"


class UnknownGeneration(RequestError):
    """No generation of this id is open on this server."""

    code = "NOT_FOUND"
    reason = "UNKNOWN_GENERATION"


class AccessError(LdaError):
    """The caller may not do this. The message tells nothing about what is served."""


class Unauthenticated(AccessError):
    """No bearer token, or one that is unknown or expired."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(AccessError):
    """The token or the client certificate does not allow this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Refused(LdaError):
    """Not now; the same request may succeed later or on another server."""

    code = "UNAVAILABLE"


class QueueFull(Refused):
    """As many requests wait as may wait."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class CallerLimit(Refused):
    """This caller has as many requests open as one caller may."""

    code = "RESOURCE_EXHAUSTED"
    reason = "CALLER_LIMIT"


class DeadlineTooShort(Refused):
    """The expected wait is longer than the time that the call has left."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_TOO_SHORT"


class Loading(Refused):
    """The models are still being loaded or warmed up."""

    reason = "LOADING"


class Draining(Refused):
    """The server is shutting down."""

    reason = "DRAINING"


class StreamEnded(LdaError):
    """A running request was ended by the server."""


class SlowConsumer(StreamEnded):
    """The caller reads too slowly."""

    code = "RESOURCE_EXHAUSTED"
    reason = "SLOW_CONSUMER"


class WorkerDied(StreamEnded):
    """The process that owns the models died."""

    code = "UNAVAILABLE"
    reason = "WORKER_DIED"


class OutOfMemory(StreamEnded):
    """Device memory ran out while serving this request."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class Aborted(StreamEnded):
    """An operator or a shutdown ended the stream."""

    code = "ABORTED"
    reason = "ABORTED"


class StartupError(LdaError):
    """The server or the library cannot start. Shown to the operator, never sent to a client."""

    code = "FAILED_PRECONDITION"


class ConfigError(StartupError):
    """A setting has an impossible value."""


class ModelNotFound(StartupError):
    """A model id names neither a local folder nor a repository that can be reached."""


class ModelUnreadable(StartupError):
    """A model was found but cannot be read: permissions, broken or missing files."""


class ModelUnsupported(StartupError):
    """A model was read but this engine cannot run it."""


class PairIncompatible(StartupError):
    """The two vocabularies do not match, so their logits cannot be subtracted."""

    reason = "TOKENIZERS_INCOMPATIBLE"


class PortInUse(StartupError):
    """Another process listens on the address."""


class EnvoyEnded(StartupError):
    """The proxy that carries HTTP could not start, or died."""


class InternalError(LdaError):
    """Our own fault. The text sent is fixed; the cause stays in the log."""
