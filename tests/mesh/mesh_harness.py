"""Real Envoys before real server processes, on free ports, for the tests of the mesh.

The Envoys run the files of `deploy/envoy/`, with addresses, ports and folders put in; the servers are `replica.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import yaml
from lda_client.gen.lda.v1 import completion_service_pb2 as completion_pb
from lda_client.gen.lda.v1 import completion_service_pb2_grpc
from server_harness import Client, messages

from lda_service.envoy import descriptor_set
from lda_service.gateway import Envoy, ask_admin, envoy_binary

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Unset in the short form, which is part of every test run.
MESH_SECONDS = float(os.environ.get("MESH_SECONDS", "0"))
WAIT_S = 60.0
POLL_S = 0.02
# A client that tries again by itself would hide what Envoy does.
NO_RETRIES = (("grpc.enable_retries", 0),)


@dataclass(eq=False)
class Replica:
    """A server process, `replica.py`, started again on the same port if need be."""

    options: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    port: int = 0
    http_port: int | None = None
    worker_pid: int | None = None

    async def start(self, ready=True):
        paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(HERE / "replica.py"), json.dumps({**self.options, "port": self.port})),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment},
            stdout=subprocess.PIPE,
        )
        self.port = await self.told("listening")
        if "http" in self.options:
            self.http_port = await self.told("http")
        if ready:
            await self.ready()
        return self

    async def ready(self):
        self.worker_pid = await self.told("worker")
        await self.told("ready")

    async def told(self, what):
        """Wait for a line that begins so; the number after it."""
        async with asyncio.timeout(WAIT_S):
            line = (await self.process.stdout.readline()).decode().split()
        assert line, f"the server ended before it said {what!r}"
        assert line[0] == what
        return int(line[1]) if len(line) > 1 else None

    async def ended(self):
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()

    async def kill(self):
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.ended()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"


@dataclass(eq=False)
class Served(Replica):
    """`lda-service serve` with the bundled pair, or the one that `flags` name; `prefix` is put before the command."""

    flags: tuple[str, ...] = ("--deterministic",)
    prefix: tuple[str, ...] = ()

    async def start(self, ready=True):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MODEL_")}
        self.process = await asyncio.create_subprocess_exec(
            *(*self.prefix, sys.executable, "-m", "lda_service", "serve", "--port", str(self.port), *self.flags),
            env={**inherited, "LOG_LEVEL": "error", "OMP_NUM_THREADS": "1", **self.environment},
            stdout=subprocess.PIPE,
        )
        self.port = int((await self.said("listening on ")).rpartition(":")[2])
        if ready:
            await self.said("ready: ")
        return self

    async def said(self, beginning):
        """Wait for a line that begins so; the rest of it."""
        async with asyncio.timeout(2 * WAIT_S):
            while line := (await self.process.stdout.readline()).decode():
                if line.startswith(beginning):
                    return line.removeprefix(beginning).strip()
        raise AssertionError(f"the server ended before it said {beginning!r}")


@asynccontextmanager
async def running(servers):
    """These servers, ready, side by side."""
    try:
        await asyncio.gather(*(each.start() for each in servers))
        yield servers
    finally:
        await asyncio.gather(*(each.kill() for each in servers))


def replicas(count, **options):
    """That many servers over the fake engine, ready, side by side."""
    return running([Replica({"port": 0, **options}) for _ in range(count)])


@dataclass
class Front:
    """An Envoy that runs."""

    port: int
    admin: Path
    log: Path
    pid: int

    def hosts(self):
        """What Envoy says of each server: {port: {name of a figure: value}}, healthy among them."""
        status = json.loads(ask_admin(self.admin, "/clusters?format=json"))
        hosts = {}
        for host in status["cluster_statuses"][0].get("host_statuses", ()):
            figures = {each["name"]: int(each.get("value", 0)) for each in host["stats"]}
            health = host["health_status"]
            figures["healthy"] = health.get("eds_health_status") == "HEALTHY" and len(health) == 1
            hosts[host["address"]["socket_address"]["port_value"]] = figures
        return hosts

    def stat(self, name):
        """One figure of the cluster's."""
        stats = ask_admin(self.admin, f"/stats?filter=^cluster.lda.{name}$").decode()
        return int(stats.partition(": ")[2] or 0)

    async def until(self, condition):
        """Wait until Envoy sees its servers so."""
        deadline = time.perf_counter() + WAIT_S
        while not condition(await asyncio.to_thread(self.hosts)):
            assert time.perf_counter() < deadline, f"still: {self.hosts()}"
            await asyncio.sleep(POLL_S)

    async def all_healthy(self):
        await self.until(lambda hosts: all(each["healthy"] for each in hosts.values()))


@asynccontextmanager
async def front(name, ports, folder, change=lambda config: None):
    """Envoy with a file of `deploy/envoy/` before the servers on these ports. Certificates are taken from `folder`."""
    (folder / "lda.pb").write_bytes(descriptor_set())
    config = yaml.safe_load((ROOT / "deploy/envoy" / name).read_text().replace("/etc/lda/", f"{folder}/"))
    config["admin"]["address"] = {"pipe": {"path": str(folder / "admin.sock")}}
    config["static_resources"]["listeners"][0]["address"] = address(0)
    (log := folder / "access.log").touch()
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["access_log"][0]["typed_config"]["@type"] = (
        "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
    )
    manager["access_log"][0]["typed_config"]["path"] = str(log)
    endpoints = [{"endpoint": {"address": address(port)}} for port in ports]
    config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    change(config)
    envoy = Envoy(envoy_binary(), folder, config)
    await envoy.start()
    try:
        yield Front(await envoy.ready(), envoy.admin, log, envoy._process.pid)
    finally:
        await envoy.stop()


@dataclass(frozen=True)
class Logged:
    """One generation in the access log of envoy-affinity.yaml."""

    grpc_status: str
    flags: str
    attempts: int
    port: int | None  # of the server that had it last
    duration_ms: int
    prompt: str

    @property
    def is_cut(self):
        """Whether it ended otherwise than by its end, or by its caller: a survey leaves once a prompt is admitted."""
        return self.grpc_status != "OK" and not {"DC", "DR"} & set(self.flags.split(","))


LOGGED = re.compile(
    r"GenerateLDA \d+ grpc=(\S+) (\S+) attempts=(\d+) to=(?:\S+:)?(\d+|-) (\d+)ms .* prompt=(\S+)$", re.MULTILINE
)


def logged(front):
    """The generations that an Envoy has logged; all of them once it has stopped."""
    for status, flags, attempts, port, duration_ms, prompt in LOGGED.findall(front.log.read_text()):
        yield Logged(status, flags, int(attempts), None if port == "-" else int(port), int(duration_ms), prompt)


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@dataclass(frozen=True)
class Call:
    """What became of one call."""

    begun: bool  # response headers had arrived
    code: str
    details: str
    first_ms: float | None
    total_ms: float


async def call(client, text="hi", metadata=None, **fields):
    """One stream, read to its end."""
    started, first_ms = time.perf_counter(), None
    stream = client.generate(text, metadata=metadata, timeout=None, **fields)
    try:
        async for _ in messages(stream):
            first_ms = first_ms or 1e3 * (time.perf_counter() - started)
    except grpc.aio.AioRpcError:
        pass
    total_ms = 1e3 * (time.perf_counter() - started)
    headers = dict(await stream.initial_metadata())
    code = (await stream.code()).name
    return Call("x-generation-id" in headers, code, await stream.details(), first_ms, total_ms)


async def whole_answer(client, tokens):
    """One unary call of the earlier API; it begins and ends for its caller at the same moment."""
    started = time.perf_counter()
    stub = completion_service_pb2_grpc.CompletionServiceStub(client.channel)
    request = completion_pb.CompleteLDARequest(prompt="hi", max_new_tokens=tokens)
    answer = stub.CompleteLDA(request)
    code = (await answer.code()).name
    total_ms = 1e3 * (time.perf_counter() - started)
    return Call(False, code, await answer.details(), total_ms, total_ms)


class Load:
    """Callers that keep calling, on one channel, until told to stop.

    Args:
        port: of the Envoy.
        callers: how many calls are open at any time.
        make: what is called.
        tokens: of each call.
    """

    def __init__(self, port, callers, make=call, tokens=20):
        self.calls = []
        self._make = make
        self._client = Client(port, NO_RETRIES)
        self._stop, self._changed = False, asyncio.Event()
        self._tasks = [asyncio.create_task(self._keep_calling(tokens)) for _ in range(callers)]

    async def _keep_calling(self, tokens):
        while not self._stop:
            self.calls.append(await self._make(self._client, tokens=tokens))
            self._changed.set()

    async def until(self, more):
        """Wait until that many more calls have ended."""
        target = len(self.calls) + more
        async with asyncio.timeout(WAIT_S):
            while len(self.calls) < target:
                self._changed.clear()
                await self._changed.wait()

    async def stop(self):
        """Let the open calls end; all calls."""
        self._stop = True
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*self._tasks)
        await self._client.channel.close()
        return self.calls


def report(title, calls):
    """Print figures for docs/reliability.md (seen with `pytest -s`, as `make test-mesh` runs it)."""
    failed = [each for each in calls if each.code != "OK"]
    begun = sum(each.begun for each in failed)
    first = sorted(each.first_ms for each in calls if each.first_ms is not None)
    p50, p99 = (first[min(int(len(first) * share), len(first) - 1)] for share in (0.5, 0.99))
    print(
        f"\n{title}: {len(calls)} calls, {len(failed)} failed, {begun} of those had begun; "
        f"first message p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {first[-1]:.1f} ms"
    )
    return failed
