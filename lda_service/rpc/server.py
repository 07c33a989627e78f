"""Builds the gRPC server, starts it, and stops it without hurting the streams it carries.

Owns the listening port, the worker client and the order of things at start and stop. Knows nothing of what the methods
do.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from lda_client.gen.lda.v1 import admin_service_pb2_grpc, completion_service_pb2_grpc, lda_service_pb2_grpc

from lda_service.errors import Aborted, ConfigError, PortInUse
from lda_service.prompting import PromptRenderer
from lda_service.rpc import access
from lda_service.rpc.admin import AdminServicer
from lda_service.rpc.completions import CompletionServicer
from lda_service.rpc.generations import Generations
from lda_service.rpc.health import NOT_SERVING, SERVICE, SERVING, HealthServicer
from lda_service.rpc.interceptors import FaultLayer, LayersInterceptor, RequestIdInterceptor, ValidationLayer
from lda_service.rpc.observation import Telemetry, TelemetryLayer
from lda_service.rpc.servicer import LdaServicer
from lda_service.rpc.tls import server_credentials
from lda_service.rpc.tracing import Tracing, open_tracing
from lda_service.worker.client import WorkerClient, WorkerState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lda_service.config import Config
    from lda_service.pair_info import PairInfo
    from lda_service.rpc.convert import Prompter

METADATA_BYTES_SOFT_MAX, METADATA_BYTES_MAX = 8 << 10, 16 << 10
STOP_MARGIN_S = 1.0
COMPLETIONS, ADMIN = "lda.v1.CompletionService", "lda.v1.AdminService"
# Calls that are on their way when a drain begins get DRAINING, which clients retry; gRPC would just cancel them.
DRAIN_NOTICE_S = 0.1

# There is no maximum_concurrent_rpcs: it would refuse health checks of a busy server. The engine's queue is the limit.
OPTIONS = (
    # Clients and proxies may ping through a long prefill. A key that gRPC does not know is ignored silently.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Finds peers that vanished, which frees their rows.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_metadata_size", METADATA_BYTES_SOFT_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    # Otherwise a second server binds the same port and takes half of the calls.
    ("grpc.so_reuseport", 0),
)

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class LdaServer:
    """One server: a port, a health service, and the worker behind it.

    Args:
        config: settings.
        factory: "module:function" that makes the engine, resolved in the worker process; None: that of the backend.
        load_prompter: makes the prompt renderer of a model id; runs in a thread.
        tracing: where traces go; by default where the settings and the OTEL_ variables say.
    """

    def __init__(
        self,
        config: Config,
        factory: str | None = None,
        load_prompter: Callable[[str], Prompter] = PromptRenderer.load,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._load_prompter = load_prompter
        self._health = HealthServicer("", SERVICE)
        self.telemetry = Telemetry(config.telemetry, tracing or open_tracing(config.telemetry.traces))
        self.worker = WorkerClient(config, factory, self._worker_changed, self.telemetry.metrics.load_changed)
        self.generations = Generations(self.worker, config, self.telemetry)
        self._credentials = server_credentials(config.access)
        self.health_port = config.access.health_port  # the one listened on, from `start` on
        self._probed: grpc.aio.Server | None = None
        self._server = grpc.aio.server(
            interceptors=(
                RequestIdInterceptor(),
                *access.interceptors(config.access, self.telemetry.metrics.access_was_refused),
                LayersInterceptor(FaultLayer(), TelemetryLayer(self.telemetry), ValidationLayer()),
            ),
            options=(
                *OPTIONS,
                ("grpc.max_receive_message_length", config.server.max_message_bytes),
                ("grpc.max_send_message_length", config.server.max_message_bytes),
            ),
        )

    async def start(self) -> int:
        """Listen, then begin to load the models; the port listened on.

        Raises:
            PortInUse: an address is taken. No model has been touched then.
            ConfigError: an address cannot be listened on for another reason.
        """
        config = self._config.server
        port = _listen(self._server, config.host, config.port, self._credentials)
        access.tell_exposure(self._config.access, config.host, port)
        self.telemetry.start()
        self._add_services()
        await self._serve_probes()
        await self._server.start()
        self._health.set("", SERVING)
        self.worker.start()
        return port

    def _add_services(self) -> None:
        settings, server, generations = self._config.server, self._server, self.generations
        names = [SERVICE, COMPLETIONS, health.SERVICE_NAME]
        lda_service_pb2_grpc.add_LdaServiceServicer_to_server(LdaServicer(generations), server)
        completion_service_pb2_grpc.add_CompletionServiceServicer_to_server(CompletionServicer(generations), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.has_admin:
            admin_service_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(generations), server)
            names.append(ADMIN)
        if settings.has_reflection:
            reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)

    async def _serve_probes(self) -> None:
        """Health checks on a port of their own: a kubelet can show neither certificate nor token."""
        if self.health_port is None:
            return
        self._probed = grpc.aio.server(
            interceptors=(RequestIdInterceptor(), LayersInterceptor(FaultLayer())), options=OPTIONS
        )
        host = self._config.server.host
        self.health_port = _listen(self._probed, host, self.health_port, setting="HEALTH_PORT")
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probed)
        await self._probed.start()

    async def ready(self) -> PairInfo:
        """Wait until the pair is loaded and warmed up, then serve.

        Raises:
            LdaError: it cannot be loaded.
        """
        loading = asyncio.to_thread(self._load_prompter, self._config.pair.model_after_id)
        pair, self.generations.prompter = await asyncio.gather(self.worker.ready(), loading)
        # What was loaded stays: looking through it for garbage would hold up every stream for tens of milliseconds.
        gc.collect()
        gc.freeze()
        self._follow_worker(self.worker.state)
        return pair

    async def drain_and_stop(self, grace_s: float | None = None) -> None:
        """Stop taking work, let running streams end within the grace period, end the rest, stop the worker.

        Called again with a shorter grace period, that one holds.
        """
        grace_s = self._config.server.drain_grace_s if grace_s is None else grace_s
        log.info("draining for up to %.0f s with %d open streams", grace_s, self.worker.open_streams)
        self.generations.draining = True
        self._health.drain()
        await asyncio.sleep(min(DRAIN_NOTICE_S, grace_s))
        stopped = asyncio.ensure_future(self._server.stop(grace_s + STOP_MARGIN_S))
        await asyncio.wait({stopped}, timeout=grace_s)
        self.worker.fail_streams(Aborted("The server is shutting down and ended this stream."))
        await stopped
        if self._probed is not None:
            await self._probed.stop(0.0)
        await self.worker.close()
        await self.telemetry.close()
        log.info("stopped")

    def _worker_changed(self, state: WorkerState) -> None:
        self.telemetry.follow_worker(state)
        self._follow_worker(state)

    def _follow_worker(self, state: WorkerState) -> None:
        """The service is healthy while the worker is ready and prompts can be rendered."""
        serving = state is WorkerState.READY and self.generations.prompter is not None
        self._health.set(SERVICE, SERVING if serving else NOT_SERVING)


def _listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    setting: str = "PORT",
) -> int:
    """Bind an address; the port that it got. `setting` is what gave the port."""
    address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise _bind_error(host.strip("[]"), port, setting) from error


def _bind_error(host: str, port: int, setting: str) -> PortInUse | ConfigError:
    """Why an address cannot be bound: gRPC does not say, a plain socket does."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            reason = "gRPC could not bind to it"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return PortInUse(
                f"Another process listens on {host}:{port}; stop it, or choose another port with {setting} or "
                f"--{setting.lower().replace('_', '-')} (0 picks a free one)."
            )
        reason = error.strerror or str(error)
    return ConfigError(f"Cannot listen on {host}:{port}: {reason}; choose another HOST or {setting}.")


async def run(
    server: LdaServer,
    on_listening: Callable[[int], None],
    on_ready: Callable[[PairInfo], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Start, serve until SIGTERM or SIGINT or `stop`, drain. A second signal stops at once.

    Raises:
        LdaError: the server cannot start.
    """
    first, second = stop or asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (second if first.is_set() else first).set())
    on_listening(await server.start())
    try:
        pair = await _unless(first, server.ready())
    except BaseException:
        await server.drain_and_stop(0.0)
        raise
    if pair is not None:
        on_ready(pair)
    await first.wait()
    draining = asyncio.ensure_future(server.drain_and_stop())
    await _unless(second, asyncio.shield(draining))
    if not draining.done():
        await server.drain_and_stop(0.0)
    await draining


async def _unless(event: asyncio.Event, work: Awaitable[_Result]) -> _Result | None:
    """The result of the work, or None if the event came first; the work is cancelled then."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
