"""Peers that go away and peers that go elsewhere: killed clients, dropped iterators, a second server."""

from __future__ import annotations

import asyncio
import signal
import sys

from lda_client import AsyncLdaClient
from server_harness import serving

READER = """
import sys
from lda_client import LdaClient

with LdaClient(sys.argv[1]) as client:
    with client.generate("hold", raw=True) as stream:
        for event in stream:
            print(event.started.generation_id, flush=True)
"""


async def test_a_killed_client_frees_its_rows():
    """Kill -9 of a client's process: the engine stops working for it without waiting for anything else."""
    async with serving() as (_, client):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READER, f"127.0.0.1:{client.port}", stdout=asyncio.subprocess.PIPE
        )
        generation_id = (await process.stdout.readline()).decode().strip()
        assert generation_id
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await client.engine_cancelled(generation_id)


async def test_a_dropped_iterator_frees_its_rows():
    """Leaving the loop of the Python client's stream early cancels the call."""
    async with serving() as (_, client), AsyncLdaClient(f"127.0.0.1:{client.port}") as typed:
        generation_id = ""
        async with typed.generate("clock", raw=True, max_new_tokens=4000) as stream:
            async for event in stream:
                generation_id = generation_id or event.started.generation_id
                if event.HasField("delta"):
                    break
        await client.engine_cancelled(generation_id)


async def test_a_draining_server_sends_callers_to_the_next():
    """A client of two servers, of which one drains, is served by the other without seeing an error."""
    async with serving() as (first, one), serving() as (_, two):
        held = one.generate("hold")
        await held.read()
        draining = asyncio.ensure_future(first.drain_and_stop(30.0))
        while not first.generations.draining:  # noqa: ASYNC110
            await asyncio.sleep(0)
        async with AsyncLdaClient(f"ipv4:127.0.0.1:{one.port},127.0.0.1:{two.port}") as typed:
            texts = [(await typed.complete("hi", raw=True, max_new_tokens=3))[0].text for _ in range(8)]
        assert texts == ["abc"] * 8
        held.cancel()
        await draining


async def test_two_servers_share_the_calls_of_one_client():
    """The Python client balances its calls over the addresses of its target."""
    async with (
        serving() as (first, one),
        serving() as (second, two),
        AsyncLdaClient(f"ipv4:127.0.0.1:{one.port},127.0.0.1:{two.port}") as typed,
    ):
        for _ in range(20):
            await typed.complete("hi", raw=True, max_new_tokens=1)
        streams = [typed.generate("hold", raw=True) for _ in range(8)]
        for stream in streams:
            assert (await anext(aiter(stream))).HasField("started")
        assert [server.generations.admission.open_requests for server in (first, second)] == [4, 4]
        for stream in streams:
            await stream.close()
