"""How a channel to the service is set up: address, credentials, deadlines, retries, keepalive, message limits.

Shared by the sync and the asyncio client. Knows nothing of requests, streams or errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import grpc

from lda_client._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

ChannelT = TypeVar("ChannelT")

DEFAULT_TARGET = "127.0.0.1:50051"
MESSAGE_BYTES_MAX = 20 << 20
SERVICE_NAME = "lda.v1.LdaService"

# What `deploy/envoy/envoy-affinity.yaml` and meshes choose a server by.
AFFINITY_HEADER = "x-lda-prompt-hash"

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
    # A request that is larger than this is not kept for a second attempt.
    ("grpc.per_rpc_retry_buffer_size", MESSAGE_BYTES_MAX),
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


@dataclass(frozen=True)
class Tls:
    """TLS with the server. Each file is PEM: its path, or its content as bytes.

        Tls()                                           trust the authorities of this machine
        Tls(ca="ca.pem")                                trust these
        Tls("ca.pem", certificate="me.pem", key="me.key")   and show who we are

    Attributes:
        ca: authorities to trust; None trusts those of this machine.
        certificate: ours, for a server that asks for one.
        key: the private key of our certificate.
        server_name: the name that the certificate of the server carries, where it is not that of the target.
    """

    ca: str | Path | bytes | None = None
    certificate: str | Path | bytes | None = field(default=None, repr=False)
    key: str | Path | bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("Tls: certificate and key go together.")

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC takes. Raises OSError for a file that cannot be read."""
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))


def _pem(source: str | Path | bytes | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


class CallOptions(TypedDict):
    """The keyword arguments of a gRPC call that both clients pass."""

    timeout: float | None
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Connection:
    """Everything a client was told about how to reach the server. The token is left out of its repr."""

    target: str = DEFAULT_TARGET
    credentials: Tls | grpc.ChannelCredentials | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    timeout: Timeout = Timeout()

    def open(self, secure: Callable[..., ChannelT], insecure: Callable[..., ChannelT]) -> ChannelT:
        """A channel, made by the functions of grpc or of grpc.aio."""
        credentials, options = self.credentials, CHANNEL_OPTIONS
        if credentials is None:
            return insecure(self.target, options=options)
        if isinstance(credentials, Tls):
            if credentials.server_name:
                options = (*options, ("grpc.ssl_target_name_override", credentials.server_name))
            credentials = credentials.credentials()
        return secure(self.target, credentials, options=options)

    def stream_options(self, timeout_s: float | None, affinity: str) -> CallOptions:
        """Deadline and metadata of a streaming call; calls of equal affinity belong on one server."""
        return self._options(self.timeout.total_s if timeout_s is None else timeout_s, (AFFINITY_HEADER, affinity))

    def lookup_options(self, timeout_s: float | None) -> CallOptions:
        """Deadline and metadata of a short call."""
        return self._options(self.timeout.lookup_s if timeout_s is None else timeout_s)

    def _options(self, timeout_s: float | None, *metadata: tuple[str, str]) -> CallOptions:
        token = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return {"timeout": timeout_s, "metadata": (*token, *metadata)}
