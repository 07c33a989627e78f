"""Decoder layers in one native call: which are, that they answer as transformers' own, and which must not be."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine import native
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Branch,
    GenerationRequest,
    Output,
    Role,
    Sampling,
    SequenceDelta,
    Stopping,
)

FUSED = {
    "llama": {},
    "llama-biased": dict(attention_bias=True),
    "llama-scaled-rope": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
    ),
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "mistral": {},
}
# Other sums, scales and inputs; the last one scales its queries from position 64 on, which no early position shows.
NOT_FUSED = {
    "gemma2": {},
    "granite": dict(residual_multiplier=0.5),
    "olmoe": {},
    "gpt_neox": {},
    "ministral3": dict(
        head_dim=8,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.5
        ),
    ),
}
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


@pytest.fixture(autouse=True)
def needs_kernels():
    try:
        native.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


def load(folder, name, changes, caplog, **options):
    architecture = name.split("-")[0]
    settings = changes if architecture == "gpt_neox" else SIZES | changes
    sides = [save_model(folder / f"{side}", architecture, seed, **settings) for seed, side in enumerate("ab")]
    caplog.clear()
    with caplog.at_level("INFO"):
        pair = load_pair(PairConfig(*map(str, sides), device="cpu", **options))
    return pair, [int(count) for count in re.findall(r"fused_layers=(\d+)", caplog.text)]


def logprobs(pair):
    """Of every drawn token and its alternatives, under both models, for rows that share a prompt and one alone."""
    engine = Engine(pair, EngineConfig(prefill_chunk_tokens=8))
    output = Output(diagnostics=True, top_candidates=10)
    for name, prompt, n in (("many", range(5, 25), 5), ("one", range(40, 53), 1)):
        branch, sampling, stopping = Branch(Role.AMPLIFIED, 0.5), Sampling(seed=3), Stopping(12, ignore_eos=True)
        engine.submit(GenerationRequest(name, tuple(prompt), (branch,), n, sampling, stopping, output=output))
    tokens, values = [], []
    while engine.has_work:
        for event in engine.step():
            for token in event.tokens if isinstance(event, SequenceDelta) else ():
                tokens.append((event.request_id, event.sequence_index, token.token_id))
                for one in (token.diagnostics, *token.diagnostics.candidates):
                    values += [one.after_logprob, one.before_logprob]
    engine.check_integrity()
    return tokens, torch.tensor(values)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_answer_as_the_layers_they_replace(tmp_path, caplog, monkeypatch, name, dtype, tolerance):
    """All layers of both models are fused, and log-probabilities equal those of the layers as they were.

    Both compute in float32; a cache in bfloat16 rounds what differs in the last bits to neighbouring values.
    """
    pair, counts = load(tmp_path, name, FUSED[name], caplog, dtype=dtype)
    assert counts == [2, 2]
    fused_tokens, fused = logprobs(pair)
    monkeypatch.setattr("lda_service.engine.pair.fuse_layers", lambda *_: 0)
    plain_tokens, plain = logprobs(load(tmp_path, name, FUSED[name], caplog, dtype=dtype)[0])
    assert sorted(fused_tokens) == sorted(plain_tokens)
    torch.testing.assert_close(fused, plain, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NOT_FUSED)
def test_layers_of_another_build_stay_as_they_are(tmp_path, caplog, name):
    """A layer whose twin would answer otherwise, here or further on in its context, is left to transformers."""
    assert load(tmp_path, name, NOT_FUSED[name], caplog)[1] == [0, 0]
