"""Several servers behind Envoy, measured and extrapolated; docs/replicas.md has the results.

    python -m benchmarks.replicas survey      three servers draw what one draws, though one is killed
    python -m benchmarks.replicas scaling     one server against two, each with a core of its own
    python -m benchmarks.replicas simulate    costs of a call, measured; 1 to 1,000 servers, simulated with them

Servers are `lda-service serve` with one thread each, and Envoy runs `deploy/envoy/envoy-affinity.yaml`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from lda_client.lab import Pace, Prompt, SurveySettings, run_survey_async
from lda_client.lab._progress import Quiet
from scipy.optimize import nnls

from benchmarks.fleet_simulation import Scenario, simulate
from benchmarks.processes import machine_busy_s
from lda_service.pairs import demo

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/mesh")]

from mesh_harness import Replica, Served, front, logged, running  # type: ignore[import-not-found]  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lda_client.lab import Outcome

PROMPTS = tuple(Prompt(f"p{number}", text) for number, text in enumerate(demo.PROMPTS[:20]))
ALPHAS = (0.0, 0.5)
CELLS = len(PROMPTS) * len(ALPHAS)
ROWS = 64  # of a server, as it comes
# Shapes of surveys that tell what a call, a sequence and a token cost: chunk size, new tokens, rollouts of a cell.
SHAPES = ((4, 16, 16), (4, 128, 8), (16, 16, 32), (16, 256, 16), (64, 64, 64))
LONG_CALL_TOKENS = 16 * 512.0
# Limits of docs/sizing.md for 64 rows; not measured.
ASSUMED_TOKENS_PER_S = {"1B on an L4": 3182.0, "8B on an H100": 6236.0}


@dataclass
class Mesh:
    """An Envoy before servers.

    Attributes:
        envoy: the `Front` of the tests' harness.
        target: what a survey is given.
        calls: as Envoy logged them; empty until it has stopped.
    """

    envoy: Any
    target: str
    calls: list[Any] = field(default_factory=list)


@asynccontextmanager
async def balanced(servers: Sequence[Any]) -> AsyncIterator[Mesh]:
    """An Envoy before these servers."""
    with TemporaryDirectory() as folder:
        async with front("envoy-affinity.yaml", [each.port for each in servers], Path(folder)) as envoy:
            await envoy.all_healthy()
            mesh = Mesh(envoy, f"{len(servers)}@127.0.0.1:{envoy.port}")
            yield mesh
        mesh.calls += logged(envoy)


async def drawn(folder: Path, target: str, settings: SurveySettings, **options: Any) -> Outcome:
    """A survey, complete."""
    outcome = await run_survey_async(folder, PROMPTS, settings, [target], **options)
    if outcome.missing:
        raise click.ClickException(f"{outcome.missing} rollouts are missing.")
    return outcome


def processor_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tree_s(pid: int) -> float:
    """Processor time of a server so far: its process and its worker's."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sum(map(processor_s, (pid, *(int(child) for each in lists for child in each.read_text().split()))))


@click.group()
def main() -> None:
    """Several servers behind Envoy, measured and extrapolated."""


# Draw for draw ------------------------------------------------------------------------------------------------------


class Milestone(Quiet):
    """A reporter that says when so many rollouts are drawn."""

    def __init__(self, rollouts: int) -> None:
        self._left = rollouts
        self.reached = asyncio.Event()

    def advance(self, rollouts: int, tokens: int) -> None:
        """Count."""
        self._left -= rollouts
        if self._left <= 0:
            self.reached.set()


@main.command()
@click.option("--rollouts", default=10_000, show_default=True, help="Of the whole survey; rounded up to full cells.")
@click.option("--servers", default=3, show_default=True, type=click.IntRange(2))
@click.option("--restart/--no-restart", default=True, show_default=True, help="Start the killed server again.")
def survey(rollouts: int, servers: int, restart: bool) -> None:
    """Draw a survey on one server, then on several of which one is killed; compare the files."""
    asyncio.run(_survey(-(-rollouts // CELLS), servers, restart))


async def _survey(per_cell: int, count: int, restart: bool) -> None:
    settings = SurveySettings(alphas=ALPHAS, rollouts=per_cell, max_new_tokens=64)
    total = CELLS * per_cell
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        async with running([Served() for _ in range(count)]) as servers:
            alone = await drawn(folder / "one", servers[0].address, settings)
            tell("one server", alone)
            async with balanced(servers) as mesh:
                third = Milestone(total // 3)
                together = asyncio.create_task(drawn(folder / "several", mesh.target, settings, reporter=third))
                await third.reached.wait()
                victim = await busiest(mesh.envoy, servers)
                await victim.kill()
                click.echo(f"killed the server on port {victim.port} after {total // 3:,} rollouts")
                if restart:
                    await victim.start()
                    click.echo("it is back")
                outcome = await together
                tell(f"{count} servers", outcome)
        tell_calls(mesh.calls, victim.port, -(-per_cell // settings.chunk_size) * CELLS)
        equal = digest(outcome) == digest(alone)
    click.echo("the files are equal" if equal else "THE FILES DIFFER")
    sys.exit(not equal)


async def busiest(envoy: Any, servers: Sequence[Any]) -> Any:
    """The server with the most open calls."""
    hosts = await asyncio.to_thread(envoy.hosts)
    return max(servers, key=lambda each: hosts[each.port]["rq_active"])


def digest(outcome: Outcome) -> str:
    """SHA-256 of the rollouts."""
    return sha256(outcome.run.rollouts_path.read_bytes()).hexdigest()


def tell(what: str, outcome: Outcome) -> None:
    """One line about a survey."""
    rate = outcome.tokens / outcome.seconds
    click.echo(
        f"{what}: {outcome.drawn:,} rollouts, {outcome.tokens:,} tokens in {outcome.seconds:.1f} s ({rate:,.0f} "
        f"tokens/s), rollouts.parquet {digest(outcome)}"
    )


def tell_calls(calls: list[Any], victim: int, chunks: int) -> None:
    """Which server had which calls. Raises ClickException if any other server's stream was cut."""
    cut = [each for each in calls if each.is_cut]
    by_server: dict[str, Counter[int]] = defaultdict(Counter)
    for each in calls:
        by_server[each.prompt][each.port] += 1
    at_home = sum(max(ports.values()) for ports in by_server.values()) / len(calls)
    servers = statistics.mean(map(len, by_server.values()))
    click.echo(
        f"{len(calls)} calls for {chunks} chunks and {len(PROMPTS)} prompts: "
        f"{dict(Counter(each.port for each in calls))} by port, {len(cut)} cut; of a prompt's calls {at_home:.0%} on "
        f"one server, on {servers:.1f} in all"
    )
    if {each.port for each in cut} - {victim} or len(calls) - len(cut) != chunks + len(PROMPTS):
        raise click.ClickException("a stream of another server was cut, or a chunk was drawn twice")


# One against two ----------------------------------------------------------------------------------------------------


@main.command()
@click.option("--repetitions", default=3, show_default=True, type=click.IntRange(1))
def scaling(repetitions: int) -> None:
    """Measure one server against two, each with a core of its own; client and Envoy share the cores with them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise click.ClickException("this takes two cores")
    asyncio.run(_scaling(repetitions, cores))


async def _scaling(repetitions: int, cores: list[int]) -> None:
    settings = SurveySettings(alphas=ALPHAS, rollouts=16, max_new_tokens=64)
    servers = [Served(prefix=("taskset", "-c", str(core))) for core in cores]
    runs: dict[int, list[Timed]] = {1: [], 2: []}
    async with running(servers), balanced(servers[:1]) as first, balanced(servers) as second:
        for number in range(repetitions + 1):  # the first warms up
            for count, mesh in ((1, first), (2, second)):
                figures = await _timed(mesh, servers, replace(settings, seed=number))
                click.echo(f"{count} server(s): {figures}")
                if number:
                    runs[count].append(figures)
    for what, rate in (("a second", "tokens_per_s"), ("a processor second of servers", "tokens_per_server_s")):
        one, two = (statistics.median(getattr(each, rate) for each in runs[count]) for count in (1, 2))
        click.echo(f"tokens for {what}, median of {repetitions}: {one:,.1f} and {two:,.1f}, {two / one:.2f} times")


@dataclass(frozen=True)
class Timed:
    """A survey with the processor time that it took, in seconds, and how many cores the machine used meanwhile."""

    tokens: int
    sequences: int
    calls: int
    seconds: float
    servers_s: float
    client_s: float
    envoy_s: float
    busy_cores: float

    @property
    def tokens_per_s(self) -> float:
        """Over the whole survey."""
        return self.tokens / self.seconds

    @property
    def tokens_per_server_s(self) -> float:
        """For a second of the servers' processor time."""
        return self.tokens / self.servers_s

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_s:,.1f} tokens/s in {self.seconds:.1f} s, {self.tokens_per_server_s:,.1f} for a "
            f"processor second of servers; cores: client {self.client_s / self.seconds:.2f}, Envoy "
            f"{self.envoy_s / self.seconds:.2f}, servers {self.servers_s / self.seconds:.2f}, the machine "
            f"{self.busy_cores:.2f}"
        )


async def _timed(mesh: Mesh, servers: Sequence[Any], settings: SurveySettings, **options: Any) -> Timed:
    with TemporaryDirectory() as folder:
        serving = sum(tree_s(each.process.pid) for each in servers)
        client, proxy, machine = time.process_time(), processor_s(mesh.envoy.pid), machine_busy_s()
        outcome = await drawn(Path(folder) / "run", mesh.target, settings, **options)
        chunks = settings.chunks_per_cell() * CELLS
        return Timed(
            outcome.tokens,
            outcome.drawn,
            chunks,
            outcome.seconds,
            sum(tree_s(each.process.pid) for each in servers) - serving,
            time.process_time() - client,
            processor_s(mesh.envoy.pid) - proxy,
            (machine_busy_s() - machine) / outcome.seconds,
        )


# Beyond this machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What was measured for the simulation.

    Attributes:
        service_s: of calls of 16 sequences on a server all of whose rows are in use: seconds, times the cores that the
            server got, so as on a core of its own.
        tokens_per_call: new tokens of such a call.
        tokens_per_s: of that server, likewise.
        client: processor time of the client for a call, a sequence and a token, in seconds.
        envoy: likewise of Envoy.
        journal_bytes_per_token: that a survey writes.
        disk_bytes_per_s: written and flushed.
    """

    service_s: tuple[float, ...]
    tokens_per_call: float
    tokens_per_s: float
    client: tuple[float, float, float]
    envoy: tuple[float, float, float]
    journal_bytes_per_token: float
    disk_bytes_per_s: float


def per_call(costs: tuple[float, float, float], tokens: float) -> float:
    """Processor time for a call of 16 sequences and so many tokens."""
    call, sequence, token = costs
    return call + 16 * sequence + tokens * token


@main.command(name="simulate")
def simulate_command() -> None:
    """Measure what a call costs, then simulate up to 1,000 servers with it."""
    costs = asyncio.run(_costs())
    tell_costs(costs)
    tell_measured_fleet(costs)
    tell_balance(costs)
    for name, rate in ASSUMED_TOKENS_PER_S.items():
        tell_plan(costs, name, rate)
    tell_failures(costs)


async def _costs() -> Costs:
    fakes = [Replica({"port": 0})]  # whose engine costs nothing, so that there is something to take in
    async with running(fakes), balanced(fakes) as mesh:
        shapes = [await _timed(mesh, fakes, _shape(*shape)) for shape in SHAPES]
    settings = SurveySettings(alphas=ALPHAS, rollouts=32, max_new_tokens=64)
    async with running([Served()]) as servers:
        async with balanced(servers) as mesh:
            full = await _timed(mesh, servers, settings, pace=Pace(at_once=ROWS // settings.chunk_size))
        cores = full.servers_s / full.seconds
        service_s = tuple(cores * call.duration_ms / 1e3 for call in mesh.calls[len(PROMPTS) :])
        journal = await _journal_bytes_per_token(servers[0].address, settings)
    return Costs(
        service_s,
        full.tokens / full.calls,
        full.tokens_per_server_s,
        fitted(shapes, [each.client_s for each in shapes]),
        fitted(shapes, [each.envoy_s for each in shapes]),
        journal,
        _disk_bytes_per_s(),
    )


def _shape(chunk_size: int, max_new_tokens: int, rollouts: int) -> SurveySettings:
    return SurveySettings(
        alphas=ALPHAS, rollouts=rollouts, chunk_size=chunk_size, max_new_tokens=max_new_tokens, estimate=False
    )


def fitted(runs: Sequence[Timed], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds for a call, a sequence and a token: least squares without negative costs, one survey's own cost apart."""
    counts = np.array([[each.calls, each.sequences, each.tokens, 1] for each in runs], dtype=float)
    (call, sequence, token, _), _ = nnls(counts / np.array(seconds)[:, None], np.ones(len(runs)))
    return float(call), float(sequence), float(token)


async def _journal_bytes_per_token(address: str, settings: SurveySettings) -> float:
    """Of a survey that stops early: one that is complete keeps no journal."""
    with TemporaryDirectory() as folder:
        outcome = await run_survey_async(
            Path(folder) / "run", PROMPTS, settings, [address], pace=Pace(budget_tokens=5000)
        )
        return outcome.run.journal_path.stat().st_size / outcome.tokens


def _disk_bytes_per_s(size: int = 64 << 20) -> float:
    with TemporaryDirectory(dir=ROOT) as folder:
        begun = time.perf_counter()
        with (Path(folder) / "file").open("wb", buffering=0) as file:
            file.write(os.urandom(size))
            os.fsync(file.fileno())
        return size / (time.perf_counter() - begun)


def tell_costs(costs: Costs) -> None:
    """The measured inputs."""
    click.echo(f"service time of a call: median {np.median(costs.service_s):.2f} s of {len(costs.service_s)}")
    click.echo(f"tokens of a call: {costs.tokens_per_call:.0f}; of a server: {costs.tokens_per_s:,.0f} a second")
    for name, each in (("client", costs.client), ("Envoy", costs.envoy)):
        call, sequence, token = (1e6 * cost for cost in each)
        short, long = (tokens / per_call(each, tokens) for tokens in (costs.tokens_per_call, LONG_CALL_TOKENS))
        click.echo(
            f"{name}: {call:.0f} us a call, {sequence:.0f} us a sequence, {token:.2f} us a token: {short:,.0f} "
            f"tokens/s for a core, with sequences of 512 tokens {long:,.0f}"
        )
    click.echo(
        f"journal: {costs.journal_bytes_per_token:.1f} bytes a token; disk: {costs.disk_bytes_per_s / 1e6:,.0f} MB/s"
    )


def scenario(costs: Costs, replicas: int, **changes: Any) -> Scenario:
    """The measured call on so many servers."""
    given = {"client_s_per_call": per_call(costs.client, costs.tokens_per_call), **changes}
    return Scenario(replicas, costs.service_s, costs.tokens_per_call, slots=ROWS // 16, **given)


def planned(costs: Costs, replicas: int, rate: float, **changes: Any) -> Scenario:
    """Calls of 16 times 512 tokens on servers that decode so many tokens a second."""
    measured = scenario(costs, replicas, client_s_per_call=per_call(costs.client, LONG_CALL_TOKENS), **changes)
    mean_s = measured.slots * LONG_CALL_TOKENS / rate
    service_s = np.array(costs.service_s) * mean_s / np.mean(costs.service_s)
    return replace(measured, service_s=tuple(service_s), tokens_per_call=LONG_CALL_TOKENS)


def tell_measured_fleet(costs: Costs) -> None:
    """Servers as fast as the measured one, one client."""
    click.echo("\n| servers | tokens/s | of one | busiest over mean | call p50 | call p99 | client busy |")
    click.echo("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    alone = simulate(scenario(costs, 1)).tokens_per_s
    for replicas in (1, 2, 3, 10, 30, 100, 300, 1000):
        outcome = simulate(scenario(costs, replicas))
        p50, p99 = np.quantile(outcome.latency_s, (0.5, 0.99))
        click.echo(
            f"| {replicas:,} | {outcome.tokens_per_s:,.0f} | {outcome.tokens_per_s / alone:,.1f} | "
            f"{outcome.balance:.2f} | {p50:.2f} s | {p99:.2f} s | {outcome.client_busy:.0%} |"
        )


def tell_balance(costs: Costs) -> None:
    """What the bound on a server's load does, with a client that costs nothing."""
    click.echo("\n| servers | prompts | bound | share of the servers' rate | servers of a prompt | call p99 |")
    click.echo("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for replicas, prompts in ((3, 20), (10, 20), (100, 200), (1000, 200), (1000, 2000)):
        for factor in (1.05, 1.5, np.inf):
            given = scenario(costs, replicas, client_s_per_call=0.0, prompts=prompts, balance_factor=factor)
            outcome = simulate(given)
            full = replicas * given.slots * given.tokens_per_call / np.mean(given.service_s)
            click.echo(
                f"| {replicas:,} | {prompts:,} | {factor:g} | {outcome.steady_tokens_per_s / full:.0%} | "
                f"{outcome.servers_per_prompt:.1f} | {np.quantile(outcome.latency_s, 0.99):.1f} s |"
            )


def tell_plan(costs: Costs, name: str, rate: float, replicas: int = 1000) -> None:
    """1,000 servers of an assumed rate: with one client, and with as many as it takes."""
    client, envoy = (per_call(each, LONG_CALL_TOKENS) / LONG_CALL_TOKENS for each in (costs.client, costs.envoy))
    tokens_per_s = replicas * rate
    clients = -(-tokens_per_s * client // 0.7)
    click.echo(
        f"\n{name}, {rate:,.0f} tokens/s each (a limit, not measured), sequences of 512 tokens, {replicas:,} servers: "
        f"{tokens_per_s:,.0f} tokens/s in {tokens_per_s / LONG_CALL_TOKENS:,.0f} calls/s take "
        f"{tokens_per_s * client:.1f} cores of clients, {tokens_per_s * envoy:.1f} of Envoys, "
        f"{tokens_per_s * costs.journal_bytes_per_token / 1e6:,.0f} MB/s of journals"
    )
    for count in (1, int(clients)):
        outcome = simulate(planned(costs, replicas, rate, clients=count, prompts=2000))
        click.echo(
            f"  {count} client(s): {outcome.steady_tokens_per_s:,.0f} tokens/s "
            f"({outcome.steady_tokens_per_s / tokens_per_s:.0%}), clients {outcome.client_busy:.0%} busy"
        )


def tell_failures(costs: Costs, replicas: int = 100) -> None:
    """Servers that fail far too often, beside servers that do not."""
    quiet = scenario(costs, replicas, client_s_per_call=0.0, calls_per_slot=200, prompts=2000)
    whole = simulate(quiet)
    mtbf_s = 20 * whole.seconds
    failing = simulate(replace(quiet, mtbf_s=mtbf_s, restart_s=30.0))
    click.echo(
        f"\n{replicas} servers, each failing every {mtbf_s / 3600:.2f} h and away for 30 s: {failing.failures} "
        f"failures in {failing.seconds:.0f} s cut {failing.cut_calls} of {quiet.calls:,} calls; "
        f"{1 - failing.tokens_per_s / whole.tokens_per_s:.1%} slower"
    )


if __name__ == "__main__":
    main()
