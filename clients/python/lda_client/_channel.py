"""How a channel to the service is set up: address, credentials, deadlines, retries, keepalive, message limits.

Shared by the sync and the asyncio client. Knows nothing of requests, streams or errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from lda_client._version import __version__

if TYPE_CHECKING:
    import grpc

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_BYTES_MAX = 20 << 20
SERVICE_NAME = "lda.v1.LdaService"

# Only UNAVAILABLE: the server sends it before any work was done. gRPC itself never retries once a stream has begun.
_SERVICE_CONFIG = {
    # Of several addresses behind one name, each call goes to the next.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE_NAME}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

# Pings while a call is open, so that a dead peer is noticed during a long silent prefill; none on an idle connection.
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.primary_user_agent", f"lda-client-python/{__version__}"),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)


@dataclass(frozen=True)
class Timeout:
    """How long to wait, by phase, in seconds; None waits as long as it takes.

        Timeout()                    no deadline for streams; a server that is away is reported at once
        Timeout(connect_s=10)        give the server 10 s to come up before the first word of a call
        Timeout(total_s=60)          every stream ends within 60 s, or with `DeadlineExceeded`
        Timeout(lookup_s=5)          `model_pair` and `tokenizer_compat` answer within 5 s

    Attributes:
        connect_s: longest wait for a connection; None does not wait for a server that refuses.
        total_s: deadline of `generate`, `generate_both`, `score` and `complete`, from call to last event.
        lookup_s: deadline of the short calls.
    """

    connect_s: float | None = None
    total_s: float | None = None
    lookup_s: float | None = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Timeout.{name} is {value}; give a positive number of seconds, or None.")


class CallOptions(TypedDict):
    """The keyword arguments of a gRPC call that both clients pass."""

    timeout: float | None
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Connection:
    """Everything a client was told about how to reach the server. The token is left out of its repr."""

    target: str = DEFAULT_TARGET
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    timeout: Timeout = Timeout()

    def stream_options(self, timeout_s: float | None) -> CallOptions:
        """Deadline and metadata of a streaming call."""
        return self._options(self.timeout.total_s if timeout_s is None else timeout_s)

    def lookup_options(self, timeout_s: float | None) -> CallOptions:
        """Deadline and metadata of a short call."""
        return self._options(self.timeout.lookup_s if timeout_s is None else timeout_s)

    def _options(self, timeout_s: float | None) -> CallOptions:
        metadata = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return {"timeout": timeout_s, "metadata": metadata}
