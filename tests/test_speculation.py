"""Speculation is exact: the rule by enumeration, the engine's law against transformers, and tokens of every seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from forced_policy import Forced
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_engine import EOS, generation, of, run, text_of, tokens_of
from test_sampling import exact_law
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Branch,
    FinishReason,
    Output,
    RequestFailed,
    Role,
    Sampling,
    SequenceFinished,
    Stopping,
)
from lda_service.engine.speculation import accept_or_replace, draw_from
from lda_service.errors import ConfigError

MODES = ("auto", "coupled")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: `after`, `near` (after and a little noise) and `far` (unrelated)."""
    folder = tmp_path_factory.mktemp("speculation")
    save_model(folder / "after", "llama", seed=1)
    save_model(folder / "far", "llama", seed=2)
    save_model(folder / "near", "llama", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder / "near")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(folder / "near")
    return folder


@pytest.fixture(scope="module")
def engine_of(folders):
    """A fresh engine on (after, `before`); its policy is forced if lengths are given."""

    def make(before="near", mode="auto", lengths=(), rows=8, few=None, native=True, **changes):
        loaded = load_pair(PairConfig(str(folders / "after"), str(folders / before), device="cpu", native=native))
        limits = dict(prefill_chunk_tokens=32, max_running_sequences=rows, speculation_max_rows=few or rows)
        engine = Engine(loaded, EngineConfig(**limits, speculation=mode, **changes))
        if lengths:
            engine.policy = Forced(*lengths)
        return engine

    return make


# The rule ---------------------------------------------------------------------------------------------------------


def step_law(outcome, count):
    """The law of `outcome(u)` for uniform u, where outcome is a rising step function: its steps, by bisection."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(46):
        middle = (low + high) / 2
        is_low = outcome(middle) <= torch.arange(count)
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return torch.diff(high, prepend=torch.zeros(1, dtype=torch.float64))


@st.composite
def laws(draw, count=6):
    """A probability law on `count` tokens, some of which it rules out."""
    weights = draw(st.lists(st.sampled_from([0.0, 0.0, 1e-6, 0.3, 1.0, 2.7, 40.0]), min_size=count, max_size=count))
    weights[draw(st.integers(0, count - 1))] += draw(st.floats(0.01, 1.0))
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


@settings(max_examples=25, deadline=None)
@given(p=laws(), q=laws())
def test_draft_accept_and_replace_together_have_exactly_the_law_q(p, q):
    """Each draft's probability, its acceptance and its replacement, measured to 1e-13, add up to q within 1e-12."""
    count = len(p)
    many = lambda x: x.expand(count, 1, -1)
    half = torch.full((count, 1), 0.5, dtype=torch.float64)
    drafted = step_law(lambda u: draw_from(p.expand(count, -1), u), count)
    torch.testing.assert_close(drafted, p, atol=1e-12, rtol=0)
    total = torch.zeros_like(q)
    for draft in p.nonzero()[:, 0]:
        x = draft.expand(count, 1)
        settle = lambda accept, replace, x=x: accept_or_replace(many(p), many(q), x, accept, replace)
        # The outcome "fails" (1) rises with the acceptance's number; its first step is the draft's chance to stand.
        stands = step_law(lambda u, s=settle: 1 - s(u[:, None], half)[1], count)[0]
        total[draft] += p[draft] * stands
        if stands < 1 - 1e-12:
            fails = torch.full((count, 1), 1 - 1e-13, dtype=torch.float64)
            total += p[draft] * (1 - stands) * step_law(lambda u, s=settle, f=fails: s(f, u[:, None])[0][:, 0], count)
    torch.testing.assert_close(total, q, atol=1e-12, rtol=0)


def test_drafts_stand_up_to_the_first_that_does_not():
    """A draft behind one that fails never counts, however good it is; the failing one alone is replaced."""
    p = torch.full((3, 4, 4), 0.25, dtype=torch.float64)
    q = p.clone()
    q[0, 1] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    q[1, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    drafts = torch.tensor([[2, 0, 1, 2], [0, 1, 2, 3], [3, 3, 3, 3]])
    half = torch.full((3, 4), 0.5, dtype=torch.float64)
    tokens, accepted = accept_or_replace(p, q, drafts, half, half)
    assert accepted.tolist() == [1, 0, 4]
    assert tokens[0, :2].tolist() == [2, 3]
    assert tokens[1, 0] == 1
    assert tokens[2].tolist() == [3, 3, 3, 3]


# The engine's law -------------------------------------------------------------------------------------------------

DRAWS = 20_000
FILTERS = {
    "temperature": dict(temperature=0.4),
    "top_p": dict(temperature=0.6, top_p=0.7),
    "plausibility": dict(temperature=0.7, plausibility=0.1),
    "all": dict(temperature=1.2, top_k=12, top_p=0.9, min_p=0.02, plausibility=0.01),
}
CASES = [("temperature", 1.5), ("top_p", -0.6), ("plausibility", 0.3), ("all", 1.5)]
DEFAULTS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, plausibility=0.0)
PROMPT = tuple(b"Once upon a time")


@pytest.fixture(scope="module")
def references(folders):
    """The plain transformers models: after, near."""
    return [AutoModelForCausalLM.from_pretrained(folders / side) for side in ("after", "near")]


def joint_law(references, alpha, options):
    """The law of the first three tokens: {tokens: probability}, for those expected five times and more in DRAWS."""
    heads = {(): 1.0}
    for _ in range(3):
        ids = torch.tensor([PROMPT + head for head in heads])
        with torch.inference_mode():
            after, before = (model(ids).logits[:, -1, :260] for model in references)
        longer = {}
        for i, (head, mass) in enumerate(heads.items()):
            law = mass * exact_law(after[i], before[i], alpha, **{**DEFAULTS, **options})
            longer |= {(*head, int(token)): float(law[token]) for token in (law * DRAWS >= 5).nonzero()[0]}
        heads = longer
    return heads


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_the_joint_law_of_the_tokens_is_exact(name, alpha, engine_of, references):
    """20,000 sequences drawn in blocks fit the exact joint law of their first three tokens, for each filter; drafts
    stood, and drafts failed. All that is too rare to count on its own is one more cell.
    """
    engine = engine_of(lengths=(3,), rows=1000)
    options = {**DEFAULTS, **FILTERS[name]}
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(DRAWS // 1000):
        one = generation(
            branches=(Branch(Role.AMPLIFIED, alpha),),
            n=1000,
            sampling=Sampling(**options, seed=seed),
            stopping=Stopping(4, ignore_eos=True),
            prompt=PROMPT,
        )
        drawn: dict[int, list[int]] = {}
        for event in run(engine, one):
            if hasattr(event, "tokens"):
                drawn.setdefault(event.sequence_index, []).extend(record.token_id for record in event.tokens)
        for tokens in drawn.values():
            counts[tuple(tokens[:3])] = counts.get(tuple(tokens[:3]), 0) + 1
    assert sum(counts.values()) == DRAWS
    assert 0.1 < engine.speculation.accepted / engine.speculation.drafted < 0.97
    law = joint_law(references, alpha, FILTERS[name])
    assert len(law) > 10
    observed = [counts.get(tokens, 0) for tokens in law]
    expected = [mass * DRAWS for mass in law.values()]
    rest = DRAWS - sum(expected)
    if rest >= 5:
        observed, expected = [*observed, DRAWS - sum(observed)], [*expected, rest]
    expected = np.array(expected) * sum(observed) / sum(expected)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_reported_logprobs_are_those_of_the_law(mode, engine_of, references):
    """A token drawn in a block carries its log-probability under the filtered law at its own position."""
    options = {**DEFAULTS, **FILTERS["all"]}
    one = generation(sampling=Sampling(**options, seed=4), stopping=Stopping(9, ignore_eos=True), prompt=PROMPT)
    events = run(engine_of(mode=mode, lengths=(4,)), one)
    records = [record for event in events if hasattr(event, "tokens") for record in event.tokens]
    ids = PROMPT + tuple(record.token_id for record in records)
    with torch.inference_mode():
        after, before = (model(torch.tensor([ids])).logits[0, :, :260] for model in references)
    at = range(len(PROMPT) - 1, len(ids) - 1)
    wanted = [np.log(exact_law(after[i], before[i], 1.0, **options)[ids[i + 1]]) for i in at]
    np.testing.assert_allclose([record.logprob for record in records], wanted, atol=2e-3)


# Tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_do_not_change(mode, native, engine_of):
    """At temperature 0 the tokens are those without speculation, for any lengths in any order."""
    requests = [
        generation(f"{alpha}", branches=(Branch(Role.AMPLIFIED, alpha),), sampling=Sampling(0.0), stopping=Stopping(40))
        for alpha in (-0.5, 0.3, 3.0)
    ]
    plain = run(engine_of(mode="off", native=native), *requests)
    engine = engine_of(mode=mode, lengths=(3, 0, 6, 2, 0, 0, 4), native=native)
    blocks = run(engine, *requests)
    assert engine.speculation.accepted > 0
    for one in requests:
        assert tokens_of(blocks, one.request_id) == tokens_of(plain, one.request_id)


def test_coupled_speculation_gives_the_tokens_of_the_seed(engine_of):
    """Rollouts with filters, ends, stop strings and neighbours: every event's content is that without speculation,
    whether they end by their EOS, a stop string or their length, in a block or behind one.
    """
    requests = [
        generation("a", n=30, sampling=Sampling(1.7, seed=3), stopping=Stopping(60, stop_strings=("e", "ab"))),
        generation("b", n=30, sampling=Sampling(1.7, 0.97, seed=4), stopping=Stopping(90)),
    ]
    plain = run(engine_of(mode="off", rows=70), *requests)
    engine = engine_of(mode="coupled", lengths=(3, 6, 0, 2), rows=70)
    blocks = run(engine, *requests)
    assert 0 < engine.speculation.accepted < engine.speculation.drafted
    reasons = {event.reason for event in of(plain, SequenceFinished)}
    assert reasons == {FinishReason.EOS, FinishReason.STOP, FinishReason.MAX_TOKENS}
    for name, index in itertools.product("ab", range(30)):
        assert tokens_of(blocks, name, index) == tokens_of(plain, name, index)
        assert text_of(blocks, name, index) == text_of(plain, name, index)
    ends = [
        {(e.request_id, e.sequence_index, e.reason, e.output_tokens, e.stop_string) for e in of(each, SequenceFinished)}
        for each in (plain, blocks)
    ]
    assert ends[0] == ends[1]


def test_neither_neighbours_nor_lengths_change_what_blocks_draw(engine_of):
    """Noise belongs to positions: sequences drawn in blocks are the same alone, in company and in longer blocks."""
    company = generation("other", n=3, sampling=Sampling(0.8, 0.9, seed=1), stopping=Stopping(30), prompt=PROMPT[:5])
    alone = run(engine_of(lengths=(3,)), generation("r", stopping=Stopping(25)))
    others = [
        run(engine_of(lengths=(3,)), generation("r", n=4, stopping=Stopping(25))),
        run(engine_of(lengths=(3,)), company, generation("r", stopping=Stopping(25))),
        run(engine_of(lengths=(6,)), generation("r", stopping=Stopping(25))),
    ]
    assert len(tokens_of(alone)) > 5
    for events in others:
        assert tokens_of(events) == tokens_of(alone)


# Ends in the middle of a block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_what_follows_an_end_is_dropped_and_neighbours_go_on(mode, engine_of):
    """A stop id in mid-block ends its sequence there; nothing behind it is reported, and the sequence beside it draws
    what it draws otherwise.
    """
    whole = run(engine_of(mode=mode, lengths=(6,)), generation(n=2, stopping=Stopping(20, ignore_eos=True)))
    first, second = tokens_of(whole, index=0), tokens_of(whole, index=1)
    for at in range(2, 8):
        stop = first[at]
        if stop in first[:at]:
            continue
        stopping = Stopping(20, ignore_eos=True, stop_token_ids=(stop,))
        events = run(engine_of(mode=mode, lengths=(6,)), generation(n=2, stopping=stopping))
        assert tokens_of(events, index=0) == first[: at + 1]
        ends = {event.sequence_index: event for event in of(events, SequenceFinished)}
        assert (ends[0].reason, ends[0].output_tokens) == (FinishReason.STOP, at + 1)
        cut = second.index(stop) + 1 if stop in second else 20
        assert tokens_of(events, index=1) == second[:cut]


def test_a_cancel_between_blocks_leaves_nothing_behind(engine_of):
    """A request that is cancelled beside another frees its rows; the other goes on as it would alone."""
    engine = engine_of(mode="coupled", lengths=(3, 0, 4))
    engine.submit(generation("victim", n=2, stopping=Stopping(100, ignore_eos=True)))
    engine.submit(generation("r", stopping=Stopping(30, ignore_eos=True)))
    events = [event for _ in range(6) for event in engine.step()]
    engine.check_integrity()
    engine.cancel("victim")
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    alone = run(engine_of(mode="off"), generation("r", stopping=Stopping(30, ignore_eos=True)))
    assert tokens_of(events, "r") == tokens_of(alone)


@pytest.mark.parametrize("mode", MODES)
def test_no_block_passes_the_end_of_the_context_or_of_the_pages(mode, engine_of):
    """A sequence that fills the context window to its last position ends there, with every page back."""
    engine = engine_of(mode=mode, lengths=(6,))
    room = engine.context_tokens - len(PROMPT)
    events = run(engine, generation(stopping=Stopping(1000, ignore_eos=True), prompt=PROMPT))
    assert [event.reason for event in of(events, SequenceFinished)] == [FinishReason.CONTEXT_WINDOW]
    assert len(tokens_of(events)) == room


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_finite_end_the_request_as_ever(mode, engine_of):
    """A before model that overflows in a block fails the request; nothing is invented, nothing is left."""
    engine = engine_of(mode=mode, lengths=(3,))
    engine.submit(generation(stopping=Stopping(30, ignore_eos=True)))
    events = [event for _ in range(3) for event in engine.step()]
    verify = engine.models.verify
    engine.models.verify = lambda *arguments: verify(*arguments).fill_(torch.nan)
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    assert len(of(events, RequestFailed)) == 1
    assert not of(events, SequenceFinished)


def test_preemption_changes_no_token_of_a_block(engine_of):
    """Pages run out while blocks run: who is preempted goes on with its tokens, those of its seed."""
    one = generation(n=6, sampling=Sampling(1.2, seed=7), stopping=Stopping(40, ignore_eos=True), prompt=PROMPT)
    engine = engine_of(mode="coupled", lengths=(6, 3, 2), page_tokens=4, kv_cache_tokens=120)
    engine.submit(one)
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    assert engine.scheduler.preemptions > 0
    assert engine.speculation.drafted > 0
    plain = run(engine_of(mode="off"), one)
    for index in range(6):
        assert tokens_of(events, index=index) == tokens_of(plain, index=index)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_runs_out_of_memory_leaves_nothing_for_the_next(mode, engine_of):
    """The pass that verifies fails and the request is given up; the next one draws what it draws on a new engine."""
    engine = engine_of(mode=mode, lengths=(3,))
    verify = engine.models.verify

    def refuse(*_):
        raise torch.OutOfMemoryError

    engine.models.verify = refuse
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, generation("gone", prompt=PROMPT[:7]))
    engine.models.verify = verify
    engine.cancel("gone")
    engine.check_integrity()
    one = generation("next", stopping=Stopping(20, ignore_eos=True))
    assert tokens_of(run(engine, one), "next") == tokens_of(run(engine_of(mode=mode, lengths=(3,)), one), "next")


# When it is used ----------------------------------------------------------------------------------------------------


def count_passes(engine):
    """Make the engine's clock tell the passes of its models: each takes one second."""
    passes = [0]

    def counted(forward):
        def run_one(*arguments, **options):
            passes[0] += 1
            return forward(*arguments, **options)

        return run_one

    for runner in engine.models.runners:
        runner._pass = counted(runner._pass)
    engine.clock = lambda: float(passes[0])
    return passes


@pytest.mark.parametrize("mode", MODES)
def test_it_pays_where_the_models_agree(mode, engine_of):
    """Near alpha 0 nearly all drafts stand, and the pair decodes with far fewer passes than two for each token."""
    engine = engine_of(mode=mode)
    passes = count_passes(engine)
    run(engine, generation(branches=(Branch(Role.AMPLIFIED, 0.01),), stopping=Stopping(100, ignore_eos=True)))
    assert engine.speculation.accepted > 0.9 * engine.speculation.drafted
    assert passes[0] < 0.7 * 200


@pytest.mark.parametrize("mode", MODES)
def test_it_stops_where_the_models_differ(mode, engine_of):
    """On unlike models a request gives up drafting after a few blocks, and costs at most a tenth more passes."""
    engine = engine_of(before="far", mode=mode)
    passes = count_passes(engine)
    one = generation(branches=(Branch(Role.AMPLIFIED, 3.0),), stopping=Stopping(100, ignore_eos=True))
    run(engine, one)
    assert 0 < engine.speculation.drafted < 30
    assert passes[0] < 1.1 * 200


@pytest.mark.parametrize(
    "changes",
    [
        dict(branches=(Branch(Role.AFTER, 0.0),)),
        dict(branches=(Branch(Role.BEFORE, -1.0),)),
        dict(output=Output(diagnostics=True)),
        dict(output=Output(score_alphas=(0.0, 2.0))),
        dict(stopping=Stopping(12, min_new_tokens=12)),
        dict(n=5),
    ],
    ids=["after alone", "before alone", "diagnostics", "scores", "a minimum", "many rows"],
)
def test_who_does_not_draft(changes, engine_of):
    """Rows of one model, rows with evidence, rows whose end is still ruled out, and too many rows take ordinary steps;
    so does everything unless it is switched on.
    """
    engine = engine_of(lengths=(3,), few=4)
    one = generation(**{"stopping": Stopping(12, ignore_eos=True), **changes})
    run(engine, one)
    assert engine.speculation.drafted == 0
    off = engine_of(mode="off", lengths=(3,))
    run(off, generation())
    assert off.speculation.drafted == 0


@pytest.mark.parametrize("changes", [dict(deterministic=True), dict(static_step="on")])
def test_what_excludes_drafting(changes, engine_of, caplog):
    """Steps of fixed shape and the promise of the same bits leave no place for blocks; the log says so."""
    with caplog.at_level("WARNING"):
        engine = engine_of(lengths=(3,), **changes)
    assert "no speculation" in caplog.text
    run(engine, generation())
    assert engine.speculation.drafted == 0


def test_a_minimum_of_tokens_holds_drafting_back_until_it_is_reached(engine_of):
    """No end comes before `min_new_tokens`; behind it blocks run."""
    engine = engine_of(lengths=(3,))
    events = run(engine, generation(n=4, stopping=Stopping(30, min_new_tokens=10)))
    assert engine.speculation.drafted > 0
    assert all(event.output_tokens >= 10 for event in of(events, SequenceFinished))
    assert all(EOS not in tokens_of(events, index=index)[:10] for index in range(4))


def test_an_unknown_setting_is_refused():
    """A misspelt value is a `ConfigError` that lists what there is."""
    with pytest.raises(ConfigError, match="off, auto, coupled"):
        EngineConfig(speculation="on")
