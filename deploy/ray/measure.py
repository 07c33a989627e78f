"""What Ray Serve costs: the same server with and without it, in turns.

    PYTHONPATH=tests:tests/reliability python deploy/ray/measure.py

Latency is that of the fake engine of the tests, which writes the time into its tokens; rates and replacements are those
of the bundled pair. Prints a line for each figure: medians over the repetitions.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import live_server
from cluster import serving
from latency import TICKS_PER_S, _read
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from lda_client.gen.lda.v1 import lda_service_pb2_grpc
from lda_client.lab import Prompt, SurveySettings, run_survey

from lda_service.pairs import demo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cluster import Cluster

    Figures = defaultdict[str, list[float]]

CALLS, SECONDS = 300, 8
SEQUENCES, TOKENS = 16, 400  # of the stream that goes as fast as it can
SETTINGS = SurveySettings(alphas=(0, 1), rollouts=100, slopes=False)


async def unary(target: str, figures: Figures) -> None:
    """One call after another."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub, taken = lda_service_pb2_grpc.LdaServiceStub(channel), []
        for _ in range(CALLS):
            began = time.perf_counter()
            await stub.GetModelPair(pb.GetModelPairRequest())
            taken.append((time.perf_counter() - began) * 1000)
    figures["GetModelPair p50, ms"].append(statistics.median(taken))


async def flat_out(target: str, figures: Figures) -> None:
    """One stream of as many messages as get through; the server merges tokens for a reader that falls behind."""
    request = pb.GenerateLDARequest(prompt=pb.Prompt(text="hi"), num_sequences=SEQUENCES)
    request.stopping.max_new_tokens = TOKENS
    async with grpc.aio.insecure_channel(target) as channel:
        began, messages = time.perf_counter(), 0
        async for message in lda_service_pb2_grpc.LdaServiceStub(channel).GenerateLDA(request):
            messages += message.HasField("delta")
        seconds = time.perf_counter() - began
    figures["one stream flat out, messages/s"].append(messages / seconds)
    figures["one stream flat out, tokens/s"].append(SEQUENCES * TOKENS / seconds)


def streams(count: int) -> Callable[[str, Figures], Awaitable[None]]:
    """Several streams at once, each of 30 tokens a second."""

    async def measure(target: str, figures: Figures) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            read = await asyncio.gather(*(_read(channel, SECONDS * TICKS_PER_S) for _ in range(count)))
        delays = sorted(delay for _, part in read for delay in part)
        figures[f"{count} streams, engine to reader p50, ms"].append(statistics.median(delays))
        figures[f"{count} streams, engine to reader p99, ms"].append(delays[int(0.99 * len(delays))])

    return measure


async def survey(target: str, figures: Figures) -> None:
    """A survey of the bundled pair."""
    prompts = [Prompt(f"p{index}", text) for index, text in enumerate(demo.PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        outcome = await asyncio.to_thread(run_survey, folder, prompts, SETTINGS, [target])
    figures["survey of the bundled pair, tokens/s"].append(outcome.tokens / outcome.seconds)


LATENCY = (unary, flat_out, streams(8), streams(32))


async def in_turns(direct: str, served: str, measures: tuple[Callable[..., Awaitable[None]], ...], times: int) -> None:
    """Each measure with and without Serve, again and again; prints the medians."""
    plain, through = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for measure in measures:
        for _ in range(times):
            await measure(direct, plain)
            await measure(served, through)
    for name, values in plain.items():
        print(f"{name}: {statistics.median(values):.4g} -> {statistics.median(through[name]):.4g}", flush=True)


def replaced(cluster: Cluster, figures: Figures) -> None:
    """Kill a replica; seconds until two answer again."""
    before = set(cluster.loads())
    os.kill(cluster.replicas()[0], signal.SIGKILL)
    began = time.perf_counter()
    while set(cluster.loads()) == before:
        pass
    figures["killed replica replaced, s"].append(time.perf_counter() - began)


async def compare(folder: Path, times: int) -> None:
    """Everything that has a figure without Serve."""
    tests = str(live_server.TESTS)
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(live_server.serving(folder, command=(f"{tests}/server_harness.py",)))
        served = stack.enter_context(serving(folder / "fake.log", size=1, import_path="fake:app", path=tests))
        await in_turns(plain.target, served.target, LATENCY, times)
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(live_server.serving(folder))
        served = stack.enter_context(serving(folder / "bundled.log", size=1))
        await in_turns(plain.target, served.target, (survey,), times)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("without Serve -> through Serve")
        asyncio.run(compare(Path(folder), options.repetitions))
        figures = defaultdict[str, list[float]](list)
        with serving(Path(folder, "pairs.log"), size=2) as cluster:
            for _ in range(options.repetitions):
                replaced(cluster, figures)
        for name, values in figures.items():
            print(f"{name}: {statistics.median(values):.3g}")


if __name__ == "__main__":
    main()
