"""A LoRA adapter over the before model: one copy of the weights, and the same results as PEFT's merged model."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import generation, of, run, tokens_of
from test_oracle import ALPHAS, PROMPTS, Oracle, collect, request
from test_sharing import held_bytes
from tiny_models import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

from lda_service import LDAModelPair
from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, Output, Role, Sampling, SequenceDelta, Stopping
from lda_service.errors import ConfigError, ModelUnreadable, ModelUnsupported

LORA = {
    "llama": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "qwen3": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "phi3": dict(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={"down_proj": 2, "layers.1.*qkv_proj": 3},
        alpha_pattern={"down_proj": 5, r"layers\.0\.self_attn\.o_proj": 12},
    ),
    "gpt_neox": dict(r=2, lora_alpha=2, target_modules=["query_key_value", "dense_h_to_4h"], layers_to_transform=[1]),
    "gpt2": dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "bloom": dict(r=4, lora_alpha=8, target_modules=["query_key_value"]),  # without the seam: two passes a step
}


def make_adapter(folder, base, dtype=torch.float32, **lora):
    """Save a random adapter as PEFT does, and the model that PEFT merges from it; returns both folders."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    byte_tokenizer().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def load(after, before, dtype="float32", native=True):
    return load_pair(PairConfig(str(after), str(before), device="cpu", dtype=dtype, native=native))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folders of a base model, an adapter over it and the merged model."""
    folder = tmp_path_factory.mktemp("lora")
    base = save_model(folder / "base", "llama", seed=1)
    return base, *make_adapter(folder, base, **LORA["llama"])


@pytest.mark.parametrize("architecture", LORA)
def test_greedy_tokens_equal_those_of_the_merged_model(tmp_path, architecture):
    """For every alpha, alone and in company: transformers' own tokens for PEFT's merged model against its base."""
    base = save_model(tmp_path / "base", architecture, seed=1)
    adapter, merged = make_adapter(tmp_path, base, **LORA[architecture])
    engine = Engine(load(adapter, base), EngineConfig(prefill_chunk_tokens=16, max_running_sequences=5))
    oracle = Oracle(merged, base, engine.pair.shared_ids)
    expected = {f"{alpha}/{n}": oracle(PROMPTS[n], alpha) for alpha in ALPHAS for n in (0, 2)}
    assert expected["0.0/0"] != expected["-1.0/0"]
    engine.submit(request("3.0/2", PROMPTS[2], 3.0))
    assert collect(engine) == {"3.0/2": expected["3.0/2"]}
    for name in expected:
        alpha, n = name.split("/")
        engine.submit(request(name, PROMPTS[int(n)], float(alpha)))
    assert collect(engine) == expected
    engine.check_integrity()


@pytest.mark.parametrize("native", [True, False])
def test_both_models_answer_as_two_would(llama, native):
    """Log-probabilities of both models for every drawn token and its alternatives equal the unmerged pair's:
    to 1e-5 each on torch's operators, and to 2e-6 in the mean square on the native kernels too.
    """
    base, adapter, merged = llama
    events, errors = [], []
    for after in (adapter, merged):
        engine = Engine(load(after, base, native=native), EngineConfig(prefill_chunk_tokens=8))
        output = Output(diagnostics=True, top_candidates=20)
        plain = generation("plain", n=2, branches=(Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0)))
        events.append(run(engine, generation(n=3, output=output), plain))
    for index in range(3):
        ours, theirs = (
            [
                record
                for event in of(one, SequenceDelta, "r")
                if event.sequence_index == index
                for record in event.tokens
            ]
            for one in events
        )
        assert [record.token_id for record in ours] == [record.token_id for record in theirs]
        for one, other in zip(ours, theirs, strict=True):
            pairs = list(zip(one.diagnostics.candidates, other.diagnostics.candidates, strict=True))
            for mine, true in [*pairs, (one.diagnostics, other.diagnostics)]:
                errors += [mine.after_logprob - true.after_logprob, mine.before_logprob - true.before_logprob]
    assert len(errors) > 500
    if not native:
        assert max(map(abs, errors)) <= 1e-5
    rms = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert rms <= 2e-6
    for role in (Role.AFTER, Role.BEFORE):
        assert tokens_of(events[0], "plain", role=role) == tokens_of(events[1], "plain", role=role)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_held_and_read_once(llama, dtype, monkeypatch):
    """The pair holds the base model and the adapter, nothing twice; a step of both models is one pass."""
    base, adapter, _ = llama
    alone = held_bytes(load(base, base, dtype).before)
    low_rank = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    pair = load(adapter, base, dtype)
    assert held_bytes(pair.after, pair.before) == alone + low_rank * 4  # the adapter's products are float32
    engine = Engine(pair, EngineConfig())
    rows = []
    layer = pair.after.get_submodule("model.layers.0.mlp.up_proj.inner")
    layer.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    run(engine, generation(n=6, stopping=Stopping(4, ignore_eos=True)))
    assert rows == [1, 1, 12, 12, 12]


def test_a_sequence_is_the_same_beside_a_cancelled_one(llama):
    """Rows given up and taken again do not mix the two halves of the cache."""
    base, adapter, _ = llama
    engine = Engine(load(adapter, base), EngineConfig(max_running_sequences=3, kv_cache_tokens=256))
    alone = tokens_of(run(engine, generation(n=2)))
    engine.submit(generation("victim", n=3, stopping=Stopping(60, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    engine.cancel("victim")
    assert tokens_of(run(engine, generation(n=2), generation("late", n=4))) == alone


def test_information_names_the_adapter(llama):
    """What callers see: the adapter's name, a revision of its own, and its parameters on top of the base's."""
    base, adapter, _ = llama
    info = load(adapter, base).info
    assert (info.after.model_id, info.before.model_id) == ("adapter", "base")
    assert info.after.revision != info.before.revision
    added = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert info.after.parameter_count == info.before.parameter_count + added


def test_the_adapters_own_tokenizer_is_used(llama, tmp_path):
    """A chat template that training added comes with the adapter, as it would with a merged model."""
    base, adapter, _ = llama
    shutil.copytree(adapter, tmp_path / "adapter")
    byte_tokenizer(template="{{ 'adapted:' + messages[0]['content'] }}").save_pretrained(tmp_path / "adapter")
    pair = LDAModelPair(str(tmp_path / "adapter"), str(base), device="cpu")
    assert byte_tokenizer().decode(pair.render("Hi")) == "adapted:Hi"
    drawn = pair.rollouts("Hi", [Branch(Role.AMPLIFIED, 1.0)], 2, Sampling(1.0, seed=3), Stopping(5, ignore_eos=True))
    assert [len(each.tokens) for each in drawn] == [5, 5]


class TestRefusals:
    """What cannot be applied beside the base model is refused with the remedy, never ignored."""

    def changed(self, adapter, tmp_path, **settings):
        """A copy of the adapter with another configuration."""
        copy = tmp_path / "changed"
        shutil.copytree(adapter, copy)
        config = json.loads((copy / "adapter_config.json").read_text()) | settings
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_dora": True},
            {"bias": "all"},
            {"modules_to_save": ["lm_head"]},
            {"lora_bias": True},
            {"init_lora_weights": "pissa"},
            {"peft_type": "IA3"},
            {"layer_replication": [[0, 2]]},
            {"something_new": 3},
        ],
    )
    def test_more_than_lora(self, llama, tmp_path, settings):
        """Settings that change what the adapter computes, future ones included."""
        base, adapter, _ = llama
        with pytest.raises(ModelUnsupported, match=rf"{next(iter(settings))}.*merge_and_unload"):
            load(self.changed(adapter, tmp_path, **settings), base)

    def test_another_base(self, llama, tmp_path):
        """An adapter over another model than the before model: both are named."""
        base, adapter, _ = llama
        other = save_model(tmp_path / "other", "llama", seed=5)
        with pytest.raises(ConfigError) as caught:
            load(adapter, other)
        assert str(base) in caught.value.message
        assert str(other) in caught.value.message

    def test_the_base_by_another_path(self, llama, tmp_path):
        """The same folder reached through a link is the same model."""
        base, adapter, _ = llama
        (tmp_path / "link").symlink_to(base)
        assert load(adapter, tmp_path / "link").adapted_rows is not None

    def test_the_before_model_is_an_adapter(self, llama):
        """Only the after model may be one."""
        base, adapter, _ = llama
        with pytest.raises(ModelUnsupported, match="only MODEL_AFTER_ID"):
            load(base, adapter)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("adapter_model.safetensors", None),
            ("adapter_model.safetensors", b"not this"),
            ("adapter_config.json", b"not this"),
        ],
    )
    def test_unreadable(self, llama, tmp_path, name, content):
        """Missing weights and broken files."""
        base, adapter, _ = llama
        copy = self.changed(adapter, tmp_path)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(ModelUnreadable, match="needs a sound"):
            load(copy, base)

    @pytest.mark.parametrize("kind", ["embedding", "unknown layer", "shape", "output layer"])
    def test_weights_that_do_not_fit(self, llama, tmp_path, kind):
        """Weights that are no pair beside a linear layer of the base model."""
        base, adapter, _ = llama
        copy = self.changed(adapter, tmp_path)
        weights = load_file(copy / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
        a, b = weights[key.format("A")], weights[key.format("B")]
        if kind == "embedding":
            weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(288, 32)
        elif kind == "unknown layer":
            weights |= {key.replace("up_proj", "gone").format(which): x for which, x in (("A", a), ("B", b))}
        elif kind == "shape":
            weights[key.format("A")] = torch.cat([a, a], 1)
        else:
            weights |= {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
        save_file({k: v.clone() for k, v in weights.items()}, copy / "adapter_model.safetensors")
        with pytest.raises(ModelUnsupported, match="merge"):
            load(copy, base)
