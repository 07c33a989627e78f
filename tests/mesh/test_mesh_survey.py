"""A survey through the Envoy of `deploy/envoy/envoy-affinity.yaml` before three real servers with the bundled pair.

`python -m benchmarks.replicas survey` is the same with 10,000 rollouts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
import pytest_asyncio
from lda_client.lab import Pace, Prompt, SurveySettings, run_survey_async
from lda_client.lab._progress import Quiet
from mesh_harness import NO_RETRIES, Served, front, logged, replicas, running
from server_harness import Client

from lda_service.pairs import demo

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPTS = [Prompt(f"p{number}", text) for number, text in enumerate(demo.PROMPTS)]
SETTINGS = SurveySettings(alphas=(0, 0.5), rollouts=8, chunk_size=4, max_new_tokens=48, slopes=False)
ROLLOUTS = len(PROMPTS) * len(SETTINGS.alphas) * SETTINGS.rollouts


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def servers():
    async with running([Served() for _ in range(3)]) as started:
        yield started


def balanced(servers, folder):
    """Envoy before these servers."""
    return front("envoy-affinity.yaml", [each.port for each in servers], folder)


async def drawn(folder, target, settings=SETTINGS, **options):
    """The bytes of the rollouts of a survey that was completed."""
    outcome = await run_survey_async(folder, PROMPTS, settings, [target], **options)
    assert outcome.missing == 0
    return outcome.run.rollouts_path.read_bytes()


class Milestone(Quiet):
    """A reporter that says when so many rollouts are drawn."""

    def __init__(self, rollouts):
        self._left = rollouts
        self.reached = asyncio.Event()

    def advance(self, rollouts, tokens):
        self._left -= rollouts
        if self._left <= 0:
            self.reached.set()


async def test_a_prompt_stays_on_the_server_that_holds_it(servers, tmp_path):
    """While three calls are under way, which no server is full with, every call of a prompt goes to one server."""
    settings = SurveySettings(alphas=(0,), rollouts=6, chunk_size=2, max_new_tokens=16, slopes=False)
    async with balanced(servers, tmp_path) as mesh:
        await mesh.all_healthy()
        await drawn(tmp_path / "run", f"3@127.0.0.1:{mesh.port}", settings, pace=Pace(at_once=3))
    homes = defaultdict(set)
    for call in logged(mesh):
        homes[call.prompt].add(call.port)
    assert len(homes) == len(PROMPTS)
    assert {len(ports) for ports in homes.values()} == {1}
    assert len(set.union(*homes.values())) > 1


async def test_a_survey_over_three_servers_is_that_of_one_though_one_dies(servers, tmp_path):
    """Kill -9 of a server that draws: its streams alone are cut, they are drawn again, and the file is bit for bit
    the file of one server that nothing happened to.
    """
    alone = await drawn(tmp_path / "alone", servers[0].address)
    half = Milestone(ROLLOUTS // 2)
    async with balanced(servers, tmp_path) as mesh:
        await mesh.all_healthy()
        survey = asyncio.create_task(
            drawn(tmp_path / "three", f"3@127.0.0.1:{mesh.port}", reporter=half, pace=Pace(at_once=24))
        )
        await half.reached.wait()
        busy = mesh.hosts()
        victim = max(servers, key=lambda each: busy[each.port]["rq_active"])
        await victim.kill()
        together = await survey
    calls = list(logged(mesh))
    cut = [each for each in calls if each.is_cut]
    assert together == alone
    assert {each.port for each in cut} == {victim.port}
    assert len({each.port for each in calls}) == 3
    # What was not cut: a look at each prompt, and each chunk once.
    assert len(calls) - len(cut) == len(PROMPTS) + ROLLOUTS // SETTINGS.chunk_size


async def test_a_connection_carries_more_streams_than_a_thousand(tmp_path):
    """A survey of many servers is one connection to Envoy, which by default would hold back what is above 1,024."""
    async with replicas(2, engine={"max_queued_requests": 1200}) as servers, balanced(servers, tmp_path) as mesh:
        await mesh.all_healthy()
        client = Client(mesh.port, NO_RETRIES)
        held = [client.generate("hold") for _ in range(1100)]
        await mesh.until(lambda hosts: sum(each["rq_active"] for each in hosts.values()) == len(held))
        for each in held:
            each.cancel()
        await client.channel.close()
