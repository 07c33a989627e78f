"""Several servers: what the client says about a prompt and about its targets, and what the simulation promises."""

from __future__ import annotations

import threading

import pytest
from lab_harness import PROMPTS, WAIT_S, answer, quick
from lda_client import AsyncLdaClient, LdaClient
from lda_client.lab import Pace, SettingsError, resume_survey, run_survey
from lda_client.lab._fleet import parse_target
from lda_client.testing import FakeServer

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


@pytest.mark.parametrize("target", ["0@localhost:1", "3@"])
def test_targets_before_no_server_are_refused(tmp_path, target):
    """A count of zero, or no address, is a mistake in the target, named before anything is asked."""
    with pytest.raises(SettingsError, match="N@HOST:PORT"):
        run_survey(tmp_path, PROMPTS, quick(), [target])


@pytest.mark.parametrize("target", ["localhost:50051", "dns:///servers:50051", "unix-abstract:name@host"])
def test_other_targets_are_addresses(target):
    """An address without a count goes to gRPC as it is, `@` or not."""
    assert parse_target(target) == (target, 1)
