"""A long silent prefill with keepalive pings: `python tests/reliability/silence.py --seconds 600`.

A call is admitted and then hears nothing. Its client pings every 30 seconds, as the Python client of this project does;
another one every second. Both must still be alive at the end, and both must then be cancelled cleanly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile

import grpc
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from live_server import TESTS, serving

PINGS_S = (30, 1)


async def silence(seconds: float) -> list[str]:
    """The state of each call after that long: "alive", or the code that it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        async with serving(folder, command=(str(TESTS / "server_harness.py"),)) as live:
            return await asyncio.gather(*(_hold(live.target, pings_s, seconds) for pings_s in PINGS_S))


async def _hold(target: str, pings_s: int, seconds: float) -> str:
    options = (("grpc.keepalive_time_ms", pings_s * 1000), ("grpc.http2.max_pings_without_data", 0))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        request = pb.GenerateLDARequest(prompt=pb.Prompt(text="hold"))
        call = lda_service_pb2_grpc.LdaServiceStub(channel).GenerateLDA(request)
        assert (await call.read()).HasField("started")
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.read())), seconds)
        except TimeoutError:
            call.cancel()
            return "alive"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "ended without being asked"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    seconds = parser.parse_args().seconds
    states = asyncio.run(silence(seconds))
    for pings_s, state in zip(PINGS_S, states, strict=True):
        print(f"after {seconds:.0f} s of silence, with a ping every {pings_s} s: {state}")
    return any(state != "alive" for state in states)


if __name__ == "__main__":
    sys.exit(main())
