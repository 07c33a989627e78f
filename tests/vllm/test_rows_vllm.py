"""What the engine promises about requests, on the vLLM backend: the native engine's own tests, and what vLLM adds.

Chunks are small here, so that prompts and scored texts are cut.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import test_engine
import torch
from remote_engine import RemoteEngine
from scipy import stats
from test_engine import EOS, PROMPT, generation, of, run, text_of, tokens_of
from test_oracle import PROMPTS, Oracle, collect, request
from test_sampling import exact_law
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM
from vllm_pairs import Setup

from lda_service.engine.request import (
    Admitted,
    Branch,
    FinishReason,
    Output,
    Role,
    Sampling,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    Stopping,
)
from lda_service.errors import ContextExceeded, PromptUnusable, QueueFull

ROWS, CHUNK, BLOCK = 8, 16, 32
LETTER = byte_tokenizer().convert_tokens_to_ids("e")
AT_ONCE = Stopping(1, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a pair in it: `after` and `before`, which also ends at a letter."""
    folder = tmp_path_factory.mktemp("pair")
    Setup().save(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "before")
    model.generation_config.eos_token_id = [EOS, LETTER]
    model.save_pretrained(folder / "before")
    return folder


@pytest.fixture(scope="module")
def shared_engine(folders):
    engine = RemoteEngine(
        (folders / "after", folders / "before"),
        {"max_num_batched_tokens": CHUNK, "block_size": BLOCK},
        is_patient=True,
        max_running_sequences=ROWS,
        max_queued_requests=3,
        kv_cache_tokens=2048,
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine):
    """The engine of all tests here, idle."""
    for _ in range(3):  # what a failed test left
        if shared_engine.has_work:
            shared_engine.step()
    return shared_engine


class TestEnds(test_engine.TestEnds):
    """How sequences end."""

    test_min_new_tokens_with_a_plausibility_mask = None  # looks into the native engine; the oracle tests draw with both

    def test_time_budget(self, engine):
        """Once the budget is over every sequence ends with what it has, those that never got a row included."""
        engine.submit(generation(n=12, stopping=Stopping(50, ignore_eos=True, time_budget_s=2.0)))
        events = []
        while len(tokens_of(events)) < 5:
            events += engine.step()
        engine.clock.now += 2.5
        while engine.has_work:
            events += engine.step()
        ends = of(events, SequenceFinished)
        assert sorted(end.sequence_index for end in ends) == list(range(12))
        assert {end.reason for end in ends} == {FinishReason.TIME_BUDGET}
        assert all(end.output_tokens == len(tokens_of(events, index=end.sequence_index)) for end in ends)
        assert [end.output_tokens for end in ends].count(0) >= 12 - ROWS
        assert max(end.output_tokens for end in ends) == 5
        engine.check_integrity()

    def test_stop_string_across_tokens(self, engine):
        """The text ends before the stop string, none of it is sent, and the row is free at once."""
        endless = Stopping(40, ignore_eos=True)
        events = run(engine, generation(n=20, stopping=endless))
        texts = [text_of(events, index=i) for i in range(20)]
        index, stop = next(
            (i, whole[at : at + 3])
            for i, whole in enumerate(texts)
            for at in range(8, len(whole) - 3)
            if "\ufffd" not in whole[at : at + 3]
        )
        events = run(engine, generation(n=20, stopping=replace(endless, stop_strings=("never", stop))))
        end = next(end for end in of(events, SequenceFinished) if end.sequence_index == index)
        assert (end.reason, end.stop_string) == (FinishReason.STOP, stop)
        assert text_of(events, index=index) == texts[index][: texts[index].index(stop)]

    def test_eos_of_either_model(self, engine):
        """An id that only the before model ends at ends a sequence too, and adds no text to the answer."""
        assert engine.pair.stop_ids == {EOS, LETTER}
        events = run(engine, generation(n=24, stopping=Stopping(60)))
        ended = [e for e in of(events, SequenceFinished) if e.reason is FinishReason.EOS]
        last = {tokens_of(events, index=end.sequence_index)[-1] for end in ended}
        assert last == engine.pair.stop_ids
        assert not any("e" in text_of(events, index=end.sequence_index) for end in ended)

    def test_cancel_frees_everything_within_a_step(self, engine):
        """After cancel rows and blocks are free without another step, and what comes next is not touched."""
        alone = tokens_of(run(engine, generation()))
        engine.submit(generation("victim", n=20, stopping=Stopping(50)))
        engine.step()
        engine.step()
        engine.cancel("victim")
        engine.cancel("unknown")
        engine.check_integrity()
        assert not of(engine.step(), SequenceDelta)
        assert tokens_of(run(engine, generation())) == alone


class TestEvidence(test_engine.TestEvidence):
    """Scores and diagnostics, against plain transformers; a scored text is longer than a chunk."""

    test_generated_scores_equal_teacher_forced_ones = None  # through the library; below, through the engine

    def test_a_drawn_text_scores_what_was_drawn(self, engine):
        """log q_alpha of a finished rollout equals Score's of the same ids at temperature 1; so do its diagnostics."""
        alphas = (-1.0, 0.0, 1.0, 3.0)
        output, stopping = Output(diagnostics=True, score_alphas=alphas), Stopping(40, ignore_eos=True)
        drawn = run(engine, generation(output=output, stopping=stopping))
        end = of(drawn, SequenceFinished)[0]
        records = [record for event in of(drawn, SequenceDelta) for record in event.tokens]
        ids = tuple(tokens_of(drawn))
        scored = of(run(engine, ScoreRequest("s", PROMPT, ids, 1.0, 0, alphas)), ScoreBlock, "s")
        assert len(scored) > 2
        assert end.alpha_scores == pytest.approx(scored[-1].alpha_scores, abs=1e-3)
        assert sum(r.logprob for r in records) == pytest.approx(end.alpha_scores[2], abs=1e-3)
        forced = [record for block in scored for record in block.tokens]
        for one, other in zip(records, forced, strict=True):
            assert one.diagnostics.after_logprob == pytest.approx(other.diagnostics.after_logprob, abs=1e-4)
            assert one.diagnostics.critical_token_id == other.diagnostics.critical_token_id


def test_a_prompt_of_several_chunks_decodes_as_the_oracle(engine, folders):
    """Prompts longer than what a step may hold, with others beside them that decode already."""
    oracle = Oracle(folders / "after", folders / "before", engine.pair.shared_ids)
    assert len(PROMPTS[2]) > 2 * CHUNK
    long = tuple(PROMPTS[2][i % len(PROMPTS[2])] for i in range(100))
    jobs = {"short": PROMPTS[1], "long": PROMPTS[2], "longest": long}
    for name, prompt in jobs.items():
        engine.submit(request(name, prompt, 3.0))
    assert collect(engine) == {name: oracle(prompt, 3.0) for name, prompt in jobs.items()}
    engine.check_integrity()


def test_a_known_prompt_is_not_run_again(engine):
    """A second request of a prompt finds its full blocks for both models, and draws what the first drew."""
    prompt = tuple(reversed(PROMPTS[2]))
    first = run(engine, generation(prompt=prompt))
    known = engine.load().reused_prompt_tokens
    second = run(engine, generation(prompt=prompt))
    assert engine.load().reused_prompt_tokens - known == 2 * (len(prompt) // BLOCK) * BLOCK
    assert tokens_of(first) == tokens_of(second)


def test_all_sequences_of_a_prompt(engine):
    """N sequences are N draws: each is what it is when fewer are asked for, and they differ."""
    many = run(engine, generation(n=30))
    few = run(engine, generation(n=3))
    assert [tokens_of(few, index=i) for i in range(3)] == [tokens_of(many, index=i) for i in range(3)]
    assert len({tuple(tokens_of(many, index=i)) for i in range(30)}) == 30


def test_a_large_job_keeps_no_other_out(engine):
    """Beside 1,000 sequences a later request gets the next free row."""
    engine.submit(generation("large", n=1000, stopping=AT_ONCE))
    events = engine.step()
    engine.submit(generation("small"))
    while not of(events, SequenceFinished, "small"):
        events += engine.step()
    assert len(of(events, SequenceFinished, "large")) < 1000 / 5
    while engine.has_work:
        events += engine.step()
    assert len(of(events, SequenceFinished, "large")) == 1000
    assert [event.request_id for event in of(events, Admitted)] == ["large", "small"]
    engine.check_integrity()


def test_draws_follow_the_law_of_whole_sequences(engine, folders):
    """2,000 sequences of three tokens fit the exact law, which is enumerated with transformers (chi-square)."""
    sampling = Sampling(0.7, 0.95, top_k=3, min_p=0.05, seed=11)
    events = run(engine, generation(n=2000, sampling=sampling, stopping=Stopping(3, ignore_eos=True)))
    drawn = {}
    for event in of(events, SequenceDelta):
        drawn.setdefault(event.sequence_index, []).extend(record.token_id for record in event.tokens)
    counts = Counter(map(tuple, drawn.values()))
    law = enumerated(folders, engine.pair.shared_ids, sampling)
    assert counts.keys() <= law.keys()
    expected = np.array([law[key] * 2000 for key in law])
    observed = np.array([counts[key] for key in law])
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    kept = expected > 0
    assert len(expected[kept]) > 8
    assert stats.chisquare(observed[kept], expected[kept] / expected.sum() * observed.sum()).pvalue > 1e-3


def enumerated(folders, shared, sampling):
    """The probability of every sequence of three tokens after PROMPT, at alpha 1."""
    models = [AutoModelForCausalLM.from_pretrained(folders / side) for side in ("after", "before")]
    width = max(shared) + 1

    def next_law(ids):
        with torch.no_grad():
            after, before = (model(torch.tensor([PROMPT + ids])).logits[0, -1, :width] for model in models)
        law = exact_law(after, before, 1.0, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        return {(*ids, int(token)): law[token] for token in law.nonzero()[0]}

    found = {(): 1.0}
    for _ in range(3):
        found = {key: p * q for ids, p in found.items() for key, q in next_law(ids).items()}
    return found


class TestRefusals:
    """What is refused on submission, with the reasons of the native engine."""

    @pytest.mark.parametrize(("prompt", "error"), [((), PromptUnusable), ((270,), PromptUnusable)])
    def test_prompts(self, engine, prompt, error):
        """Empty prompts, and ids that the models do not share."""
        with pytest.raises(error):
            engine.submit(generation(prompt=prompt))

    def test_context(self, engine):
        """A prompt as long as the window."""
        with pytest.raises(ContextExceeded):
            engine.submit(generation(prompt=PROMPT * 8))

    def test_queue(self, engine):
        """As many wait as may wait; once they have rows, others are taken again."""
        for n in range(3):
            engine.submit(generation(str(n), n=ROWS))
        with pytest.raises(QueueFull):
            engine.submit(generation("late"))
        for n in range(3):
            engine.cancel(str(n))
        assert len(of(run(engine, generation("late")), SequenceFinished)) == 1


@pytest.mark.parametrize("alpha", [-1.0, 0.0])
def test_both_models_on_their_own(engine, alpha):
    """GenerateBoth is two requests at alpha 0 and -1 on the same noise."""
    both = (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
    role = both[0 if alpha == 0.0 else 1].role
    single = run(engine, generation(branches=(Branch(Role.AMPLIFIED, alpha),)))
    assert tokens_of(run(engine, generation(branches=both)), role=role) == tokens_of(single)
