"""Models with one output layer: one product for both, and the results of two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from forced_policy import Forced
from safetensors.torch import load_file, save_file
from test_engine import generation, of, run, tokens_of
from test_oracle import PROMPTS, collect, request
from tiny_models import save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, Output, Role, Sampling, SequenceDelta, Stopping

ALPHAS = (-1.0, -0.5, 0.0, 1.0, 20.0)
LENGTH = Stopping(6, ignore_eos=True)


def with_one_head(folder, architecture, **changes):
    """Two unlike models with the output layer of the first; returns the loaded pair."""
    after = save_model(folder / "after", architecture, seed=1, **changes)
    before = save_model(folder / "before", architecture, seed=2, **changes)
    name = "lm_head.weight" if architecture != "gpt_neox" else "embed_out.weight"
    weights = load_file(before / "model.safetensors")
    if name not in weights:
        name = "model.embed_tokens.weight"
    weights[name] = load_file(after / "model.safetensors")[name]
    save_file(weights, before / "model.safetensors", {"format": "pt"})
    return load_pair(PairConfig(str(after), str(before), device="cpu"))


def count_rows(pair, monkeypatch):
    """Rows that go through the output layers, product by product."""
    counted = []
    for head in {model.get_output_embeddings() for model in (pair.after, pair.before)}:
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda x, forward=forward: (counted.append(len(x)), forward(x))[1])
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_the_result_is_that_of_two_products(tmp_path, architecture, dtype):
    """Greedy tokens are the same, log-probabilities of the draw equal to rounding, at every alpha, in company."""
    pair = with_one_head(tmp_path, architecture, dtype=dtype)
    assert pair.head is not None
    engines = [Engine(one, EngineConfig()) for one in (pair, dataclasses.replace(pair, head=None))]
    tokens, logprobs = [], []
    for engine in engines:
        for alpha in ALPHAS:
            for n in (0, 1):
                engine.submit(request(f"{alpha}/{n}", PROMPTS[n], alpha))
        tokens.append(collect(engine))
        drawn = generation(n=4, branches=(Branch(Role.AMPLIFIED, 3.0),), sampling=Sampling(1.0, 1.0, seed=3))
        compared = generation("compared", output=Output(diagnostics=True))
        events = run(engine, drawn, compared)
        logprobs.append([r.logprob for e in of(events, SequenceDelta) for r in e.tokens])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=2e-3)
    assert tokens[0] == tokens[1]


def test_one_row_of_the_product_for_a_sequence_that_nobody_compares(tmp_path, monkeypatch):
    """Plain rollouts cost one row a step; diagnostics, scores and the plausibility mask two; prompts one per model."""
    pair = with_one_head(tmp_path, "llama")
    engine = Engine(pair, EngineConfig())
    counted = count_rows(pair, monkeypatch)
    run(engine, generation(n=5, stopping=LENGTH))
    assert counted == [1, 1] + 5 * [5]
    for more in (
        {"output": Output(diagnostics=True)},
        {"output": Output(score_alphas=(0.5,))},
        {"sampling": Sampling(1.0, plausibility=0.1, seed=1)},
    ):
        counted.clear()
        run(engine, generation(n=5, stopping=LENGTH, **more))
        assert counted == 5 * [10]  # the prompt is known by now
    counted.clear()
    run(engine, generation(n=3, stopping=LENGTH), generation("evidence", n=2, stopping=LENGTH, output=Output(True)))
    assert max(counted) == 3 + 2 * 2


def test_blocks_draw_what_the_common_product_draws(tmp_path):
    """Coupled speculation runs each model with its output layer: the tokens of a seed are those of ordinary steps."""
    pair = with_one_head(tmp_path, "llama")
    one = generation(n=4, branches=(Branch(Role.AMPLIFIED, 0.3),), sampling=Sampling(1.0, seed=5), stopping=LENGTH)
    engine = Engine(pair, EngineConfig(speculation="coupled"))
    engine.policy = Forced(2, 3)
    blocks, plain = run(engine, one), run(Engine(pair, EngineConfig()), one)
    assert engine.speculation.drafted > 0
    for index in range(4):
        assert tokens_of(blocks, index=index) == tokens_of(plain, index=index)


def test_evidence_is_that_of_two_models(tmp_path):
    """Diagnostics beside plain rows: log-probabilities under each model as without the common product."""
    pair = with_one_head(tmp_path, "llama")
    found = []
    for one in (pair, dataclasses.replace(pair, head=None)):
        events = run(Engine(one, EngineConfig()), generation(n=2), generation("r2", output=Output(True, 5)))
        records = [record for event in of(events, SequenceDelta, "r2") for record in event.tokens]
        found.append([(r.diagnostics.after_logprob, r.diagnostics.before_logprob) for r in records])
        assert tokens_of(events)
    for ours, plain in zip(*found, strict=True):
        assert ours == pytest.approx(plain, abs=1e-5)


def test_models_that_change_their_logits_afterwards_keep_two_products(tmp_path):
    """A soft cap is not linear: gemma-2's equal output layers are found out by their logits."""
    pair = with_one_head(tmp_path, "gemma2", final_logit_softcapping=2.0)
    assert pair.after.get_output_embeddings() is pair.before.get_output_embeddings()
    assert pair.head is None


def test_models_with_unlike_output_layers_keep_them(tmp_path):
    """One changed bit in the layer is another layer."""
    after, before = (save_model(tmp_path / name, seed=seed) for seed, name in enumerate(("after", "before")))
    assert load_pair(PairConfig(str(after), str(before), device="cpu")).head is None
