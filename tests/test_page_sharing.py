"""What two requests share, and what is taken from one for another, never shows in a token. Real models on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import byte_tokenizer, save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Admitted,
    Branch,
    FinishReason,
    GenerationRequest,
    Output,
    RequestFailed,
    Role,
    Sampling,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    Stopping,
)

TOKENIZER = byte_tokenizer()
PROMPT = tuple(TOKENIZER.encode("Once upon a time there was"))  # 26 tokens: six pages of 4 and a part of one
ALPHAS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two architectures, one of them with a sliding window."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "after", "olmo2", seed=1)
    save_model(folder / "before", "mistral", seed=2)
    return load_pair(PairConfig(str(folder / "after"), str(folder / "before"), device="cpu"))


class Watched(Engine):
    """An engine that counts the forward passes and positions of each model, and checks its books after each step."""

    def __init__(self, pair, **limits):
        super().__init__(pair, EngineConfig(**{"page_tokens": 4, "prefill_chunk_tokens": 8, **limits}), Clock())
        self.passes, self.positions = [0, 0], [0, 0]
        for side, runner in enumerate(self.models.runners):
            runner._pass = self._counted(side, runner._pass)

    def _counted(self, side, run):
        def counted(module, inputs, **options):
            self.passes[side] += 1
            self.positions[side] += inputs.ids.numel()
            return run(module, inputs, **options)

        return counted

    def step(self):
        events = super().step()
        self.check_integrity()
        return events

    def run(self, *requests):
        """Submit all, and step to the end."""
        for request in requests:
            self.submit(request)
        events = []
        while self.has_work:
            events += self.step()
        assert not [event for event in events if isinstance(event, RequestFailed)]
        return events

    def forget_counts(self):
        self.passes[:] = self.positions[:] = [0, 0]


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self):
        return self.now


def generation(name, alpha=1.0, *, n=1, new=12, prompt=PROMPT, temperature=0.0, **stopping):
    branches = (Branch(Role.AMPLIFIED, alpha),)
    sampling = Sampling(temperature, 0.95, seed=7)
    stops = Stopping(new, ignore_eos=True, **stopping)
    return GenerationRequest(name, prompt, branches, n, sampling, stops, Output())


def told(events):
    """Everything that callers see except times: texts, tokens, ends and scores, by request and sequence."""
    seen = {}
    for event in events:
        if isinstance(event, SequenceDelta):
            text, ids = seen.get((event.request_id, event.sequence_index), ("", ()))
            ids += tuple(record.token_id for record in event.tokens)
            seen[event.request_id, event.sequence_index] = text + event.text, ids
        elif isinstance(event, SequenceFinished):
            end = event.request_id, "end", event.sequence_index
            assert end not in seen, "ended twice"
            seen[end] = event.reason, event.output_tokens, event.stop_string
        elif isinstance(event, ScoreBlock):
            so_far = seen.setdefault((event.request_id, "score"), [])
            assert event.offset == len(so_far), "a block twice, or out of order"
            so_far += [pytest.approx(record.diagnostics.amplified_logprob, abs=1e-3) for record in event.tokens]
    return seen


def fresh(pair, *requests):
    """What the requests are told when each has an engine for itself."""
    seen = {}
    for request in requests:
        seen |= told(Watched(pair).run(request))
    return seen


class TestKnownPrompts:
    """The caches are asked before the models are."""

    def test_ten_alphas_cost_one_prefill_per_model(self, pair):
        """The same prompt at ten alphas, one after the other: each model runs each prompt position once."""
        engine = Watched(pair)
        events = [event for alpha in ALPHAS for event in engine.run(generation(str(alpha), alpha, new=1))]
        assert engine.positions == [len(PROMPT), len(PROMPT)]
        assert engine.passes == [4, 4]  # 26 positions in chunks of 8, and nothing else: no token needed a decode
        models = sum(alpha != 0 for alpha in ALPHAS[1:]) + sum(alpha != -1 for alpha in ALPHAS[1:])
        assert engine.load().reused_prompt_tokens == models * len(PROMPT)
        assert told(events) == fresh(pair, *(generation(str(alpha), alpha, new=1) for alpha in ALPHAS))

    def test_ten_alphas_at_once_share_the_pages(self, pair):
        """Submitted together they also prefill once, and every row reads the very same pages."""
        engine = Watched(pair, max_running_sequences=20)
        requests = [generation(str(alpha), alpha, n=2, temperature=1.0) for alpha in ALPHAS]
        for request in requests:
            engine.submit(request)
        events = []
        while len(engine.scheduler.running) < 20:
            events += engine.step()
        assert len({sequence.job.table.pages for sequence in engine.scheduler.running}) == 1
        assert engine.positions[0] <= len(PROMPT) + 20
        events += engine.run()
        assert told(events) == fresh(pair, *requests)

    def test_after_alone_then_both(self, pair):
        """At alpha 0 only the after model runs the prompt; alpha 1 then runs it through the before model alone."""
        engine = Watched(pair)
        engine.run(generation("first", 0.0, new=1))
        assert engine.positions == [26, 0]
        assert told(engine.run(generation("second", 1.0, new=1))) == fresh(pair, generation("second", 1.0, new=1))
        assert engine.positions == [26, 26]

    def test_both_models_catch_up_while_others_decode(self, pair):
        """The before model fills its half of pages that rows of the after model are reading; nobody notices."""
        engine = Watched(pair, prefill_chunk_tokens=5)
        requests = [generation("a", 0.0, n=3, new=40, temperature=1.0), generation("b", 1.0, n=2, temperature=1.0)]
        engine.submit(requests[0])
        events = [event for _ in range(12) for event in engine.step()]
        events += engine.run(requests[1])
        assert told(events) == fresh(pair, *requests)

    def test_a_common_beginning(self, pair):
        """Prompts that part after some pages, or in the middle of one, decode as if each were alone."""
        engine = Watched(pair)
        prompts = [PROMPT, (*PROMPT[:20], 70, 71, 72), (*PROMPT, 80, 81), PROMPT[:9], PROMPT[:8], PROMPT[:12]]
        requests = [generation(str(i), prompt=prompt, n=2, temperature=0.9) for i, prompt in enumerate(prompts)]
        events = [event for request in requests for event in engine.run(request)]
        assert told(events) == fresh(pair, *requests)
        engine.forget_counts()
        engine.run(generation("tail", prompt=(*PROMPT[:24], 90), new=1))
        assert engine.positions == [1, 1]

    def test_scores_of_a_known_prompt(self, pair):
        """A score runs only from the first logits it needs, twice the same, beside a rollout that reads the pages."""
        scores = [ScoreRequest(name, PROMPT, (70, 71, 72, 73, 74), 1.0, 0, (0.0,)) for name in ("one", "two")]
        rollout = generation("rollout", n=2, new=30, temperature=1.0)
        engine = Watched(pair)
        engine.submit(rollout)
        events = [event for _ in range(8) for event in engine.step()]
        engine.submit(scores[0])
        engine.submit(scores[1])
        events += engine.run()
        assert told(events) == fresh(pair, rollout, *scores)
        engine.forget_counts()
        engine.run(ScoreRequest("three", PROMPT, (70, 71, 72, 73, 74)))
        assert engine.positions == [5, 5]

    def test_what_stands_in_the_cache_is_not_written_again(self, pair):
        """Positions that are run for their logits alone leave the cache as it is, though it holds something else."""
        engine = Watched(pair)
        engine.run(generation("first"))
        layers = [layer for runner in engine.models.runners for layer in runner.cache._layers.values()]
        stored = [tensor for layer in layers for tensor in layer]
        with torch.inference_mode():
            for tensor in stored:
                tensor[: len(PROMPT)] = 3.0  # an idle engine hands out its first pages first
        engine.forget_counts()
        engine.run(ScoreRequest("score", PROMPT[:10], PROMPT[10:]), generation("beginning", prompt=PROMPT[:12], new=1))
        assert engine.positions == [26 - 10 + 1, 26 - 10 + 1]
        assert all((tensor[: len(PROMPT) - 2] == 3.0).all() for tensor in stored)

    def test_a_prompt_that_was_evicted_is_prefilled_again(self, pair):
        """Other work takes the pages of an idle prompt; asked for again, it costs a prefill and draws the same."""
        engine = Watched(pair, kv_cache_tokens=80)
        wanted = told(engine.run(generation("r", new=1)))
        engine.run(generation("other", prompt=tuple(range(65, 125)), new=4))
        engine.forget_counts()
        assert told(engine.run(generation("r", new=1))) == wanted
        assert engine.positions[0] > 8

    def test_broken_logits_are_not_kept(self, pair):
        """A request that met NaN leaves nothing behind that the next one could reuse."""
        engine = Watched(pair)
        weight = pair.before.model.layers[0].mlp.down_proj.packed.data
        kept = weight.clone()
        weight.fill_(torch.nan)
        engine.submit(generation("broken", n=2))
        events = []
        while engine.has_work:
            events += engine.step()
        assert [type(event) for event in events[-1:]] == [RequestFailed]
        weight.copy_(kept)
        assert told(engine.run(generation("mended"))) == fresh(pair, generation("mended"))


class TestPreemption:
    """A small cache makes the same requests wait and start over in the middle; callers do not see it."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_tokens_in_a_small_cache_equal_those_in_a_large_one(self, pair, temperature):
        """Rollouts at several alphas, with stop strings and a score among them, through many preemptions."""
        requests = [
            generation("a", 1.0, n=4, new=40, temperature=temperature, stop_strings=("qz", "Zq")),
            ScoreRequest("s", PROMPT[:20], tuple(range(70, 90)), 0.5),
            generation("b", 0.0, n=3, new=40, temperature=temperature, prompt=PROMPT[:13]),
            generation("c", -1.0, n=3, new=40, temperature=temperature),
        ]
        small = Watched(pair, kv_cache_tokens=100)
        assert told(small.run(*requests)) == fresh(pair, *requests)
        assert small.load().preemptions >= 5
        patient = Watched(pair, kv_cache_tokens=100, reserve_pages=True)
        assert told(patient.run(*requests)) == fresh(pair, *requests)
        assert patient.load().preemptions == 0

    def test_a_score_that_loses_its_pages_goes_on(self, pair):
        """A rollout takes the pages of a score that is half done: no position is reported twice, none is missing."""
        rollout = generation("rollout", 0.0, prompt=PROMPT[:4], new=60)
        score = ScoreRequest("score", PROMPT[4:8], tuple(range(65, 105)))
        engine = Watched(pair, kv_cache_tokens=80, prefill_chunk_tokens=1)
        assert told(engine.run(rollout, score)) == fresh(pair, rollout, score)
        assert engine.positions[1] > 4 + 40 - 1  # the before model runs the score alone, and some of it twice

    def preempted(self, pair, request, **limits):
        """An engine in which a sequence of this request is preempted, and the events so far."""
        engine = Watched(pair, kv_cache_tokens=80, **limits)
        engine.submit(request)
        events = []
        while not any(sequence.tokens for job in engine.scheduler.ready for sequence in job.waiting):
            events += engine.step()
        return engine, events

    def test_cancel_while_preempted(self, pair):
        """Everything is free at once."""
        engine, _ = self.preempted(pair, generation("r", n=3, new=40))
        engine.cancel("r")
        assert not engine.has_work
        engine.check_integrity()

    def test_cancel_while_recomputing(self, pair):
        """Likewise when the preempted sequence has its row again and half of its keys and values."""
        engine, _ = self.preempted(pair, generation("r", n=3, new=40), prefill_chunk_tokens=2)
        while engine.scheduler.prefilling is None:
            engine.step()
        engine.step()
        assert engine.scheduler.prefilling in engine.scheduler.running
        engine.cancel("r")
        assert not engine.has_work
        engine.check_integrity()

    def test_time_budget_while_preempted(self, pair):
        """A preempted sequence ends with the tokens it has, told once, in order, like those that run."""
        request = generation("r", n=3, new=40, temperature=1.0, time_budget_s=5.0)
        engine, events = self.preempted(pair, request)
        engine.clock.now += 6.0
        events += engine.run()
        seen, whole = told(events), fresh(pair, generation("r", n=3, new=40, temperature=1.0))
        for index in range(3):
            reason, count, _ = seen["r", "end", index]
            assert reason is FinishReason.TIME_BUDGET
            assert seen["r", index][1] == whole["r", index][1][:count]
            assert 0 < count < 40

    def test_failure_while_preempted(self, pair, monkeypatch):
        """When a running sequence fails its request, the preempted one is gone too, and the engine goes on."""
        engine, _ = self.preempted(pair, generation("r", n=3, new=40))
        decode = engine.models.decode
        monkeypatch.setattr(engine.models, "decode", lambda sequences: [x * torch.nan for x in decode(sequences)])
        events = []
        while engine.has_work:
            events += engine.step()
        assert [event.request_id for event in events if isinstance(event, RequestFailed)] == ["r"]
        monkeypatch.undo()
        assert told(engine.run(generation("next"))) == fresh(pair, generation("next"))


def test_a_step_that_raises_loses_no_event(pair, monkeypatch):
    """Memory runs out in the first prefill of a request that nobody cancels: it is admitted once, and ends."""
    engine = Watched(pair)
    prefill = engine.models.prefill
    engine.submit(generation("r"))
    engine.submit(generation("gone", prompt=PROMPT[::-1]))

    def refuse(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.models, "prefill", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    monkeypatch.setattr(engine.models, "prefill", prefill)
    engine.cancel("gone")
    events = engine.run()
    assert [event.request_id for event in events if isinstance(event, Admitted)] == ["r"]
    assert told(events) == fresh(pair, generation("r"))


def test_the_first_token_does_not_wait_for_32_running_rows(pair):
    """While 32 rows decode, a new request's first token comes at most three steps later than on an idle engine."""
    prompt = tuple(TOKENIZER.encode("A prompt of its own, several chunks long."))

    def steps_to_first_token(engine):
        engine.submit(generation("new", prompt=prompt))
        steps = 1
        while not any(isinstance(event, SequenceDelta) and event.request_id == "new" for event in engine.step()):
            steps += 1
        return steps

    busy = Watched(pair)
    busy.submit(generation("rows", n=32, new=90))
    while len(busy.scheduler.running) < 32:
        busy.step()
    assert steps_to_first_token(busy) <= steps_to_first_token(Watched(pair)) + 3


def test_running_rows_get_a_token_in_every_step_while_prompts_are_prefilled(pair):
    """A long prompt goes in beside them, one chunk a step."""
    engine = Watched(pair)
    engine.submit(generation("rows", n=8, new=60))
    while len(engine.scheduler.running) < 8:
        engine.step()
    engine.submit(generation("long", prompt=tuple(range(65, 125))))
    for _ in range(7):
        engine.forget_counts()
        tokens = [event for event in engine.step() if isinstance(event, SequenceDelta)]
        assert len(tokens) == 8
        assert engine.positions == [8 + 8, 8 + 8]
