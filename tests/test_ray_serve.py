"""The service as a Ray Serve application: the real client, and two replicas with the bundled pair.

The cluster takes about 20 s to start. Needs Ray, whose dependencies are not those of the rest: `make test-ray` has an
environment for it.
"""

import asyncio
import os
import signal
import sys
import time

import pytest

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install -c constraints-ray.txt 'ray[serve]'")

import polars as pl
import psutil
from lab_harness import ROOT, WAIT_S, quick, real_server
from lda_client import (
    Aborted,
    AsyncLdaClient,
    ContextExceeded,
    DeadlineExceeded,
    LdaClient,
    LdaClientError,
    LimitExceeded,
    ValidationFailed,
    WorkerDied,
)
from lda_client.lab import Prompt, run_survey
from lda_client.lab._progress import Quiet

from lda_service.errors import ConfigError
from lda_service.pairs import demo
from lda_service.rpc.health import check

sys.path.append(str(ROOT / "deploy" / "ray"))
from cluster import serving
from lda_ray import HAPROXY, make_server

FREED_S = 1.0
ROUNDING = 1e-4  # of log-probabilities, summed over a sequence
LONG = {"alpha": 1.0, "num_sequences": 4, "max_new_tokens": 450, "ignore_eos": True}


@pytest.mark.parametrize(
    ("ingress", "flags", "remedy"),
    [("0", "", "set RAY_SERVE_ENABLE_HA_PROXY=1"), ("1", "--tls-cert a.pem --tls-key a.key", "leave out TLS_CERT")],
)
def test_what_cannot_be_served_is_refused(monkeypatch, ingress, flags, remedy):
    """Neither behind Serve's proxy in Python nor with TLS that nobody in Serve speaks."""
    monkeypatch.setenv(HAPROXY, ingress)
    with pytest.raises(ConfigError, match=remedy):
        make_server(flags)


@pytest.fixture(scope="module")
def plain():
    """The same service without Ray."""
    with real_server("--deterministic") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("ray") / "serve.log", flags="--deterministic") as running:
        yield running


def answers(target):
    """Of each verb what does not depend on the clock and on who answers: first what was drawn, then logprobs."""
    with LdaClient(target) as client:
        drawn = client.complete("Good morning!", alpha=0.5, seed=7, num_sequences=3, score_alphas=[0, 1])
        both = client.generate_both("Good morning!", seed=7, max_new_tokens=12).gather()
        scored = client.score("Who are you?", "I am a pirate.", score_alphas=[0, 1]).gather()
        facts = [client.tokenizer_compat(), client.model_pair()]
    texts = [(each.text, each.finish_reason, [token.id for token in each.tokens]) for each in (*drawn, *both)]
    tokens = [token for each in (*drawn, *both) for token in each.tokens]
    sums = [each.alpha_scores[alpha] for each in (*drawn, scored) for alpha in (0, 1)]
    compared = [token.diagnostics.after_logprob for token in scored.tokens]
    return (texts, facts), [token.logprob for token in tokens] + sums + compared


def test_answers_are_those_of_the_plain_server(cluster, plain):
    """Every verb gives through Serve what it gives without, for the same seed."""
    through, without = answers(cluster.target), answers(plain.target)
    assert through[0] == without[0]
    assert through[1] == pytest.approx(without[1], abs=ROUNDING)


def test_messages_arrive_as_they_are_made(cluster):
    """The first token is here long before the last one is drawn."""
    began = time.monotonic()
    with LdaClient(cluster.target) as client, client.generate("Hi", **LONG) as stream:
        times = [time.monotonic() - began for event in stream if event.WhichOneof("event") == "delta"]
    assert times[0] < times[-1] / 2


def test_health_is_that_of_a_replica(cluster):
    """grpc.health.v1 answers through Serve, for balancers in front of it."""
    host, _, port = cluster.target.partition(":")
    assert check(host, int(port), timeout_s=5) == "SERVING"


@pytest.mark.parametrize(
    ("options", "kind", "fields", "metadata"),
    [
        ({"alpha": 1000.0}, ValidationFailed, ["alpha"], {}),
        ({"max_new_tokens": 100_000}, LimitExceeded, ["stopping.max_new_tokens"], {"limit": "4096"}),
        ({"prompt": "hi " * 600}, ContextExceeded, ["prompt"], {"limit": "512"}),
    ],
)
def test_errors_arrive_whole(cluster, plain, options, kind, fields, metadata):
    """Code, message, reason, metadata and field path of an error are those of the plain server."""
    seen = []
    for target in (cluster.target, plain.target):
        with LdaClient(target) as client, pytest.raises(kind) as raised:
            client.complete(**{"prompt": "Hi", **options})
        error = raised.value
        seen.append((str(error), error.code, error.reason, dict(error.metadata), error.violations))
    assert seen[0] == seen[1]
    assert [each.field for each in seen[0][4]] == fields
    assert metadata.items() <= seen[0][3].items()


async def opened(client, count):
    """Long streams, begun one after another; each is left when the client closes."""
    streams = []
    for _ in range(count):
        stream = await client.generate("Hi", **LONG).__aenter__()
        await anext(aiter(stream))
        streams.append(stream)
    return streams


async def freed(cluster):
    """Seconds until no replica decodes anything."""
    began = time.monotonic()
    while any(load.running_sequences for load in (await asyncio.to_thread(cluster.loads)).values()):
        assert time.monotonic() < began + WAIT_S
    return time.monotonic() - began


async def test_two_replicas_share_and_a_cancel_frees_rows(cluster):
    """Streams are spread evenly, and rows are free within a second after a caller has left."""
    await freed(cluster)
    async with AsyncLdaClient(cluster.target) as client:
        streams = await opened(client, 4)
        loads = await asyncio.to_thread(cluster.loads)
        assert [load.open_requests for load in loads.values()] == [2, 2]
        for stream in streams:
            await stream.__aexit__(None, None, None)
        assert await freed(cluster) < FREED_S


async def test_a_deadline_ends_the_work(cluster):
    """A call past its deadline fails with DEADLINE_EXCEEDED, and its rows are free within a second."""
    async with AsyncLdaClient(cluster.target) as client:
        with pytest.raises(DeadlineExceeded):
            await client.complete("Hi", **LONG, timeout_s=0.3)
        assert await freed(cluster) < FREED_S


async def read_all(stream):
    """Read a stream to its end; its error, or None."""
    try:
        async for _ in stream:
            pass
    except LdaClientError as error:
        return error
    return None


async def outcomes(cluster, strike):
    """What eight streams come to when something is done to one replica; checks that others take its calls at once."""
    until, [victim, _] = time.monotonic() + WAIT_S, cluster.replicas()
    before = set(cluster.loads())
    async with AsyncLdaClient(cluster.target) as client:
        streams = await opened(client, 8)
        strike(victim)
        ended = await asyncio.gather(*(read_all(stream) for stream in streams))
        assert await client.complete("Hi", max_new_tokens=2)
    while set(await asyncio.to_thread(cluster.loads)) == before:
        assert time.monotonic() < until
    return ended


async def test_a_killed_replica_costs_its_own_streams_only(cluster):
    """kill -9: half of the streams are cut, the others end well, calls work, and a fresh replica comes."""
    ended = await outcomes(cluster, lambda replica: os.kill(replica, signal.SIGKILL))
    cut = [error for error in ended if error is not None]
    assert len(cut) == 4
    assert {type(error) for error in cut} == {Aborted}


async def test_a_replica_whose_worker_dies_is_replaced(cluster):
    """Its streams are told WORKER_DIED as by the plain server; it leaves Serve, where it would refuse every call."""

    def kill_worker(replica):
        children = psutil.Process(replica).children()
        [worker] = [each for each in children if "multiprocessing.spawn" in " ".join(each.cmdline())]
        worker.kill()

    ended = await outcomes(cluster, kill_worker)
    cut = [error for error in ended if error is not None]
    assert len(cut) == 4
    assert {type(error) for error in cut} == {WorkerDied}


class Killer(Quiet):
    """Kills all replicas once the survey has something."""

    def __init__(self, cluster):
        self.cluster, self.killed = cluster, False

    def advance(self, rollouts, tokens):
        if not self.killed:
            for replica in self.cluster.replicas():
                os.kill(replica, signal.SIGKILL)
            self.killed = True


def test_a_survey_outlives_its_replicas(cluster, plain, tmp_path):
    """A survey through Serve, with both replicas killed on the way, has the rollouts of the plain server."""
    prompts = [Prompt(f"p{index}", text) for index, text in enumerate(demo.PROMPTS[:6])]
    settings = quick(alphas=(0, 0.5, 1), rollouts=40, chunk_size=8)
    expected = run_survey(tmp_path / "plain", prompts, settings, [plain.target]).run
    killer = Killer(cluster)
    outcome = run_survey(tmp_path / "ray", prompts, settings, [f"2@{cluster.target}"], reporter=killer)
    assert killer.killed
    assert outcome.missing == 0
    rollouts, wanted = (pl.read_parquet(run.rollouts_path) for run in (outcome.run, expected))
    assert rollouts.drop("score_logprobs").equals(wanted.drop("score_logprobs"))
    scores, right = (each["score_logprobs"].explode().to_list() for each in (rollouts, wanted))
    assert scores == pytest.approx(right, abs=ROUNDING)
