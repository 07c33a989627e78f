"""A rank's view of its batch, without vLLM: whatever the schedule, a sequence gets the tokens that it gets alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from lda_service.engine.detokenizer import TokenPieces
from lda_service.engine.rows import RowSpec, Scoring
from lda_service.engine.sampling import sequence_key
from lda_service.vllm_engine.pair import SharedVocabulary
from lda_service.vllm_engine.step_rows import UNREAD, StepRows
from lda_service.vllm_engine.wire import KEY, DrawAsk, ScoreAsk

WIDTH, AFTER_WIDTH, BEFORE_WIDTH = 13, 15, 16
FORBIDDEN = 4
VOCABULARY = SharedVocabulary(WIDTH, torch.arange(WIDTH) == FORBIDDEN, TokenPieces.from_tokenizer(byte_tokenizer()))
SPECS = st.builds(
    RowSpec,
    alpha=st.sampled_from([-1.0, -0.5, 0.0, 1.0, 20.0]),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    plausibility=st.sampled_from([0.0, 0.1]),
    key=st.integers(0, 3).map(lambda seed: sequence_key(seed, 0)),
    min_new_tokens=st.integers(0, 3),
    endings=st.sampled_from([(), (1, 2)]),
    diagnostics=st.booleans(),
    top_candidates=st.just(2),
    score_alphas=st.sampled_from([(), (0.0, 1.0)]),
)
TEXTS = st.lists(st.sampled_from([i for i in range(WIDTH) if i != FORBIDDEN]), min_size=1, max_size=7).map(tuple)


@dataclass(eq=False)
class Sequence:
    """One of vLLM's: what it is asked for, the ids it has, how many of them were run, and what was answered."""

    name: str
    prompt: tuple[int, ...]
    ask: DrawAsk | ScoreAsk
    length: int
    ids: list[int] = field(default_factory=list)
    computed: int = 0
    is_new: bool = True
    answers: list = field(default_factory=list)

    def __post_init__(self):
        self.ids = list(self.prompt)

    @property
    def tokens(self):
        return self.ids[len(self.prompt) :]

    @property
    def has_ended(self):
        return len(self.tokens) == self.length


def drawing(name, prompt, spec, length):
    return Sequence(name, prompt, DrawAsk(spec, len(prompt)), length)


def scored(name, prompt, continuation, alpha):
    ask = ScoreAsk(Scoring(alpha, 2, (0.0, 2.0)), len(prompt), continuation)
    return Sequence(name, prompt + continuation[:-1], ask, 1)


sequences = st.one_of(
    st.builds(drawing, st.just(""), TEXTS, SPECS, st.integers(1, 5)),
    st.builds(scored, st.just(""), TEXTS, TEXTS, st.sampled_from([0.0, 3.0])),
)


def logits(ids, which, width):
    """Of a model that has a mind of its own after every text."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((which, tuple(ids))).encode()))
    return torch.randn(width, generator=generator) * 2


def both_logits(texts):
    return tuple(
        torch.stack([logits(ids, which, width) for ids in texts])
        for which, width in enumerate((AFTER_WIDTH, BEFORE_WIDTH))
    )


class Batch:
    """What vLLM's scheduler and runner tell a rank, for schedules that a test makes up."""

    def __init__(self):
        self.rows = StepRows(VOCABULARY, torch.device("cpu"), reports=True)
        self.finished = set()

    def step(self, counts):
        """Run some positions of some sequences, row by row in this order."""
        order = [sequence.name for sequence in counts]
        self.rows.begin(self._scheduled(counts))
        self.finished = set()
        prefixes = [one.ids[: at + 1] for one, n in counts.items() for at in range(one.computed, one.computed + n)]
        positions = torch.arange(len(prefixes))[:, None]
        self.rows.score(order, positions, lambda rows: both_logits([prefixes[i] for i in rows[:, 0].tolist()]))
        forced = self.rows.draw(order, *both_logits([one.ids[: one.computed + n] for one, n in counts.items()]))
        assert forced.shape == (len(order), AFTER_WIDTH)
        for (one, n), token in zip(counts.items(), forced.argmax(1).tolist(), strict=True):
            self._advance(one, n, token)

    def _scheduled(self, counts):
        new = [one for one in counts if one.is_new]
        old = [one for one in counts if not one.is_new]
        return SimpleNamespace(
            finished_req_ids=self.finished,
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=one.name,
                    num_computed_tokens=one.computed,
                    sampling_params=SimpleNamespace(extra_args={KEY: one.ask}),
                )
                for one in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[one.name for one in old], num_computed_tokens=[one.computed for one in old]
            ),
            num_scheduled_tokens={one.name: n for one, n in counts.items()},
        )

    def _advance(self, one, n, token):
        one.is_new = False
        one.computed += n
        answer = self.rows.answers.get(one.name)
        if isinstance(one.ask, ScoreAsk):
            one.answers += answer
        if one.computed == len(one.ids):
            one.ids.append(token)
            if isinstance(one.ask, DrawAsk):
                one.answers.append(answer)
        if one.has_ended:
            self.finished.add(one.name)


def run_alone(one):
    """Its tokens and answers when nobody else is there and nothing is cut."""
    batch = Batch()
    while not one.has_ended:
        batch.step({one: len(one.ids) - one.computed})
    return one


def disturb(one, random):
    """Sometimes a sequence loses what was run of it; vLLM's runners then see it as an old one or as a new one."""
    if not one.is_new and random.random() < 0.1:
        one.computed, one.is_new = 0, random.random() < 0.5
        one.answers = [] if isinstance(one.ask, ScoreAsk) else one.answers


def run_together(all_of_them, random):
    """All of them in one batch whose rows join, leave, move, wait, are cut and are preempted."""
    batch, waiting, running = Batch(), list(all_of_them), []
    while waiting or running:
        while waiting and (not running or random.random() < 0.5):
            running.append(waiting.pop(0))
        for one in running:
            disturb(one, random)
        chosen = random.sample(running, random.randint(1, len(running)))
        batch.step({one: random.randint(1, len(one.ids) - one.computed) for one in chosen})
        running = [one for one in running if not one.has_ended]


@settings(max_examples=80, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_sequence_is_drawn_as_if_it_were_alone(chosen, random):
    """Rows that join, leave, change places, wait, are run in parts and run again: the same tokens and answers."""
    together = [replace(one, name=str(i)) for i, one in enumerate(chosen)]
    run_together(together, random)
    for one in together:
        alone = run_alone(replace(one, computed=0, is_new=True, answers=[]))
        if isinstance(one.ask, ScoreAsk):
            assert_scores_alike(one, alone)
            continue
        assert one.tokens == alone.tokens
        for mine, true in zip(one.answers, alone.answers, strict=True):
            assert (mine.sound, mine.diagnostics) == (True, approximately(true.diagnostics))
            assert mine.logprob == (None if true.logprob is None else pytest.approx(true.logprob, abs=1e-5))
            assert mine.scores == pytest.approx(true.scores, abs=1e-5)


class approximately:  # noqa: N801 (reads as pytest.approx)
    """Equal to diagnostics that differ by rounding."""

    def __init__(self, true):
        self.true = true

    def __eq__(self, mine):
        if mine is None or self.true is None:
            return mine is self.true
        return (mine.amplified_rank, mine.critical_token_id) == (
            self.true.amplified_rank,
            self.true.critical_token_id,
        ) and mine.amplified_logprob == pytest.approx(self.true.amplified_logprob, abs=1e-5)

    __hash__ = None


def assert_scores_alike(one, alone):
    """Every token of the text is reported once, in order, as when it is run in one piece."""
    (whole,) = alone.answers
    at = 0
    for part in one.answers:
        for record in part.records if part.offset == at else ():
            assert record.token_id == one.ask.continuation_ids[at]
            assert record.diagnostics.amplified_logprob == pytest.approx(
                whole.records[at].diagnostics.amplified_logprob, abs=1e-5
            )
            at += 1
    assert at == len(whole.records) == len(one.ask.continuation_ids)
    sums = [sum(values) for values in zip(*(part.sums for part in one.answers), strict=True)]
    assert sums == pytest.approx(whole.sums, abs=1e-4)


def test_what_is_never_drawn():
    """Neither ids that the models do not share, nor rows of padding, whatever their logits."""
    one = drawing("r", (1,), replace(UNREAD, alpha=3.0, temperature=1.5, key=7), 1)
    rows = StepRows(VOCABULARY, torch.device("cpu"), reports=True)
    batch = Batch()
    rows.begin(batch._scheduled({one: 1}))
    after = torch.zeros(1, AFTER_WIDTH)
    after[0, [FORBIDDEN, WIDTH]] = 50.0
    assert rows.draw(["r"], after, torch.zeros(1, BEFORE_WIDTH)).argmax() not in (FORBIDDEN, WIDTH)


def test_rows_and_requests_that_do_not_match_are_an_error():
    """More rows of logits than requests: the step fails instead of drawing for the wrong one."""
    rows = StepRows(VOCABULARY, torch.device("cpu"), reports=True)
    with pytest.raises(AssertionError, match="1 requests and 2 rows"):
        rows.draw(["r"], *both_logits([(1,), (2,)]))


def test_a_rank_that_does_not_report_answers_nothing():
    """Other tensor parallel ranks draw alike, and report neither draws nor scores."""
    batch = Batch()
    batch.rows = StepRows(VOCABULARY, torch.device("cpu"), reports=False)
    one = drawing("r", (1, 2), replace(UNREAD, diagnostics=True), 1)
    batch.step({one: 2})
    assert one.answers == [None]
    assert one.tokens == run_alone(replace(one, ids=[], computed=0, is_new=True, answers=[])).tokens
