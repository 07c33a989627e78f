"""What one server must keep, measured: `python tests/reliability/acceptance.py`, or `make acceptance`.

Prints a line for each promise with its figure and its bound. Servers run in processes of their own over the fake
engine; clients are grpcio's. Ten minutes of silence and everything behind Envoy have programs of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvloop
from latency import measure
from lda_client.gen.lda.v1 import admin_service_pb2 as admin
from live_server import TESTS, resident_bytes, serving
from server_harness import Client, outcome

READER = """
import sys
from lda_client import LdaClient

with LdaClient(sys.argv[1]) as client, client.generate("hold", raw=True) as stream:
    for event in stream:
        print(event.started.generation_id, flush=True)
"""
REPEATS = 50


@dataclass(frozen=True)
class Promise:
    """A figure and what it may be at most."""

    what: str
    figure: float
    bound: float
    unit: str

    @property
    def is_kept(self) -> bool:
        return self.figure <= self.bound

    def __str__(self) -> str:
        mark = "kept  " if self.is_kept else "MISSED"
        return f"{mark} {self.what}: {self.figure:.3g} {self.unit} (at most {self.bound:g})"


@dataclass
class Delays:
    """Times taken, in milliseconds."""

    taken: list[float] = field(default_factory=list)

    def add(self, since: float) -> None:
        self.taken.append((time.perf_counter() - since) * 1000)

    def percentile(self, share: float) -> float:
        return sorted(self.taken)[min(int(share * len(self.taken)), len(self.taken) - 1)]


@asynccontextmanager
async def server(rows: int = 64):
    """A server process, and a client of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = (str(TESTS / "server_harness.py"), "--rows", str(rows))
        async with serving(folder, command=command) as live:
            client = Client(live.port)
            yield live, client
            await client.channel.close()


async def many_streams(streams: int, seconds: float) -> list[Promise]:
    figures = await measure(streams, seconds)
    return [
        Promise(f"{streams} streams at 30 tokens/s, engine to reader, p99", figures.p99_ms, 10, "ms"),
        Promise(f"{streams} streams, processor of the server", figures.cores, 1, "cores"),
        Promise(f"{streams} streams, tokens out of order (none was lost)", figures.out_of_order, 0, "tokens"),
        Promise(f"{streams} streams, health checks meanwhile, p99", figures.health_p99_ms, 50, "ms"),
    ]


async def freed_rows() -> list[Promise]:
    """From the moment that a call ends on the client's side until the engine has been told, and has said so."""
    cancelled, killed = Delays(), Delays()
    async with server() as (live, client):
        for _ in range(REPEATS):
            call = client.generate("hold")
            generation_id = (await call.read()).started.generation_id
            call.cancel()
            began = time.perf_counter()
            await client.engine_cancelled(generation_id)
            cancelled.add(began)
        for _ in range(5):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", READER, live.target, stdout=asyncio.subprocess.PIPE
            )
            generation_id = (await process.stdout.readline()).decode().strip()
            process.send_signal(signal.SIGKILL)
            await process.wait()
            began = time.perf_counter()
            await client.engine_cancelled(generation_id)
            killed.add(began)
    return [
        Promise("rows free after a cancel, p95", cancelled.percentile(0.95), 50, "ms"),
        Promise("rows free after kill -9 of a client, worst of 5", max(killed.taken), 50, "ms"),
    ]


async def cancels(count: int) -> list[Promise]:
    """Memory of the server process over many cancelled calls, a tenth of them first to fill what stays."""
    async with server() as (live, client):

        async def cancel_some(number: int) -> None:
            for _ in range(number):
                call = client.generate("hold")
                await call.read()
                call.cancel()

        async def nothing_open() -> None:
            while (await client.load()).open_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        await asyncio.gather(*(cancel_some(count // 500) for _ in range(50)))
        await nothing_open()
        before = resident_bytes(live.process.pid)
        await asyncio.gather(*(cancel_some(count // 50) for _ in range(50)))
        await nothing_open()
        grown = 100 * (resident_bytes(live.process.pid) / before - 1)
    return [Promise(f"memory of the server over {count} cancelled calls", grown, 2, "% more")]


async def ended_by_the_server() -> list[Promise]:
    """From an operator's abort, and from kill -9 of the worker, until the caller has a status."""
    aborted = Delays()
    async with server() as (live, client):
        for _ in range(REPEATS):
            call = client.generate("hold")
            generation_id = (await call.read()).started.generation_id
            began = time.perf_counter()
            await client.admin.AbortGeneration(admin.AbortGenerationRequest(generation_id=generation_id))
            assert await outcome(call) == "ABORTED"
            aborted.add(began)
        calls = [client.generate("hold") for _ in range(32)]
        for call in calls:
            await call.read()
        began, dead = time.perf_counter(), Delays()
        os.kill(live.worker(), signal.SIGKILL)
        assert set(await asyncio.gather(*map(outcome, calls))) == {"UNAVAILABLE"}
        dead.add(began)
    return [
        Promise("status after an operator's abort, p95", aborted.percentile(0.95), 100, "ms"),
        Promise("status of all 32 streams after kill -9 of the worker", dead.taken[0], 1000, "ms"),
    ]


async def beside_stalled_readers(streams: int, seconds: float) -> list[Promise]:
    """The same streams with and without readers that stop beside them, in one run."""
    alone = await measure(streams, seconds)
    beside = await measure(streams, seconds, stalled=8)
    return [
        Promise(
            f"{streams} streams beside 8 stalled readers, p99 over p99 alone", beside.p99_ms / alone.p99_ms, 1.5, ""
        ),
        Promise("memory of the server for a stalled reader", beside.stalled_bytes / 8 / 2**20, 16, "MiB"),
    ]


async def stop_with_watchers() -> list[Promise]:
    """How much longer a stop takes if somebody watches the health service."""
    taken = []
    for watchers in (0, 8):
        async with server() as (live, client):
            watches = [client.watch() for _ in range(watchers)]
            for watch in watches:
                await watch.read()
            began = time.perf_counter()
            live.process.terminate()
            await live.process.wait()
            taken.append(time.perf_counter() - began)
    return [Promise("a stop beside 8 idle watchers takes longer by", taken[1] - taken[0], 0.2, "s")]


async def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cancels", type=int, default=10_000)
    options = parser.parse_args()
    missed = 0
    for part in (
        many_streams(options.streams, options.seconds),
        freed_rows(),
        cancels(options.cancels),
        ended_by_the_server(),
        beside_stalled_readers(options.streams // 4, options.seconds),
        stop_with_watchers(),
    ):
        for promise in await part:
            print(promise, flush=True)
            missed += not promise.is_kept
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
