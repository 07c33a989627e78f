"""The standard health service, grpc.health.v1.

Knows names and statuses; others decide when they change. `Watch` reports every change, stays open, and ends by itself
when the server drains: an open stream would otherwise hold up the stop for the whole grace period.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lda_service.errors import Draining

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    Request = health_pb2.HealthCheckRequest
    Response = health_pb2.HealthCheckResponse

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "lda.v1.LdaService"
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def check(
    host: str,
    port: int,
    timeout_s: float,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str | None = None,
) -> str:
    """The status of the service at an address, as a caller sees it: SERVING, NOT_SERVING, or why there is none.

    Args:
        host: name or address.
        port: of the service, or its health port.
        timeout_s: how long to wait.
        credentials: None speaks plain text.
        server_name: that the certificate must carry, where it is not the host.
    """
    target, options = f"{host}:{port}", [("grpc.ssl_target_name_override", server_name)] if server_name else []
    with grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the status of each name; all start as NOT_SERVING.

    Args:
        names: the services reported on; "" is the process as a whole.
    """

    def __init__(self, *names: str) -> None:
        self._status: dict[str, int] = dict.fromkeys(names, NOT_SERVING)
        self._changed = asyncio.Event()  # replaced at every change, so that no watcher misses one
        self._draining = False

    def set(self, name: str, status: int) -> None:
        """Change a status and tell the watchers. While draining, nothing changes any more."""
        if not self._draining:
            self._status[name] = status
            self._notify()

    def drain(self) -> None:
        """Everything becomes NOT_SERVING for good; watchers see that, then their streams end."""
        self._status = dict.fromkeys(self._status, NOT_SERVING)
        self._draining = True
        self._notify()

    async def Check(self, request: Request, context: grpc.aio.ServicerContext[Any, Any]) -> Response:  # noqa: N802
        """The status now."""
        if request.service not in self._status:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"known names: {', '.join(map(repr, self._status))}")
        return health_pb2.HealthCheckResponse(status=self._status[request.service])

    async def List(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        """Every status now."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._status.items()}
        # The type stubs are older than this method.
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def Watch(  # noqa: N802
        self, request: Request, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Response]:
        """The status now and at every change."""
        seen = None
        while True:
            changed = self._changed
            status = self._status.get(request.service, SERVICE_UNKNOWN)
            if status != seen:
                yield health_pb2.HealthCheckResponse(status=status)
                seen = status
            elif self._draining:
                raise Draining("The server is shutting down.")
            else:
                await changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
