"""Typed client for the LDA service: logit diff amplification over gRPC.

    from lda_client import LdaClient

    with LdaClient() as client:
        for completion in client.complete("Who are you?", alpha=2.0, num_sequences=4):
            print(completion.text)

`AsyncLdaClient` has the same verbs for asyncio. `pb` holds the messages of the contract.
"""

from lda_client._channel import DEFAULT_TARGET, Timeout, Tls
from lda_client._client import LdaClient
from lda_client._client_async import AsyncLdaClient
from lda_client._errors import (
    Aborted,
    AccessDenied,
    CallerLimit,
    ContextExceeded,
    DeadlineExceeded,
    DeadlineTooShort,
    Draining,
    Exhausted,
    InternalServerError,
    LdaClientError,
    LimitExceeded,
    Loading,
    NoChatTemplate,
    OutOfMemory,
    PermissionDenied,
    PromptUnusable,
    QueueFull,
    RequestRejected,
    ServerAway,
    SlowConsumer,
    StreamBroken,
    TokenizersIncompatible,
    Unauthenticated,
    Unavailable,
    UnknownGeneration,
    ValidationFailed,
    Violation,
    WorkerDied,
)
from lda_client._gather import Completion, Completions, ScoredText, TextPiece
from lda_client._requests import GenerateBothOptions, GenerateOptions
from lda_client._stream import AsyncGenerateStream, AsyncScoreStream, GenerateStream, ScoreStream
from lda_client._version import __version__
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

TokenIds = pb.TokenIds

__all__ = [
    "DEFAULT_TARGET",
    "Aborted",
    "AccessDenied",
    "AsyncGenerateStream",
    "AsyncLdaClient",
    "AsyncScoreStream",
    "CallerLimit",
    "Completion",
    "Completions",
    "ContextExceeded",
    "DeadlineExceeded",
    "DeadlineTooShort",
    "Draining",
    "Exhausted",
    "GenerateBothOptions",
    "GenerateOptions",
    "GenerateStream",
    "InternalServerError",
    "LdaClient",
    "LdaClientError",
    "LimitExceeded",
    "Loading",
    "NoChatTemplate",
    "OutOfMemory",
    "PermissionDenied",
    "PromptUnusable",
    "QueueFull",
    "RequestRejected",
    "ScoreStream",
    "ScoredText",
    "ServerAway",
    "SlowConsumer",
    "StreamBroken",
    "TextPiece",
    "Timeout",
    "Tls",
    "TokenIds",
    "TokenizersIncompatible",
    "Unauthenticated",
    "Unavailable",
    "UnknownGeneration",
    "ValidationFailed",
    "Violation",
    "WorkerDied",
    "__version__",
    "pb",
]
