"""Full load with cancels, deadlines, stalled readers and kills: `python tests/reliability/soak.py --seconds 1800`.

A real server over tiny models, and more clients than it has rows. Every stream must end in exactly one documented way:
OK after every sequence finished, or an error with a reason that fits what was done to it. Afterwards nothing is open,
no page is held, and the memory of the server process is where it was after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress

import grpc
from fuzz import check_afterwards, reason_of
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from live_server import resident_bytes, serving, tiny_pair

CLIENTS = 48
SAMPLE_S = 1.0
# By what was done to a stream: how it may end. Any stream may also meet a dead worker or a full queue.
WHENEVER = {"UNAVAILABLE WORKER_DIED", "UNAVAILABLE LOADING", "RESOURCE_EXHAUSTED QUEUE_FULL"}
ENDS = {
    "complete": {"OK"},
    "cancel": {"OK", "cancelled"},
    "deadline": {"OK", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED DEADLINE_TOO_SHORT"},
    "stall": {"OK", "cancelled", "RESOURCE_EXHAUSTED SLOW_CONSUMER"},
    "vanish": {"gone"},
}


class Soak:
    """Clients of one server, and what became of their streams."""

    def __init__(self, live, seed: int) -> None:
        self.live = live
        self.rng = random.Random(seed)
        self.over = asyncio.Event()
        self.ends: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.kills = 0
        self.memory: list[tuple[float, int]] = []

    async def run(self, seconds: float, kill_every_s: float) -> None:
        """Load the server for that long."""
        began = time.monotonic()
        helpers = [
            asyncio.create_task(self._kill_workers(kill_every_s)),
            asyncio.create_task(self._watch_memory(began)),
        ]
        clients = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]
        await asyncio.sleep(seconds)
        self.over.set()
        await asyncio.wait_for(asyncio.gather(*clients), 120)
        for helper in helpers:
            helper.cancel()

    async def _client(self) -> None:
        async with grpc.aio.insecure_channel(self.live.target, options=(("client", self.rng.random()),)) as channel:
            stub = lda_service_pb2_grpc.LdaServiceStub(channel)
            while not self.over.is_set():
                await self._one(stub)

    async def _one(self, stub) -> None:
        behaviour = self.rng.choices(list(ENDS), (60, 20, 12, 4, 4))[0]
        if behaviour == "vanish":
            end = await self._vanish()
        else:
            timeout = self.rng.uniform(0.02, 1.0) if behaviour == "deadline" else 120
            end = await self._read(stub.GenerateLDA(self._request(), timeout=timeout), behaviour)
        self.ends[f"{behaviour}: {end}"] += 1
        if end not in ENDS[behaviour] | WHENEVER:
            self.faults.append(f"{behaviour} ended {end}")
        if end in WHENEVER:
            await asyncio.sleep(self.rng.uniform(0.05, 0.3))

    def _request(self) -> pb.GenerateLDARequest:
        rng = self.rng
        request = pb.GenerateLDARequest(
            prompt=pb.Prompt(text="soak " * rng.randint(1, 12)),
            alpha=rng.uniform(-1, 3),
            num_sequences=rng.randint(1, 6),
        )
        request.stopping.max_new_tokens = rng.randint(1, 40)
        request.output.diagnostics = rng.random() < 0.3
        return request

    async def _read(self, call, behaviour: str) -> str:
        """Read a stream as its grammar demands; how it ended."""
        finished = expected = 0
        cancel_after = self.rng.randint(0, 20) if behaviour == "cancel" else None
        try:
            count = 0
            while (message := await call.read()) is not grpc.aio.EOF:
                if count == 0 and not message.HasField("started"):
                    self.faults.append("the first message is not `started`")
                expected = message.started.sequence_count or expected
                finished += message.HasField("finished")
                count += 1
                if count == cancel_after:
                    call.cancel()
                if behaviour == "stall" and count == 2:
                    await asyncio.sleep(self.rng.uniform(0.5, 2))
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {reason_of(error) or ''}".strip()
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            return "cancelled"
        code = (await call.code()).name
        if code == "CANCELLED":
            return "cancelled"
        if code == "OK" and (finished != expected or not expected):
            self.faults.append(f"OK after {finished} of {expected} ends")
        return code

    async def _vanish(self) -> str:
        """A connection that is dropped in the middle of a stream, without a word."""
        channel = grpc.aio.insecure_channel(self.live.target, options=(("gone", self.rng.random()),))
        call = lda_service_pb2_grpc.LdaServiceStub(channel).GenerateLDA(self._request(), timeout=30)
        with suppress(grpc.aio.AioRpcError):
            await call.read()
        await channel.close()
        return "gone"

    async def _kill_workers(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s * self.rng.uniform(0.7, 1.3))
            worker = self.live.worker()
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
                self.kills += 1

    async def _watch_memory(self, began: float) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.memory.append((time.monotonic() - began, resident_bytes(self.live.process.pid)))

    def growth(self) -> float:
        """Median memory of the last tenth over that of the second tenth."""
        tenth = max(1, len(self.memory) // 10)
        values = [size for _, size in self.memory]
        return statistics.median(values[-tenth:]) / statistics.median(values[tenth : 2 * tenth]) - 1


async def soak(seconds: float, kill_every_s: float, seed: int = 1) -> Soak:
    """Run it. Raises AssertionError if a stream ended otherwise than documented, or something stayed open."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--max-running-sequences", "32", "--max-queued-requests", "40", "--max-buffered-tokens", "512")
        async with serving(folder, *tiny_pair(folder, num_hidden_layers=1), *flags) as live:
            run = Soak(live, seed)
            await run.run(seconds, kill_every_s)
            await check_afterwards(live.target)
        assert not run.faults, f"{len(run.faults)} faults, such as: {run.faults[:5]}"
        return run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--kill-every", type=float, default=60, help="seconds between two kills of the worker")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    run = asyncio.run(soak(options.seconds, options.kill_every, options.seed))
    megabytes = [size / 1e6 for _, size in run.memory]
    print(f"{sum(run.ends.values())} streams in {options.seconds:.0f} s, {run.kills} workers killed:")
    for end, count in sorted(run.ends.items()):
        print(f"  {count:8d}  {end}")
    print(f"memory of the server: {min(megabytes):.0f} to {max(megabytes):.0f} MB, growth {run.growth():+.2%}")


if __name__ == "__main__":
    sys.exit(main())
