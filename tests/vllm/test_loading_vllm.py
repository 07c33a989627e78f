"""How the vLLM backend loads a pair: types, adapters, quantised weights, and what it cannot load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from remote_engine import RemoteEngine
from safetensors.torch import load_file, save_file
from test_engine import of, run
from test_oracle import ALPHAS, PROMPTS, Oracle, collect, request
from test_vllm_settings import save_adapter
from tiny_models import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM
from vllm_pairs import HEADS, save_pair

from lda_service.engine.request import ScoreBlock, ScoreRequest
from lda_service.errors import ConfigError, ModelUnsupported, PairIncompatible

ALPHA = 3.0
TEXT = PROMPTS[2]
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TARGETS = (*TARGETS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEAR = [f"model.layers.{i}.{name}" for i in range(2) for name in TARGETS]


def logprobs(after, before, dtype=torch.float32, text=TEXT):
    """Of each token of a text but the first, by transformers: after, before, amplified; shape (tokens, 3)."""
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=dtype) for each in (after, before)]
    with torch.no_grad():
        a, b = (model(torch.tensor([text])).logits[0, :-1, :260].float() for model in models)
    laws = [x.log_softmax(-1) for x in (a, b, a + ALPHA * (a - b))]
    at = torch.arange(len(text) - 1), torch.tensor(text[1:])
    return torch.stack([law[at] for law in laws], dim=1)


def scored(engine, text=TEXT):
    """The same by the engine."""
    events = run(engine, ScoreRequest("s", text[:1], text[1:], ALPHA))
    found = [record.diagnostics for block in of(events, ScoreBlock) for record in block.tokens]
    return torch.tensor([(d.after_logprob, d.before_logprob, d.amplified_logprob) for d in found])


def rms(x):
    """Of each column."""
    return x.double().pow(2).mean(0).sqrt()


@pytest.fixture
def engines():
    """Starts engines, and ends them after the test."""
    started = []

    def start(*args, **options):
        started.append(RemoteEngine(*args, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def test_bfloat16_rounds_no_more_than_transformers(tmp_path, engines):
    """Distance to float32 of both models' and the amplified log-probabilities: at most 1.1 times transformers' own."""
    pair = save_pair(tmp_path)
    text = tuple((i * 37 + i // 5) % 256 for i in range(120))
    exact = logprobs(*pair, text=text)
    ours = rms(scored(engines(pair, dtype="bfloat16"), text) - exact)
    theirs = rms(logprobs(*pair, torch.bfloat16, text) - exact)
    assert (ours > 0).all()
    assert (ours <= 1.1 * theirs).all(), (ours, theirs)


def test_bfloat16_output_layers_answer_in_float32(tmp_path, engines):
    """Bodies that round nothing leave the outputs alone to round: in float32 they agree far below bfloat16's step."""
    pair = save_pair(tmp_path)
    for folder in pair:
        weights = load_file(folder / "model.safetensors")
        for name, tensor in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()  # the hidden state is the token's embedding, normed
            tensor.copy_(tensor.bfloat16().float())
        weights["model.norm.weight"].fill_(1.0)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engine = engines(pair, dtype="bfloat16")
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in pair]
    with torch.no_grad():
        hidden = [model.model(torch.tensor([TEXT])).last_hidden_state[0, :-1].float() for model in models]
        a, b = (x @ model.lm_head.weight[:260].float().T for x, model in zip(hidden, models, strict=True))
    at = torch.arange(len(TEXT) - 1), torch.tensor(TEXT[1:])
    exact = torch.stack([x.log_softmax(-1)[at] for x in (a, b, a + ALPHA * (a - b))], dim=1)
    assert (scored(engine) - exact).abs().max() < 1e-3
    assert rms(logprobs(*pair, torch.bfloat16) - exact).min() > 1e-3


def test_an_adapter_equals_the_merged_model(tmp_path, engines):
    """MODEL_AFTER_ID is a LoRA over the before model: transformers' greedy tokens for the merged checkpoint."""
    base = save_model(tmp_path / "base", "llama", seed=1, **HEADS)
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
    low_rank = {
        path: (normal(2, x.shape[1]), normal(len(x), 2)) for path in LINEAR for x in [weights[f"{path}.weight"]]
    }
    adapter = save_adapter(tmp_path / "adapter", base, low_rank)
    merged = save_model(tmp_path / "merged", "llama", seed=1, **HEADS)
    changed = {f"{path}.weight": weights[f"{path}.weight"] + 2 * b @ a for path, (a, b) in low_rank.items()}
    save_file(weights | changed, merged / "model.safetensors", {"format": "pt"})
    engine = engines((adapter, base))
    assert (engine.info.after.model_id, engine.info.before.model_id) == ("adapter", "base")
    oracle = Oracle(merged, base, engine.pair.shared_ids)
    expected = {f"{alpha}/{n}": oracle(PROMPTS[n], alpha) for alpha in ALPHAS for n in (0, 2)}
    assert expected["0.0/0"] != expected["-1.0/0"]
    for name in expected:
        alpha, n = name.split("/")
        engine.submit(request(name, PROMPTS[int(n)], float(alpha)))
    assert collect(engine) == expected


def test_an_adapter_that_does_not_fit(tmp_path, engines):
    """A part that no weight of the base model takes is named when the pair is loaded."""
    base = save_model(tmp_path / "base", "llama", seed=1, **HEADS)
    adapter = save_adapter(
        tmp_path / "adapter", base, {"model.layers.7.mlp.up_proj": (torch.ones(2, 64), torch.ones(64, 2))}
    )
    with pytest.raises(ModelUnsupported, match=r"model\.layers\.7\.mlp\.up_proj.*merge_and_unload"):
        engines((adapter, base))


def eight_bits(weight):
    """A scale per output channel. What is stored, by the suffix of its name, and the rounded weight."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round()
    return {"weight": rounded.to(torch.int8), "weight_scale": scale}, rounded * scale


def four_bits(weight):
    """A scale per 32 inputs, eight numbers in one. As above."""
    groups = weight.view(len(weight), -1, 32)
    scale = (groups.abs().amax(2, keepdim=True) / 7).bfloat16()
    rounded = (groups / scale.float()).round().clamp(-8, 7)
    packed = ((rounded.long() + 8).view(len(weight), -1, 8) << torch.arange(0, 32, 4)).sum(2).to(torch.int32)
    stored = {"weight_packed": packed, "weight_scale": scale[:, :, 0], "weight_shape": torch.tensor(weight.shape)}
    return stored, (rounded * scale.float()).view_as(weight)


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SCHEMES = {
    eight_bits: {
        "format": "int-quantized",
        "weights": INT8 | {"strategy": "channel", "dynamic": False},
        "input_activations": INT8 | {"strategy": "token", "dynamic": True},
    },
    four_bits: {
        "format": "pack-quantized",
        "weights": INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32},
    },
}


def quantise(folder, store):
    """Round the linear layers of a checkpoint, in the format `compressed-tensors`.

    Returns a folder of a plain checkpoint with the rounded weights.
    """
    plain = folder.with_name(f"{folder.name}-rounded")
    shutil.copytree(folder, plain)
    rounded = load_file(folder / "model.safetensors")
    stored = dict(rounded)
    for path in LINEAR:
        parts, rounded[f"{path}.weight"] = store(stored.pop(f"{path}.weight"))
        stored |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
    save_file(rounded, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], **SCHEMES[store]}
    layout = {"format": group.pop("format"), "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    config["quantization_config"] = {"quant_method": "compressed-tensors", **layout}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("side", [0, 1], ids=["after", "before"])
def test_one_model_is_quantised_and_the_other_is_not(tmp_path, engines, side):
    """Each model is loaded as its own checkpoint says: one exactly, the other up to the rounding of activations."""
    pair = save_pair(tmp_path)
    plain = list(pair)
    plain[side] = quantise(pair[side], eight_bits)
    ours, exact = scored(engines(pair)), logprobs(*plain)
    assert (ours - exact)[:, 1 - side].abs().max() < 1e-3
    error, scale = rms(ours - exact)[side], exact[:, side].std()
    assert 0 < error < 0.1 * scale, (error, scale)


def test_both_models_at_four_bits(tmp_path, engines):
    """Packed weights and bfloat16 activations: no further from float32 than transformers with the rounded weights."""
    pair = save_pair(tmp_path)
    plain = [quantise(folder, four_bits) for folder in pair]
    exact = logprobs(*plain)
    ours = rms(scored(engines(pair, dtype="bfloat16")) - exact)
    theirs = rms(logprobs(*plain, torch.bfloat16) - exact)
    assert (ours > 0).all()
    assert (ours <= 1.2 * theirs).all(), (ours, theirs)


class TestRefusals:
    """What cannot be loaded is an error with a reason, before anything is served."""

    def test_vocabularies_that_conflict(self, tmp_path, engines):
        """One id with two meanings."""
        pair = tmp_path / "after", tmp_path / "before"
        for folder, extra in zip(pair, ("<|call|>", "<|tool|>"), strict=True):
            save_model(folder, tokenizer=byte_tokenizer(extra=(extra,)), **HEADS)
        with pytest.raises(PairIncompatible):
            engines(pair)

    def test_an_argument_that_vllm_does_not_know(self, tmp_path, engines):
        """A misspelt argument is named."""
        with pytest.raises(ConfigError, match="gpu_memory_utilisation"):
            engines(save_pair(tmp_path), {"gpu_memory_utilisation": 0.5})
