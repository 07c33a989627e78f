"""The vLLM backend against two engines that share no code with vLLM: transformers' `generate`, and the native engine.

Greedy tokens must be those of transformers with its two-model guidance processor, draws those of the native engine:
for every way to spread a pair, in batches whose rows leave and move.
"""

from __future__ import annotations

from functools import partial

import pytest
from remote_engine import MUTATIONS, V2
from test_engine import of
from test_oracle import PROMPTS as SHORTER
from test_oracle import Oracle, collect, request
from vllm_pairs import Setup, save_pair, save_unlike_pair

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Branch,
    GenerationRequest,
    Output,
    Role,
    Sampling,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    Stopping,
)

ALPHAS = (-1.0, -0.5, 0.0, 1.0, 3.0, 20.0)
LENGTHS = (12, 7, 10)
PROMPTS = (*SHORTER, tuple(b"It grows into another block"))
TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
TIGHT = dict(max_running_sequences=12, kv_cache_tokens=128, arguments={"block_size": 32})
SETUPS = {
    "llama": Setup(),
    "olmo2": Setup(partial(save_pair, architecture="olmo2")),
    "qwen3, preempted": Setup(partial(save_pair, architecture="qwen3"), TIGHT, is_tight=True),
    "unlike": Setup(save_unlike_pair),
    "TP 2": Setup(options=dict(parallel=TP)),
    "PP 2": Setup(options=dict(parallel=PP)),
    "V2, preempted": Setup(options=dict(TIGHT, environment=V2), is_tight=True),
    "V2, unlike, TP 2": Setup(save_unlike_pair, dict(environment=V2, parallel=TP)),
    "V2, PP 2": Setup(options=dict(environment=V2, parallel=PP)),
}


@pytest.fixture(scope="module", params=SETUPS)
def running(request, tmp_path_factory):
    """The setup, its engine, and the folders of its pair."""
    setup = SETUPS[request.param]
    engine, pair = setup.start(tmp_path_factory.mktemp("pair"))
    yield setup, engine, pair
    engine.close()


def greedy_jobs(engine, pair):
    """Requests of all alphas and prompts, of unlike lengths, and what transformers answers to them."""
    width = len(engine.pair.shared_ids)
    oracle = Oracle(*pair, engine.pair.shared_ids, rows=width)
    jobs, expected = [], {}
    for alpha in ALPHAS:
        for n, prompt in enumerate(PROMPTS):
            name, length = f"{alpha}/{n}", LENGTHS[(n + int(alpha)) % 3]
            jobs.append(request(name, prompt, alpha, length))
            expected[name] = oracle(prompt, alpha)[:length]
    return jobs, expected


def answers(engine, jobs):
    """Token ids by request, of jobs that run together."""
    for job in jobs:
        engine.submit(job)
    return collect(engine)


def test_greedy_tokens_equal_the_oracle(running):
    """At every alpha, all in one batch whose rows leave and move: transformers' own tokens."""
    setup, engine, pair = running
    jobs, expected = greedy_jobs(engine, pair)
    assert len({tuple(tokens) for tokens in expected.values()}) > len(PROMPTS) * 4
    assert answers(engine, jobs) == expected
    assert (engine.load().preemptions > 0) == setup.is_tight
    engine.check_integrity()


SAMPLINGS = {
    "plain": Sampling(0.8, 1.0, seed=3),
    "top_p": Sampling(0.8, 0.9, seed=4),
    "top_k": Sampling(0.8, 1.0, top_k=7, seed=5),
    "min_p": Sampling(0.8, 1.0, min_p=0.05, seed=6),
    "plausibility": Sampling(0.8, 1.0, plausibility=0.1, seed=7),
    "all": Sampling(0.8, 0.95, 20, 0.02, 0.05, seed=8),
}


def drawn_jobs():
    """Every filter at two alphas, with evidence for some; both models on their own; scored texts of unlike length."""
    jobs = []
    for n, (name, sampling) in enumerate(SAMPLINGS.items()):
        for alpha in (0.5, 3.0):
            output = Output(alpha == 3.0, n % 4 if alpha == 3.0 else 0, (0.0, alpha) if n % 2 else ())
            stopping = Stopping(6 + 3 * n, min_new_tokens=n, stop_strings=("a",) if n == 3 else ())
            branches = (Branch(Role.AMPLIFIED, alpha),)
            jobs.append(GenerationRequest(f"{name}/{alpha}", PROMPTS[n % 3], branches, 2, sampling, stopping, output))
    both = (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
    jobs.append(GenerationRequest("both", PROMPTS[1], both, 2, SAMPLINGS["all"], Stopping(9)))
    jobs.append(ScoreRequest("score", PROMPTS[0], PROMPTS[2], 2.0, 3, (-0.5, 0.0, 2.0)))
    jobs.append(ScoreRequest("short", PROMPTS[1], PROMPTS[0][:1], -0.5, 0, (1.0,)))
    return jobs


def events_of(engine, jobs):
    """All events of jobs that run together."""
    for job in jobs:
        engine.submit(job)
    events = []
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    return events


def tokens_by_sequence(events):
    """Records of drawn tokens by request, role and index; of scored tokens by request."""
    found = {}
    for event in of(events, SequenceDelta):
        found.setdefault((event.request_id, event.role, event.sequence_index), []).extend(event.tokens)
    for block in of(events, ScoreBlock):
        assert block.offset == len(found.setdefault((block.request_id,), []))
        found[block.request_id,].extend(block.tokens)
    return found


def test_draws_equal_the_native_engine(running):
    """Tokens, text and ends of every seed are the native engine's; logprobs, diagnostics and scores agree to 1e-3."""
    _, engine, pair = running
    native = Engine(load_pair(PairConfig(*map(str, pair), device="cpu", dtype="float32")), EngineConfig())
    ours, theirs = events_of(engine, drawn_jobs()), events_of(native, drawn_jobs())
    mine, true = tokens_by_sequence(ours), tokens_by_sequence(theirs)
    assert mine.keys() == true.keys()
    for key in true:
        assert [one.token_id for one in mine[key]] == [one.token_id for one in true[key]], key
        for one, other in zip(mine[key], true[key], strict=True):
            assert_alike(one, other)
    assert ends(ours).keys() == ends(theirs).keys()
    for key, (facts, scores) in ends(theirs).items():
        assert ends(ours)[key] == (facts, pytest.approx(scores, abs=1e-3)), key


def ends(events):
    """How each sequence and text ended, and its scores."""
    text = {}
    for event in of(events, SequenceDelta):
        key = event.request_id, event.role, event.sequence_index
        text[key] = text.get(key, "") + event.text
    found = {
        (key := (end.request_id, end.role, end.sequence_index)): (
            (text.get(key, ""), end.reason, end.output_tokens, end.stop_string, end.stop_token_id),
            end.alpha_scores,
        )
        for end in of(events, SequenceFinished)
    }
    return found | {
        (block.request_id,): ((block.total_tokens,), block.alpha_scores)
        for block in of(events, ScoreBlock)
        if block.is_last
    }


def assert_alike(one, other):
    """Two records of one token, as two engines report it."""
    assert (one.piece, one.logprob) == (other.piece, other.logprob and pytest.approx(other.logprob, abs=1e-3))
    if other.diagnostics is None:
        assert one.diagnostics is None
        return
    mine, true = one.diagnostics, other.diagnostics
    for name in ("after_logprob", "before_logprob", "amplified_logprob", "after_before_kl", "novel_mass"):
        assert getattr(mine, name) == pytest.approx(getattr(true, name), abs=1e-3)
    assert mine.after_rank == true.after_rank
    assert mine.before_rank == true.before_rank
    assert mine.critical_token_id == true.critical_token_id
    assert mine.critical_alpha == (true.critical_alpha and pytest.approx(true.critical_alpha, rel=1e-2, abs=1e-3))
    for ours, theirs in zip(mine.candidates, true.candidates, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.amplified_logprob == pytest.approx(theirs.amplified_logprob, abs=1e-3)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("running", ["llama", "V2, preempted"], indirect=True)
def test_a_broken_mapping_of_rows_is_caught(running, mutation):
    """These tests can fail: an engine that gives rows another's settings does not pass the comparison."""
    _, engine, pair = running
    jobs, expected = greedy_jobs(engine, pair)
    engine.mutate(mutation)
    try:
        assert answers(engine, jobs) != expected
    finally:
        engine.mutate(None)
