"""Short forms of the programs in this folder; `make fuzz` and `make soak` run them as long as wanted."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import fuzz
from latency import measure
from live_server import resident_bytes
from server_harness import Client, serving
from soak import soak


async def test_bad_input_is_answered_as_documented():
    """Two thousand requests made from the contract, damaged ones among them: every answer is a documented one."""
    answers = await fuzz(2000, seed=7, at_once=32)
    kinds = {answer.split()[-1] for answer in answers}
    assert sum(answers.values()) == 2000
    assert {"OK", "VALIDATION_FAILED", "LIMIT_EXCEEDED", "PROMPT_UNUSABLE", "UNIMPLEMENTED"} <= kinds


async def test_every_stream_ends_in_one_documented_way():
    """Ten seconds of cancels, deadlines, stalls, dropped connections and a killed worker; then nothing is open."""
    run = await soak(10, kill_every_s=5, seed=3)
    assert run.kills
    assert {end.partition(":")[0] for end in run.ends} == {"complete", "cancel", "deadline", "stall", "vanish"}


async def test_no_token_is_lost_or_reordered_at_many_streams():
    """64 streams at 30 tokens a second each: every token arrives once and in order, and health checks are answered."""
    figures = await measure(64, 2.0)
    assert (figures.tokens, figures.out_of_order) == (64 * 60, 0)
    assert figures.health_p99_ms > 0


async def test_cancels_leak_nothing():
    """Two thousand cancelled calls: no generation stays open, and the memory of the server does not grow with them."""
    async with serving() as (server, client):

        async def cancel_one(count):
            for _ in range(count):
                call = client.generate("hold")
                await call.read()
                call.cancel()

        await asyncio.gather(*(cancel_one(50) for _ in range(20)))
        before = resident_bytes(os.getpid())
        await asyncio.gather(*(cancel_one(50) for _ in range(20)))
        while server.generations.open or server.worker.open_streams:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert server.generations.admission.open_requests == 0
        # A thousand calls that were kept whole would be tens of megabytes.
        assert resident_bytes(os.getpid()) - before < 8 << 20


async def test_silence_with_pings_is_survived():
    """A client that pings each second through a silent prefill is not sent away for it."""
    options = (("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0))
    async with serving() as (_, client):
        pinging = Client(client.port, options)
        held = pinging.generate("hold", timeout=8)
        assert (await held.read()).HasField("started")
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await held.read()
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await pinging.channel.close()
