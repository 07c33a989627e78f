"""256 streams at 30 tokens a second: `python tests/reliability/latency.py --streams 256 --seconds 20`.

The fake engine, in its worker process, writes the time into each token; this process, a real client, reads it. It
reports the time from the engine to the reader, the processor time of the server process, tokens lost or out of order,
and how fast the health service answers meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from live_server import TESTS, resident_bytes, serving

CHANNELS = 4
TICKS_PER_S = 30
STALLED_SEQUENCES = 64  # in one call: more tokens than gRPC and the server together would hold


@dataclass
class Figures:
    """What was measured."""

    tokens: int
    p50_ms: float
    p99_ms: float
    cores: float
    health_p99_ms: float
    out_of_order: int
    stalled_bytes: int  # memory that the server took for readers that stopped

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: engine to reader p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms; server "
            f"{self.cores:.2f} cores; health p99 {self.health_p99_ms:.1f} ms; {self.out_of_order} out of order"
        )


async def measure(streams: int, seconds: float, stalled: int = 0) -> Figures:
    """Streams beside some readers that never read. Raises AssertionError if a token is lost."""
    rows = streams + stalled * STALLED_SEQUENCES
    with tempfile.TemporaryDirectory() as folder:
        async with serving(folder, command=(str(TESTS / "server_harness.py"), "--rows", str(rows))) as live:
            stopped, stalled_bytes = await _stall(live, stalled)
            channels = [grpc.aio.insecure_channel(live.target, options=(("channel", i),)) for i in range(CHANNELS)]
            new = int(seconds * TICKS_PER_S)
            readers = [_read(channels[i % CHANNELS], new) for i in range(streams)]
            reading = asyncio.gather(*readers)
            before, began = _cpu_s(live.process.pid), time.perf_counter()
            probing = asyncio.create_task(_probe(channels[0]))
            streams_read = await reading
            cores = (_cpu_s(live.process.pid) - before) / (time.perf_counter() - began)
            probing.cancel()
            health_ms = sorted((await asyncio.gather(probing, return_exceptions=True))[0] or [0.0])
            for channel in (*channels, *stopped):
                await channel.close()
    delays = sorted(delay for _, part in streams_read for delay in part)
    assert len(delays) == streams * new, "tokens were lost"
    return Figures(
        len(delays),
        statistics.median(delays),
        delays[int(0.99 * len(delays))],
        cores,
        health_ms[int(0.99 * len(health_ms))],
        sum(disorder for disorder, _ in streams_read),
        stalled_bytes,
    )


async def _read(channel, new: int) -> tuple[int, list[float]]:
    request = pb.GenerateLDARequest(prompt=pb.Prompt(text="clock"))
    request.stopping.max_new_tokens = new
    call = lda_service_pb2_grpc.LdaServiceStub(channel).GenerateLDA(request, timeout=600)
    delays, times = [], []
    async for message in call:
        now = time.monotonic_ns()
        if message.HasField("delta"):
            stamps = [int(each) for each in message.delta.text.split()]
            times += stamps
            delays += [(now - stamp) / 1e6 for stamp in stamps]
    return sum(a > b for a, b in pairwise(times)), delays


async def _stall(live, count: int) -> tuple[list, int]:
    """Open streams that nobody reads, until the server has ended them; their channels, and its memory for them."""
    before, channels, calls = resident_bytes(live.process.pid), [], []
    for index in range(count):
        channels.append(grpc.aio.insecure_channel(live.target, options=(("stalled", index),)))
        request = pb.GenerateLDARequest(prompt=pb.Prompt(text="hi"), num_sequences=STALLED_SEQUENCES)
        request.stopping.max_new_tokens = 4096
        calls.append(lda_service_pb2_grpc.LdaServiceStub(channels[-1]).GenerateLDA(request))
        await calls[-1].read()
    if channels:
        stub = lda_service_pb2_grpc.LdaServiceStub(channels[0])
        while (await stub.GetLoad(pb.GetLoadRequest(), timeout=30)).open_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return channels, resident_bytes(live.process.pid) - before


async def _probe(channel) -> list[float]:
    """How long health checks take, until cancelled."""
    stub, taken = health_pb2_grpc.HealthStub(channel), []
    try:
        while True:
            began = time.perf_counter()
            await stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=30)
            taken.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        return taken


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    print(run(measure(options.streams, options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
