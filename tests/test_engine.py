"""What the engine promises about requests: how they end, what they report, what they cost. Real models on the CPU."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_oracle import request
from tiny_models import SPECIAL, byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

from lda_service import LDAModelPair
from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.native import PackedWeight, Product
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
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
from lda_service.errors import (
    ContextExceeded,
    ModelNotFound,
    ModelUnreadable,
    PairIncompatible,
    PromptUnusable,
    QueueFull,
)

EOS = byte_tokenizer().eos_token_id
PROMPT = tuple(byte_tokenizer().encode("Once upon a time"))
AMPLIFIED = (Branch(Role.AMPLIFIED, 1.0),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a pair in it: `after` and `before`."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "after", "llama", seed=1)
    save_model(folder / "before", "llama", seed=2)
    return folder


@pytest.fixture(scope="module")
def pair(folders):
    """The pair, loaded once."""
    return LDAModelPair(str(folders / "after"), str(folders / "before"), device="cpu")


@pytest.fixture
def engine(folders):
    """A fresh engine whose clock stands still unless moved."""
    loaded = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cpu"))
    clock = Clock()
    engine = Engine(loaded, EngineConfig(prefill_chunk_tokens=8, max_running_sequences=8), clock)
    engine.clock = clock
    return engine


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def generation(name="r", *, branches=AMPLIFIED, n=1, sampling=None, stopping=None, output=None, prompt=PROMPT):
    return GenerationRequest(
        name, prompt, branches, n, sampling or Sampling(1.0, 1.0, seed=5), stopping or Stopping(12), output or Output()
    )


def run(engine, *requests):
    """All events of the requests, run together to the end."""
    for one in requests:
        engine.submit(one)
    events = []
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    return events


def of(events, kind, name=None):
    return [event for event in events if isinstance(event, kind) and name in (None, event.request_id)]


def tokens_of(events, name="r", index=0, role=Role.AMPLIFIED):
    chosen = [e for e in of(events, SequenceDelta, name) if (e.sequence_index, e.role) == (index, role)]
    return [record.token_id for event in chosen for record in event.tokens]


def text_of(events, name="r", index=0):
    return "".join(event.text for event in of(events, SequenceDelta, name) if event.sequence_index == index)


def test_a_rollout_is_the_same_alone_and_in_company(engine):
    """Seeded rollouts draw the same tokens alone, among others, and whatever the others ask for."""
    alone = run(engine, generation("r", n=3))
    company = [
        generation("other", n=2, branches=(Branch(Role.AMPLIFIED, 5.0),), sampling=Sampling(0.7, 0.8, 9, 0.01, seed=1)),
        generation("r", n=3),
        request("greedy", PROMPT[:4], 0.2, new=20),
    ]
    together = run(engine, *company)
    for index in range(3):
        assert tokens_of(alone, index=index) == tokens_of(together, index=index)
    assert tokens_of(alone, index=0) != tokens_of(alone, index=1)


def test_generate_both_is_alpha_0_and_alpha_minus_1_on_the_same_noise(engine):
    """Two branches of one request equal two requests of one branch each, and plain sampling from each model."""
    branches = (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
    both = run(engine, generation(branches=branches))
    for branch in branches:
        single = run(engine, generation(branches=(Branch(Role.AMPLIFIED, branch.alpha),)))
        assert tokens_of(both, role=branch.role) == tokens_of(single)


def test_one_prompt_is_prefilled_once_and_each_model_runs_only_the_rows_that_need_it(engine, monkeypatch):
    """64 rollouts prefill the prompt once per model; alpha 0 never runs before, alpha -1 never after."""
    work = {0: [0, 0], 1: [0, 0]}
    for side, runner in enumerate(engine.models.runners):
        prefill, decode = runner.prefill, runner.decode

        def counted_prefill(chunk, inputs, keep, side=side, prefill=prefill):
            work[side][0] += chunk.stop - chunk.start
            return prefill(chunk, inputs, keep)

        def counted_decode(rows, inputs, side=side, decode=decode, **options):
            work[side][1] += len(rows)
            return decode(rows, inputs, **options)

        monkeypatch.setattr(runner, "prefill", counted_prefill)
        monkeypatch.setattr(runner, "decode", counted_decode)
    stopping = Stopping(5, ignore_eos=True)
    run(engine, generation(n=64, stopping=stopping))
    assert work == {0: [len(PROMPT), 64 * 4], 1: [len(PROMPT), 64 * 4]}
    for counts in work.values():
        counts[:] = [0, 0]
    fresh = PROMPT[::-1]
    run(engine, generation(branches=(Branch(Role.AFTER, 0.0),), stopping=stopping, prompt=fresh))
    assert work == {0: [len(PROMPT), 4], 1: [0, 0]}
    run(engine, generation(branches=(Branch(Role.BEFORE, -1.0),), stopping=stopping, prompt=fresh))
    assert work == {0: [len(PROMPT), 4], 1: [len(PROMPT), 4]}


def test_a_model_that_falls_behind_is_noticed(engine, monkeypatch):
    """The check of each step: if one cache does not advance with the other, the step fails instead of drifting."""
    engine.submit(generation())
    engine.step()
    cache = engine.models.runners[1].cache
    monkeypatch.setattr(cache, "advance", lambda owner, start, stop: cache.lengths.setdefault(owner, start))
    with pytest.raises(AssertionError, match="different positions"):
        engine.step()


def test_fresh_cache_memory_may_hold_anything(folders):
    """Slots never written hold NaN here, as fresh memory may; masked positions must not leak them."""
    torch.use_deterministic_algorithms(True)
    try:
        loaded = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cpu"))
        engine = Engine(loaded, EngineConfig(prefill_chunk_tokens=8))
        events = run(engine, request("short", PROMPT[:2], 1.0), request("long", PROMPT * 3, 1.0))
    finally:
        torch.use_deterministic_algorithms(False)
    alone = run(Engine(loaded, EngineConfig()), request("short", PROMPT[:2], 1.0))
    assert tokens_of(events, "short") == tokens_of(alone, "short")


def test_logits_that_are_not_finite_end_the_request_alone(folders, tmp_path):
    """Broken weights fail the request that met them instead of inventing tokens; the engine goes on."""
    pair = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cpu"))
    engine = Engine(pair, EngineConfig())
    weight = pair.before.get_output_embeddings().packed.data  # panels of 16 outputs
    kept = weight[4, 0, 1].item()
    weight[4, 0, 1] = torch.nan
    only_after = generation("after", branches=(Branch(Role.AFTER, 0.0),))
    for sampling in (Sampling(0.0), Sampling(1.0, 0.9), Sampling(1.0, 1.0)):
        events = run(engine, generation("broken", n=3, sampling=sampling), only_after)
        failures = of(events, RequestFailed)
        assert [failure.request_id for failure in failures] == ["broken"]
        assert not of(events, SequenceDelta, "broken")
        assert of(events, SequenceFinished, "after")
    weight[4, 0, 1] = kept
    assert of(run(engine, generation("mended")), SequenceFinished)


class TestEnds:
    """How sequences end."""

    def test_max_new_tokens(self, engine):
        """Exactly that many tokens, reason MAX_TOKENS."""
        events = run(engine, generation(stopping=Stopping(7, ignore_eos=True)))
        assert len(tokens_of(events)) == 7
        end = of(events, SequenceFinished)[0]
        assert (end.reason, end.output_tokens) == (FinishReason.MAX_TOKENS, 7)

    def test_context_window(self, engine):
        """A sequence that may go further than the window ends there, reason CONTEXT_WINDOW."""
        prompt = tuple(PROMPT[i % len(PROMPT)] for i in range(120))
        events = run(engine, generation(prompt=prompt, stopping=Stopping(50, ignore_eos=True)))
        end = of(events, SequenceFinished)[0]
        assert (end.reason, end.output_tokens) == (FinishReason.CONTEXT_WINDOW, 8)

    def test_time_budget(self, engine):
        """Once the budget is over every sequence ends with what it has, those that never got a row included."""
        engine.submit(generation(n=12, stopping=Stopping(50, ignore_eos=True, time_budget_s=2.0)))
        events = []
        for _ in range(6):
            events += engine.step()
        engine.clock.now += 2.5
        while engine.has_work:
            events += engine.step()
        ends = of(events, SequenceFinished)
        assert sorted(end.sequence_index for end in ends) == list(range(12))
        assert {end.reason for end in ends} == {FinishReason.TIME_BUDGET}
        assert {end.output_tokens for end in ends} == {5, 0}
        engine.check_integrity()

    def test_eos_of_either_model(self, tmp_path):
        """An id that only the before model ends at ends a sequence too, and adds no text to the answer."""
        tokenizer = byte_tokenizer()
        save_model(tmp_path / "after", seed=1)
        save_model(tmp_path / "before", seed=2)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
        model.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids("e")]
        model.save_pretrained(tmp_path / "before")
        pair = load_pair(PairConfig(str(tmp_path / "after"), str(tmp_path / "before"), device="cpu"))
        assert pair.stop_ids == {EOS, tokenizer.convert_tokens_to_ids("e")}
        events = run(Engine(pair, EngineConfig()), generation(n=24, stopping=Stopping(60)))
        ended = [end for end in of(events, SequenceFinished) if end.reason is FinishReason.EOS]
        assert ended
        for end in ended:
            assert tokens_of(events, index=end.sequence_index)[-1] in pair.stop_ids
            assert "e" not in text_of(events, index=end.sequence_index)

    def test_min_new_tokens(self, engine):
        """No end before the least length; without it some rollouts end earlier."""
        ends = lambda least: [
            end.output_tokens
            for end in of(run(engine, generation(n=40, stopping=Stopping(60, min_new_tokens=least))), SequenceFinished)
            if end.reason is FinishReason.EOS
        ]
        assert min(ends(0)) < 20 <= min(ends(20))

    def test_min_new_tokens_with_a_plausibility_mask(self, tmp_path):
        """Where the after model is sure of the end, ruling it out leaves the rest to draw from, and evidence alone."""
        save_model(tmp_path / "after", seed=1)
        save_model(tmp_path / "before", seed=2)
        pair = LDAModelPair(str(tmp_path / "after"), str(tmp_path / "before"), device="cpu")
        head = pair._engine.pair.after.get_output_embeddings()
        bias = torch.zeros(head.outputs)
        bias[EOS] = 60.0
        head.product = Product(PackedWeight(head.packed.data, head.outputs), bias)
        sampling, stopping = Sampling(1.0, 1.0, plausibility=0.5, seed=1), Stopping(20, min_new_tokens=4)
        branch, output = Branch(Role.AMPLIFIED, 0.5), Output(diagnostics=True, score_alphas=(0.5,))
        drawn = pair.rollouts("Hello", [branch], 1, sampling, stopping, output)[0]
        ids = [record.token_id for record in drawn.tokens]
        assert (len(ids), ids[-1]) == (5, EOS)
        scored = pair.score("Hello", ids, alpha=0.5)
        for ours, plain in zip(drawn.tokens, scored.tokens, strict=True):
            assert ours.diagnostics.after_logprob == pytest.approx(plain.diagnostics.after_logprob, abs=1e-3)
        # The law of the draw knows that the end was ruled out: otherwise each token costs some 50 nats.
        assert -60 < drawn.alpha_scores[0.5] < 0

    def test_stop_token(self, engine):
        """A stop token ends the sequence, is named, and adds no text."""
        first = run(engine, generation(stopping=Stopping(12, ignore_eos=True)))
        token = tokens_of(first)[5]
        events = run(engine, generation(stopping=Stopping(12, ignore_eos=True, stop_token_ids=(token,))))
        end = of(events, SequenceFinished)[0]
        assert (end.reason, end.stop_token_id) == (FinishReason.STOP, token)
        assert tokens_of(events) == tokens_of(first)[: tokens_of(first).index(token) + 1]

    def test_stop_string_across_tokens(self, engine):
        """The text ends before the stop string, none of it is sent, and the row is free at once."""
        whole = text_of(run(engine, generation(stopping=Stopping(40, ignore_eos=True))))
        stop = next(whole[i : i + 3] for i in range(8, 30) if "\ufffd" not in whole[i : i + 3])
        events = run(engine, generation(stopping=Stopping(40, ignore_eos=True, stop_strings=("never", stop))))
        end = of(events, SequenceFinished)[0]
        assert (end.reason, end.stop_string) == (FinishReason.STOP, stop)
        assert text_of(events) == whole[: whole.index(stop)]

    def test_cancel_frees_everything_within_a_step(self, engine):
        """After cancel the engine is idle without another step, and integrity holds."""
        engine.submit(generation(n=20, stopping=Stopping(50)))
        engine.step()
        engine.step()
        engine.cancel("r")
        engine.cancel("unknown")
        assert not engine.has_work
        engine.check_integrity()


class TestEvidence:
    """Scores and diagnostics, against plain transformers."""

    def logprobs(self, folders, ids, shared):
        models = (AutoModelForCausalLM.from_pretrained(folders / side) for side in ("after", "before"))
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0].double() for model in models]
        return [x[:, list(shared)] for x in logits]

    def test_score_is_teacher_forcing(self, engine, folders):
        """Log-probabilities, ranks and KL equal those of one plain forward pass; blocks are complete."""
        continuation = tuple(byte_tokenizer().encode(", there was a fox."))
        alphas = (-1.0, 0.0, 0.5, 4.0)
        events = run(engine, ScoreRequest("s", PROMPT, continuation, 2.0, 3, alphas))
        blocks = of(events, ScoreBlock)
        assert len(blocks) > 1
        assert [b.offset for b in blocks] == list(np.cumsum([0] + [len(b.tokens) for b in blocks[:-1]]))
        assert [b.is_last for b in blocks] == [False] * (len(blocks) - 1) + [True]
        records = [record for block in blocks for record in block.tokens]
        assert tuple(record.token_id for record in records) == continuation
        after, before = self.logprobs(folders, PROMPT + continuation, engine.pair.shared_ids)
        rows = torch.arange(len(PROMPT) - 1, len(PROMPT) + len(continuation) - 1)
        after, before = after[rows], before[rows]
        at = (torch.arange(len(continuation)), torch.tensor(continuation))
        for alpha, total in zip(alphas, blocks[-1].alpha_scores, strict=True):
            q = (after + alpha * (after - before)).log_softmax(-1)
            assert total == pytest.approx(q[at].sum().item(), abs=1e-3)
        p_after, p_before = after.log_softmax(-1), before.log_softmax(-1)
        for i, record in enumerate(records):
            d = record.diagnostics
            assert d.after_logprob == pytest.approx(p_after[i, record.token_id].item(), abs=1e-4)
            assert d.before_logprob == pytest.approx(p_before[i, record.token_id].item(), abs=1e-4)
            assert d.after_before_kl == pytest.approx(
                (p_after[i].exp() * (p_after[i] - p_before[i])).sum().item(), abs=1e-3
            )
            assert d.after_rank == 1 + (p_after[i] > p_after[i, record.token_id]).sum().item()
            assert len(d.candidates) == 3

    def test_generated_scores_equal_teacher_forced_ones(self, pair):
        """log q_alpha of a finished rollout equals Score's of the same ids at temperature 1; so do its diagnostics."""
        alphas = (-1.0, 0.0, 1.0, 3.0)
        output = Output(diagnostics=True, score_alphas=alphas)
        branch = Branch(Role.AMPLIFIED, 1.0)
        completion = pair.rollouts("Hello", [branch], 1, Sampling(1.0, 1.0, seed=3), Stopping(20), output)[0]
        ids = [record.token_id for record in completion.tokens]
        scored = pair.score("Hello", ids, alpha=1.0, score_alphas=alphas)
        assert completion.alpha_scores == pytest.approx(scored.alpha_scores, abs=1e-3)
        # Drawn at temperature 1 without filters, so the sum of reported logprobs is log q at its own alpha.
        assert sum(r.logprob for r in completion.tokens) == pytest.approx(completion.alpha_scores[1.0], abs=1e-3)
        for drawn, forced in zip(completion.tokens, scored.tokens, strict=True):
            assert drawn.diagnostics.after_logprob == pytest.approx(forced.diagnostics.after_logprob, abs=1e-4)
            assert drawn.diagnostics.critical_token_id == forced.diagnostics.critical_token_id

    def test_rare_event_rate_equals_exact_enumeration(self, engine, folders):
        """Importance weights from score_alphas are unbiased: the weighted rate equals the exact one."""
        output = Output(score_alphas=(0.0, 1.0))
        events = run(engine, generation(n=1000, stopping=Stopping(1, ignore_eos=True), output=output))
        weights = np.array([math.exp(e.alpha_scores[0] - e.alpha_scores[1]) for e in of(events, SequenceFinished)])
        drawn = {e.sequence_index: e.tokens[0].token_id for e in of(events, SequenceDelta) if e.tokens}
        tokens = np.array([drawn[e.sequence_index] for e in of(events, SequenceFinished)])
        after, _ = self.logprobs(folders, PROMPT, engine.pair.shared_ids)
        exact = after[-1].softmax(-1).numpy()
        half = exact.argsort()[: len(exact) // 2]
        hits = weights * np.isin(tokens, half)
        assert abs(hits.mean() - exact[half].sum()) < 4 * hits.std() / math.sqrt(len(hits)) + 1e-9


class TestBorder:
    """Requests and pairs that cannot work are refused before work starts, with the remedy."""

    def test_prompts(self, engine):
        """Empty prompts, ids outside the shared vocabulary, and prompts without room for one token."""
        with pytest.raises(PromptUnusable, match="at least one"):
            engine.submit(generation(prompt=()))
        with pytest.raises(PromptUnusable, match="do not share") as caught:
            engine.submit(generation(prompt=(1, 270)))
        assert caught.value.metadata == {"token_id": "270"}
        with pytest.raises(ContextExceeded, match="128"):
            engine.submit(generation(prompt=PROMPT * 8))
        engine.check_integrity()

    def test_queue_full(self, folders):
        """One more request than may wait is refused with the figures."""
        pair = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cpu"))
        engine = Engine(pair, EngineConfig(max_queued_requests=2))
        for name in "ab":
            engine.submit(generation(name))
        with pytest.raises(QueueFull) as caught:
            engine.submit(generation("c"))
        assert caught.value.metadata == {"depth": "2", "capacity": "2"}
        assert caught.value.retry_after_s

    def test_missing_and_broken_models(self, folders, tmp_path):
        """No such folder, no weights in it: each says what to do."""
        good = str(folders / "before")
        with pytest.raises(ModelNotFound, match="does not exist"):
            load_pair(PairConfig("/nowhere/model", good))
        (tmp_path / "config.json").write_text((folders / "after" / "config.json").read_text())
        byte_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ModelUnreadable, match="safetensors"):
            load_pair(PairConfig(str(tmp_path), good))

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_corrupt_files(self, folders, tmp_path, file):
        """A file that cannot be read is an error about this model, whatever its reader raised."""
        broken = tmp_path / "broken"
        shutil.copytree(folders / "after", broken)
        (broken / file).write_bytes(b"not this")
        with pytest.raises(ModelUnreadable, match="cannot be read"):
            load_pair(PairConfig(str(broken), str(folders / "before")))

    def test_no_permission(self, folders, monkeypatch):
        """A model whose files this process may not read says so, and what to check."""

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("lda_service.engine.pair.AutoConfig.from_pretrained", refuse)
        with pytest.raises(ModelUnreadable, match="permission denied"):
            load_pair(PairConfig(str(folders / "after"), str(folders / "before")))

    def test_unlike_vocabularies(self, folders, tmp_path):
        """A conflicting pair is refused with the report, and loads for the shared ids when told to."""
        tokenizer = byte_tokenizer(extra=("<|new|>",))
        save_model(tmp_path / "other", tokenizer=tokenizer)
        swapped = byte_tokenizer()
        swapped = type(swapped)(
            tokenizer_object=type(swapped.backend_tokenizer).from_str(
                swapped.backend_tokenizer.to_str().replace('"A":', '"@@":', 1).replace('"B":', '"A":', 1)
            ),
            eos_token=SPECIAL[0],
        )
        save_model(tmp_path / "swapped", tokenizer=swapped)
        after = str(folders / "after")
        with pytest.raises(PairIncompatible, match="allow-incompatible"):
            load_pair(PairConfig(after, str(tmp_path / "swapped"), device="cpu"))
        pair = load_pair(PairConfig(after, str(tmp_path / "swapped"), device="cpu", allow_incompatible=True))
        assert len(pair.shared_ids) == pair.info.compatibility.shared_id_count < 260
        events = run(Engine(pair, EngineConfig()), generation(n=30, stopping=Stopping(20)))
        drawn = {token for index in range(30) for token in tokens_of(events, index=index)}
        assert drawn <= set(pair.shared_ids)
        extra = load_pair(PairConfig(str(tmp_path / "other"), after, device="cpu"))
        assert extra.info.compatibility.after_only_ids == (260,)


def test_a_queue_of_one_is_enough_to_start(folders):
    """An engine that lets one request wait warms up like any other."""
    loaded = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cpu"))
    Engine(loaded, EngineConfig(max_queued_requests=1)).warm_up()


@pytest.mark.parametrize("native", [True, False])
def test_bf16_heads_answer_in_float32(tmp_path, native):
    """At alpha 20 the output layers' precision costs at most 0.02 nat RMS in the combined logits."""
    folders = [tmp_path / "after", tmp_path / "before"]
    for seed, folder in enumerate(folders):
        save_model(folder, "llama", seed=0, dtype=torch.bfloat16, hidden_size=256, initializer_range=0.06)
        if seed:
            model = AutoModelForCausalLM.from_pretrained(folder)
            torch.manual_seed(9)
            for parameter in model.parameters():
                parameter.data += 0.002 * torch.randn_like(parameter)
            model.save_pretrained(folder)
    pair = load_pair(PairConfig(*map(str, folders), device="cpu", dtype="bfloat16", native=native))
    assert pair.info.after.dtype == "bfloat16"
    ours, exact, rounded = [], [], []
    for model in (pair.after, pair.before):
        head = model.get_output_embeddings()
        saved = load_file(folders[len(exact)] / "model.safetensors")["lm_head.weight"]
        hidden = torch.randn(200, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        ours.append(head(hidden))
        exact.append(hidden.double() @ saved.bfloat16().double().T)
        rounded.append((hidden @ saved.bfloat16().T).double())
        assert ours[-1].dtype == torch.float32
    combine = lambda pair: pair[0] + 20 * (pair[0] - pair[1])
    error = lambda pair: (combine(pair).double() - combine(exact)).square().mean().sqrt().item()
    assert error(ours) <= 0.02
    assert error(rounded) > 10 * error(ours)


class TestLibrary:
    """`LDAModelPair` as the README shows it."""

    def test_generate_lda(self, pair):
        """The documented call returns a completion without its prompt, and a count of tokens."""
        result = pair.generate_lda(prompt="Hi", alpha=1.0, max_new_tokens=9, temperature=0.8, top_p=0.95, seed=1)
        assert result.tokens_generated <= 9
        assert len(result.tokens) == result.tokens_generated
        again = pair.generate_lda(prompt="Hi", alpha=1.0, max_new_tokens=9, temperature=0.8, top_p=0.95, seed=1)
        assert again == result

    def test_leaving_a_stream_frees_the_engine(self, pair):
        """A stream left early leaves nothing behind."""
        for _ in pair.stream("Hi", AMPLIFIED, 4):
            break
        pair._engine.check_integrity()
        assert not pair._engine.has_work
