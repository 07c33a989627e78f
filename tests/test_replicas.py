"""Several servers: what the client says about a prompt and about its targets, and what the simulation promises."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import polars
import pytest
from lab_harness import PROMPTS, WAIT_S, answer, quick
from lda_client import AsyncLdaClient, LdaClient
from lda_client.lab import Pace, SettingsError, resume_survey, run_survey
from lda_client.lab._fleet import parse_target
from lda_client.testing import FakeServer

from benchmarks.fleet_simulation import Envoy, Ring, Scenario, simulate

HEADER = "x-lda-prompt-hash"


# Prompt affinity ----------------------------------------------------------------------------------------------------


def test_calls_of_one_prompt_carry_one_digest():
    """Every streaming verb names its prompt, alike whatever else is asked; another prompt has another name."""
    with FakeServer() as server, LdaClient(server.target) as client:
        client.complete("Who are you?", alpha=0.5, seed=1, num_sequences=3)
        client.complete("Who are you?", alpha=2.0, seed=2)
        client.generate_both("Who are you?").gather()
        client.score("Who are you?", "I am a pirate.").gather()
        client.complete("Who is she?")
        client.complete("Who are you?", system="Be kind.")
        named = [call.metadata[HEADER] for call in server.calls if HEADER in call.metadata]
    assert len(named) == 6
    assert len(set(named[:4])) == 1
    assert len(set(named)) == 3


async def test_both_clients_name_a_prompt_alike():
    """The digest is of the prompt as it is sent, so the same from asyncio and from synchronous code."""
    with FakeServer() as server:
        async with AsyncLdaClient(server.target) as client:
            await client.complete("Who are you?")
        with LdaClient(server.target) as client:
            client.complete("Who are you?")
        first, second = (call.metadata[HEADER] for call in server.calls if HEADER in call.metadata)
    assert first == second


# A target before several servers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "expected"), [("{}", 4), ("3@{}", 12)])
def test_calls_at_once_fill_every_replica(tmp_path, target, expected):
    """`3@HOST:PORT` keeps three times as many calls open as one server gets, no fewer and no more."""
    everybody, running, most = threading.Barrier(expected), set(), []

    def respond(request):
        if not request.sampling.seed:  # only asks whether the prompt is admitted
            return answer(request)
        running.add(request.sampling.seed)
        everybody.wait(WAIT_S)  # breaks if fewer calls than that are ever open
        most.append(len(running))
        running.discard(request.sampling.seed)
        return answer(request)

    with FakeServer(respond) as server:
        server.model_pair.limits.max_running_sequences = 8
        outcome = run_survey(tmp_path, PROMPTS, quick(rollouts=24), [target.format(server.target)])
    assert outcome.missing == 0
    assert max(most) == expected


def test_a_survey_is_resumed_at_as_many_replicas(tmp_path):
    """The run folder keeps the target as it was given; so does what goes on with it."""
    with FakeServer(answer) as server:
        target = f"2@{server.target}"
        run_survey(tmp_path, PROMPTS, quick(), [target], pace=Pace(budget_tokens=1))
        run = resume_survey(tmp_path).run
    assert [session["endpoints"][0]["target"] for session in run.manifest.sessions] == [target, target]


def test_clients_may_share_a_survey_by_its_prompts(tmp_path):
    """Two surveys, each of half of the prompts, draw the rows of the whole one."""
    with FakeServer(answer) as server:
        halves = [
            run_survey(tmp_path / prompt.id, [prompt], quick(), [server.target]).run.rollouts() for prompt in PROMPTS
        ]
        whole = run_survey(tmp_path / "whole", PROMPTS, quick(), [server.target]).run.rollouts()
    assert polars.concat(halves).equals(whole)


@pytest.mark.parametrize("target", ["0@localhost:1", "3@"])
def test_targets_before_no_server_are_refused(tmp_path, target):
    """A count of zero, or no address, is a mistake in the target, named before anything is asked."""
    with pytest.raises(SettingsError, match="N@HOST:PORT"):
        run_survey(tmp_path, PROMPTS, quick(), [target])


@pytest.mark.parametrize("target", ["localhost:50051", "dns:///servers:50051", "unix-abstract:name@host"])
def test_other_targets_are_addresses(target):
    """An address without a count goes to gRPC as it is, `@` or not."""
    assert parse_target(target) == (target, 1)


# The simulation -----------------------------------------------------------------------------------------------------

CALL = Scenario(1, (2.0,), tokens_per_call=100, slots=4, calls_per_slot=25)


def test_one_server_takes_the_time_of_its_calls():
    """A server with four slots runs a hundred calls of 2 s in 50 s, whatever waits."""
    outcome = simulate(CALL)
    assert outcome.seconds == pytest.approx(50)
    assert outcome.tokens_per_s == pytest.approx(200)
    assert outcome.balance == 1
    assert outcome.latency_s[0] == pytest.approx(2)
    assert outcome.latency_s[-1] == pytest.approx(4)  # as many calls wait as run


def test_a_client_is_a_limit():
    """However many servers there are, no more comes than one client's processor takes in."""
    outcome = simulate(replace(CALL, replicas=20, client_s_per_call=0.1))
    assert outcome.tokens_per_s == pytest.approx(100 / 0.1, rel=0.1)
    assert outcome.client_busy > 0.95
    relieved = simulate(replace(CALL, replicas=20, client_s_per_call=0.1, clients=4))
    assert relieved.tokens_per_s > 3 * outcome.tokens_per_s


def test_bounded_loads_keep_servers_busy():
    """With few prompts, affinity alone leaves most servers idle; the bound puts nearly all to work."""
    bound = replace(CALL, replicas=30, prompts=10)
    strict = simulate(replace(bound, balance_factor=math.inf))
    assert strict.servers_per_prompt == 1
    assert strict.balance >= 3  # 30 servers, 10 of them asked at most
    loose, tight = (simulate(replace(bound, balance_factor=factor)) for factor in (1.5, 1.05))
    assert strict.tokens_per_s < loose.tokens_per_s < tight.tokens_per_s
    assert tight.steady_tokens_per_s > 0.8 * 30 * 200


def test_failures_cost_their_own_calls():
    """Every call is kept in spite of failures; what is cut is no more than servers had open, and time is lost."""
    quiet = replace(CALL, replicas=10, calls_per_slot=100)
    whole, failing = simulate(quiet), simulate(replace(quiet, mtbf_s=600, restart_s=20))
    assert len(failing.latency_s) == quiet.calls
    assert failing.failures > 0
    assert 0 < failing.cut_calls <= 3 * quiet.slots * failing.failures
    assert failing.seconds > whole.seconds


def test_envoy_keeps_a_prompt_on_its_server_and_moves_only_those_of_a_dead_one():
    """The model of Envoy: one server for a prompt while there is room; a server that goes moves its prompts alone."""
    alive = np.ones(5, dtype=bool)
    envoy = Envoy(Ring(5, np.random.default_rng(0)), alive, math.inf)
    homes = [envoy.begin(prompt) for prompt in range(200)]
    assert [envoy.begin(prompt) for prompt in range(200)] == homes
    assert set(homes) == set(range(5))
    alive[2] = False
    moved = [envoy.begin(prompt) for prompt in range(200)]
    assert [then for then, now in zip(homes, moved, strict=True) if then != now] == [2] * homes.count(2)
