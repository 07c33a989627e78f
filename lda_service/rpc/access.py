"""Who calls. Knows what gRPC says about a peer; nothing of methods."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

# The name of an authenticated caller; set for each call where callers are authenticated.
caller_name: ContextVar[str] = ContextVar("caller_name", default="")


def caller_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The authenticated name of the caller, or the address it calls from."""
    # "ipv4:127.0.0.1:50123", "ipv6:%5B::1%5D:50123", "unix:": a port is no identity.
    return caller_name.get() or str(context.peer()).rpartition(":")[0]
