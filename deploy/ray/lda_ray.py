"""The service as a Ray Serve application: `serve run deploy/ray/serve.yaml`.

Each replica runs a whole `LdaServer` on a loopback port and hands to it, byte for byte, what Serve hands over. So
checks, errors, access and telemetry are the server's own. Knows names of methods and statuses; nothing of messages.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lda_client.gen.lda.v1 import completion_service_pb2, lda_service_pb2
from ray import serve
from ray.serve.exceptions import RayServeException

# The server is imported where it is made: Serve's proxies import this module too.
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ray.serve.grpc_util import RayServegRPCContext

    from lda_service.rpc.server import LdaServer

SERVICES = (
    lda_service_pb2.DESCRIPTOR.services_by_name["LdaService"],
    completion_service_pb2.DESCRIPTOR.services_by_name["CompletionService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
LDA_SERVICE = SERVICES[0].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING

# Without it, calls come through a proxy in Python that takes no notice of a cancel while it writes, and that takes
# trailers from results alone.
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
# In a trailer, beside the server's headers: Serve has no headers.
REPLICA_KEY = "x-ray-replica"
# Between the end of the worker and that of the replica, for the last statuses to get out.
LAST_WORDS_S = 0.5
HEALTH_TIMEOUT_S = 5.0
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


class Raw(bytes):
    """A message as it came. Serve asks every result for its bytes."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The bytes."""
        return bytes(self)


class Replica:
    """One server with its worker.

    Args:
        make_server: makes the server; it listens on a loopback port.
    """

    async def __init__(self, make_server: Callable[[], LdaServer]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._id = serve.get_replica_context().replica_id.unique_id
        self._server = make_server()
        port = await self._server.start()
        await self._server.ready()
        # The stubs know neither messages as bytes nor the health service.
        self._channel: Any = grpc.aio.insecure_channel(f"127.0.0.1:{port}", CHANNEL_OPTIONS)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._watching = asyncio.create_task(self._end_with_worker())

    async def check_health(self) -> None:
        """Called by Serve now and then, which replaces the replica if this fails three times."""
        request = health_pb2.HealthCheckRequest(service=LDA_SERVICE)
        reply = await self._health.Check(request, timeout=HEALTH_TIMEOUT_S)
        if reply.status != SERVING:
            raise RuntimeError("The server does not serve.")

    async def stream(self, path: str, request: bytes, context: RayServegRPCContext) -> AsyncIterator[Raw]:
        """Pass on a call with many answers."""
        call = self._channel.unary_stream(path, None, Raw)(request, metadata=_metadata(context))
        try:
            self._name(context, await call.initial_metadata())
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            self._fail(context, error)
        finally:
            call.cancel()

    async def unary(self, path: str, request: bytes, context: RayServegRPCContext) -> Raw:
        """Pass on a call with one answer."""
        call = self._channel.unary_unary(path, None, Raw)(request, metadata=_metadata(context))
        try:
            self._name(context, await call.initial_metadata())
            message: Raw = await call
            return message
        except grpc.aio.AioRpcError as error:
            self._fail(context, error)
            return Raw()
        finally:
            call.cancel()

    def _name(self, context: RayServegRPCContext, headers: Any) -> None:
        context.set_trailing_metadata([*headers, (REPLICA_KEY, self._id)])

    def _fail(self, context: RayServegRPCContext, error: grpc.aio.AioRpcError) -> None:
        context.set_code(error.code())
        context.set_details(error.details() or "")
        self._name(context, error.trailing_metadata())

    async def _end_with_worker(self) -> None:
        """End when the worker does, instead of waiting for a fresh one.

        Serve drops a process that is gone at once; one that is up and refuses has the shortest queue, and would be
        given every call.
        """
        async for reply in self._health.Watch(health_pb2.HealthCheckRequest(service=LDA_SERVICE)):
            if reply.status != SERVING:
                break
        await asyncio.sleep(LAST_WORDS_S)
        os._exit(1)


def _metadata(context: RayServegRPCContext) -> list[tuple[str, str]]:
    """What the caller sent; gRPC sets the rest."""
    return [(key, value) for key, value in context.invocation_metadata() if key != "user-agent"]


def _method(path: str, streams: bool) -> Callable[..., Any]:
    """A method as Serve wants it: of the name of the rpc, with this name for the context."""

    async def stream(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> AsyncIterator[Raw]:
        async for message in self.stream(path, request, grpc_context):
            yield message

    async def unary(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> Raw:
        return await self.unary(path, request, grpc_context)

    return stream if streams else unary


for _service in SERVICES:
    for _rpc in _service.methods:
        setattr(Replica, _rpc.name, _method(f"/{_service.full_name}/{_rpc.name}", _rpc.server_streaming))

# Serve must not queue: waiting, and refusing with a reason, is the server's own, which has 64 rows and 256 places.
Lda = serve.deployment(name="Lda", max_ongoing_requests=1024, health_check_period_s=2)(Replica)


def add_to_server(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the methods, without any reading of messages.

    HAProxy turns to Serve's proxy in Python while no replica is up; that one says so, instead of passing calls on.
    """
    passes = _in_replica()
    for service in SERVICES:
        if not passes:
            server.add_passthrough_service(service.full_name)
        handlers: dict[str, Any] = {
            rpc.name: (
                grpc.unary_stream_rpc_method_handler if rpc.server_streaming else grpc.unary_unary_rpc_method_handler
            )(getattr(servicer, rpc.name) if passes else _unavailable)
            for rpc in service.methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _in_replica() -> bool:
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


async def _unavailable(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "No replica is up; try again shortly.")


def app(args: dict[str, str]) -> serve.Application:
    """The application. Its one argument, `flags`, are flags of `lda-service serve`; their variables count too."""
    return Lda.bind(partial(make_server, args.get("flags", "")))


def make_server(flags: str) -> LdaServer:
    """The server that `lda-service serve` would run, on a free loopback port.

    Raises:
        ConfigError: a setting is impossible, or secures the port that only this process calls; or calls do not come
            through HAProxy.
    """
    from lda_service import cli
    from lda_service.errors import ConfigError
    from lda_service.rpc.server import LdaServer
    from lda_service.telemetry import configure_logging

    if os.environ.get(HAPROXY) != "1":
        raise ConfigError(
            f"Serve's own proxy loses cancels and the details of errors; set {HAPROXY}=1 for `ray start`."
        )
    with cli.serve.make_context("serve", shlex.split(flags)) as context:
        config = cli._config(context.params)
    if config.access.tls_cert is not None:
        raise ConfigError("Ray Serve speaks plain text; leave out TLS_CERT, and put TLS before Serve's port.")
    configure_logging(config.telemetry.log_format, config.telemetry.log_level)
    return LdaServer(replace(config, server=replace(config.server, host="127.0.0.1", port=0)))
