"""One machine behind the front door: a server on vLLM promises what a server on the native engine does.

Both serve the bundled pair, in float32, with the same flags; the client cannot tell which it speaks to.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import grpc
import lda_client
import psutil
import pytest
from google.protobuf.json_format import MessageToDict
from lda_client import LdaClient, LdaClientError, WorkerDied, pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub
from serving import NOT_SERVING, SERVING, START_S, STOP_S, Health, Process

VLLM = ("--backend", "vllm")
FLAGS = ("--metrics-port", 0, "--max-queued-requests", 1)
TEA, SUM = "Which tea do you like?", "What is 2 plus 3?"
LONG = dict(max_new_tokens=4096, ignore_eos=True)  # to the end of the context window
ROWS = 64
WITHIN_S = 1.0


def until(holds, within_s):
    """Wait for what nobody announces."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "too late"
        time.sleep(0.005)


class Server(Process):
    """A server, a client of it, and how busy it is."""

    def serve(self):
        self.target = self.ready()
        self.client = LdaClient(self.target)
        self._channel = grpc.insecure_channel(self.target)
        self._load = LdaServiceStub(self._channel).GetLoad
        return self

    @property
    def worker(self):
        """The process above the ranks, as it is now."""
        return psutil.Process(int(re.findall(r"worker (\d+) started", self.text)[-1]))

    def load(self):
        return self._load(pb.GetLoadRequest(), timeout=30)

    def wait(self, holds, within_s=30.0):
        """Until the load is so."""
        until(lambda: holds(self.load()), within_s)

    def freed(self):
        """Until all rows are free, which may take a second."""
        self.wait(lambda load: not load.running_sequences and not load.open_requests, WITHIN_S)

    def close(self):
        if hasattr(self, "client"):
            self.client.close()
            self._channel.close()
        self.end()


@pytest.fixture(scope="module")
def servers():
    """The server under test, and the one that it is held against."""
    with closing(Server(*VLLM, *FLAGS)) as ours, closing(Server(*FLAGS)) as native:
        yield ours.serve(), native.serve()


@pytest.fixture
def server(servers):
    return servers[0]


def on_both(servers, ask):
    """What both answer."""
    return [ask(server.client) for server in servers]


def drawn(completions):
    """All that must be equal, bit for bit."""
    return [
        (
            (each.role, each.sequence_index, each.text, [token.id for token in each.tokens]),
            (each.reason_name, each.matched_stop, each.usage.prompt_token_count, each.usage.output_token_count),
        )
        for each in completions
    ]


def plain(messages):
    """Messages as dicts of what they hold."""
    return [MessageToDict(message, always_print_fields_with_no_presence=True) for message in messages]


def near(value):
    """The same with its numbers equal to any that are near."""
    if isinstance(value, dict):
        return {key: near(each) for key, each in value.items()}
    if isinstance(value, list):
        return [near(each) for each in value]
    # Relative for critical alphas: quotients of small differences, up to the thousands.
    return pytest.approx(value, abs=1e-3, rel=2e-3) if isinstance(value, float) else value


def test_health(server):
    """A server that is ready says SERVING."""
    with closing(Health(server.target)) as health:
        health.until(SERVING)


def test_the_pair_is_described_alike(servers):
    """Models, limits, defaults, fingerprint and vocabularies are told as by the native engine."""
    ours, native = on_both(servers, lambda client: client.model_pair())
    assert ours == native
    ours, native = on_both(servers, lambda client: client.tokenizer_compat())
    assert ours == native


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 20.0])
def test_a_seed_gives_the_same_text(servers, alpha):
    """40 rollouts are the native engine's, token for token."""
    options = dict(alpha=alpha, num_sequences=40, temperature=0.8, seed=11, max_new_tokens=40)
    ours, native = on_both(servers, lambda client: drawn(client.complete(TEA, **options)))
    assert ours == native


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.0),
        dict(num_sequences=100, max_new_tokens=5),
        dict(num_sequences=8, stop=["small", "tea", "e a"]),
        dict(num_sequences=8, stop_token_ids=[4, 5, 88, 264]),
        dict(num_sequences=8, min_new_tokens=30),
        dict(num_sequences=2, **LONG),
        dict(num_sequences=8, temperature=1.5, top_p=0.7, top_k=20, min_p=0.02, plausibility=0.01),
    ],
    ids=lambda options: "-".join(options),
)
def test_sampling_and_stopping(servers, options):
    """Filters, stops, minimum and maximum lengths and more sequences than rows do what they do on the native engine."""
    options = dict(alpha=1.0, seed=3, max_new_tokens=60) | options
    ours, native = on_both(servers, lambda client: drawn(client.complete(SUM, **options)))
    assert ours == native


def test_both_models_are_alpha_zero_and_minus_one(servers):
    """GenerateBoth draws from each model what GenerateLDA draws at 0 and at -1, on the same noise."""
    client, options = servers[0].client, dict(num_sequences=4, seed=5, max_new_tokens=40)
    with client.generate_both(TEA, **options) as stream:
        both = stream.gather()
    for role, alpha in ((pb.MODEL_ROLE_AFTER, 0.0), (pb.MODEL_ROLE_BEFORE, -1.0)):
        alone = client.complete(TEA, alpha=alpha, **options)
        assert [each.text for each in both.of_role(role)] == [each.text for each in alone]


def test_diagnostics(servers):
    """What is told of a drawn token is what the native engine tells of it."""
    options = dict(alpha=1.0, num_sequences=4, seed=2, max_new_tokens=30)
    wanted = dict(diagnostics=True, top_candidates=3, score_alphas=[-1.0, 0.0, 1.0, 5.0])
    ours, native = on_both(servers, lambda client: client.complete(TEA, **options, **wanted))
    for one, other in zip(ours, native, strict=True):
        assert plain(one.tokens) == near(plain(other.tokens))
        assert one.alpha_scores == pytest.approx(other.alpha_scores, abs=1e-3)


def test_score(servers):
    """A text is scored as by the native engine, whether or not its prompt is in the cache."""
    text, options = "I like green tea, and you? " * 5, dict(alpha=2.0, score_alphas=[-1.0, 0.0, 2.0], top_candidates=2)
    for _ in range(2):
        ours, native = on_both(servers, lambda client: client.score(TEA, text, **options).gather())
        assert plain(ours.tokens) == near(plain(native.tokens))
        assert ours.alpha_scores == pytest.approx(native.alpha_scores, abs=1e-3)


def test_tokens_arrive_one_by_one(server):
    """A token is with the reader while its sequence still runs."""
    with server.client.generate(TEA, **LONG) as stream:
        deltas = (event.delta for event in stream if event.HasField("delta"))
        assert [len(delta.tokens) for delta in itertools.islice(deltas, 3)] == [1, 1, 1]
        assert server.load().running_sequences == 1


def first_delta(stream):
    """Read until something was drawn."""
    return next(event for event in stream if event.HasField("delta"))


def test_leaving_frees_the_rows(server):
    """All rows of a stream that is left are free within a second."""
    with server.client.generate(TEA, num_sequences=100, **LONG) as stream:
        first_delta(stream)
        server.wait(lambda load: load.running_sequences == ROWS)
    server.freed()


def test_a_deadline_frees_the_rows(server):
    """A deadline ends the stream and frees its rows."""
    with pytest.raises(lda_client.DeadlineExceeded):
        server.client.complete(TEA, num_sequences=100, timeout_s=1.0, **LONG)
    server.freed()


MISTAKES = {
    "nan": dict(alpha=math.nan),
    "inf": dict(alpha=math.inf),
    "alpha": dict(alpha=200.0),
    "score_alphas": dict(score_alphas=[math.nan]),
    "top_p": dict(top_p=0.0),
    "greedy twice": dict(temperature=0.0, num_sequences=2),
    "limit": dict(max_new_tokens=5000),
    "context": dict(prompt="word " * 600),
    "unknown id": dict(prompt=[5, 512]),
    "empty": dict(prompt=""),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_alike(servers, mistake):
    """A mistake comes back under the same reason, in the same words and with the same facts."""

    def complain(client):
        with pytest.raises(lda_client.RequestRejected) as caught:
            client.complete(**{"prompt": TEA} | mistake)
        return facts(caught.value)

    ours, native = on_both(servers, complain)
    assert ours == native


def facts(error):
    return type(error), error.reason, error.message, error.metadata, error.violations


def test_a_text_too_long_to_score(servers):
    """Score refuses what does not fit the context window, with the figures."""

    def complain(client):
        with pytest.raises(lda_client.ContextExceeded) as caught:
            client.score(TEA, "word " * 600).gather()
        return facts(caught.value)

    ours, native = on_both(servers, complain)
    assert ours == native


def test_a_full_queue(server):
    """With all rows taken and as many requests waiting as may wait, one more is refused; then all is served."""
    long = server.client.generate(TEA, num_sequences=ROWS, **LONG)
    with long, ThreadPoolExecutor() as pool:
        first_delta(long)
        server.wait(lambda load: load.running_sequences == ROWS)
        waiting = pool.submit(server.client.complete, SUM, max_new_tokens=2)
        server.wait(lambda load: load.waiting_requests == 1)
        with pytest.raises(lda_client.QueueFull) as caught:
            server.client.complete(SUM)
        assert caught.value.metadata == {"depth": "1", "capacity": "1"}
        long.close()
        assert len(waiting.result()) == 1


def test_metrics_have_the_same_names(servers):
    """A dashboard for the native engine shows a server on vLLM: same names, kinds and labels."""
    ours, native = (measures(server.told(r"^metrics on (\S+)")[1]) for server in servers)
    assert ours == native


def measures(url):
    """Every metric of ours as "name kind"."""
    with urllib.request.urlopen(url, timeout=30) as page:
        found = re.findall(r"^# TYPE (lda_\S+ \S+)$", page.read().decode(), re.MULTILINE)
    assert len(found) > 10
    return set(found)


def test_sigterm_lets_streams_end(server):
    """On SIGTERM a running stream comes to its regular end; then the server exits with 0, and no process is left."""
    below = server.descendants
    with server.client.generate(TEA, num_sequences=8, max_new_tokens=100, ignore_eos=True) as stream:
        first_delta(stream)
        server.process.terminate()
        assert sum(event.HasField("finished") for event in stream) == 8
    assert server.process.wait(STOP_S) == 0
    gone(below)


def gone(processes):
    """Wait until all of them have ended; one that nobody reaped has."""
    until(lambda: not any(map(lives, processes)), WITHIN_S * 5)


def lives(process):
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model-after-id", "/nowhere/at-all", "--model-before-id", "/nowhere/else"), "name a local folder"),
        (("--deterministic",), "use --backend native"),
        (("--kv-cache-tokens", 10**9), "Available memory .* is less than requested"),
        (("--tensor-parallel-size", 3), "divisible by tensor parallel size"),
    ],
    ids=["missing model", "refused setting", "too little memory", "uneven split"],
)
def test_a_server_that_cannot_start(flags, words):
    """It says why in one line, ends with code 1, and no process is left."""
    with closing(Server(*VLLM, *flags)) as server:
        server.told(r"worker \d+ started")
        below = server.descendants
        server.told(rf"^lda-service: .*{words}.*\.$")
        assert server.process.wait(STOP_S) == 1
    gone(below)


@pytest.fixture(scope="module")
def parallel(servers):
    """A server whose pair is shared by two ranks, each a process of its own, on the port of one that has ended."""
    ended = servers[0]
    ended.end()
    with closing(Server(*VLLM, "--tensor-parallel-size", 2, "--port", ended.target.rpartition(":")[2])) as server:
        yield server.serve()


def test_two_ranks_draw_the_same(servers, parallel):
    """Ranks that share every layer draw the native engine's rollouts, and the port of a server that ended is free."""
    assert parallel.target == servers[0].target
    options = dict(alpha=1.0, num_sequences=10, seed=11, max_new_tokens=20)
    assert drawn(parallel.client.complete(TEA, **options)) == drawn(servers[1].client.complete(TEA, **options))


def end_of(stream):
    """Read a stream to its error; that, and when it came."""
    with pytest.raises(LdaClientError) as caught:
        for _ in stream:
            pass
    return caught.value, time.monotonic()


@pytest.mark.parametrize(("rank", "streams"), [(1, 4), (0, 0)], ids=["busy", "idle"])
def test_a_rank_is_killed(parallel, rank, streams):
    """Kill -9 of a rank: streams end UNAVAILABLE and health turns, both within a second; then the server is back by
    itself, and nothing is left of the processes before.
    """
    with closing(Health(parallel.target)) as health, ThreadPoolExecutor() as pool:
        health.until(SERVING)
        before = [parallel.worker, *parallel.worker.children(recursive=True)]
        running = [parallel.client.generate(TEA, seed=seed, **LONG) for seed in range(streams)]
        for stream in running:
            first_delta(stream)
        ends = [pool.submit(end_of, stream) for stream in running]
        killed_at = time.monotonic()
        os.kill(parallel.ranks[rank], signal.SIGKILL)
        assert health.until(NOT_SERVING) - killed_at < WITHIN_S
        for error, ended_at in (end.result() for end in ends):
            assert isinstance(error, WorkerDied)
            assert ended_at - killed_at < WITHIN_S
        health.until(SERVING)
    gone(before)
    assert len(parallel.client.complete(TEA, max_new_tokens=4)) == 1


def test_the_worker_is_killed(parallel):
    """Kill -9 of the process above the ranks leaves none of them; SIGTERM while the next one loads leaves nothing."""
    ranks = [psutil.Process(pid) for pid in parallel.ranks]
    assert len(ranks) == 2
    with parallel.client.generate(TEA, **LONG) as stream:
        first_delta(stream)
        parallel.worker.kill()
        error, _ = end_of(stream)
    assert isinstance(error, WorkerDied)
    gone(ranks)
    until(lambda: parallel.ranks, START_S)
    below = parallel.descendants
    parallel.process.terminate()
    assert parallel.process.wait(STOP_S) == 0
    gone(below)
