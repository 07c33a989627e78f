"""8-bit weights: smaller, still the same model, and the error in the combined logits is the one that is reported."""

from __future__ import annotations

import sys

import pytest
import torch
from test_adapter import LORA, make_adapter
from test_engine import generation, run, tokens_of
from test_sharing import load
from tiny_models import byte_tokenizer, save_model

from lda_service import LDAModelPair
from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.quantize import CALIBRATION_TEXT, CALIBRATION_TOKENS
from lda_service.engine.sharing import stored_bytes
from lda_service.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "after", "llama", seed=1)
    save_model(folder / "before", "llama", seed=2)
    return folder / "after", folder / "before"


def plain_logits(pair, ids):
    """Both models' logits over shared ids in one plain pass of each."""
    found = []
    for model in (pair.after, pair.before):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found.append(model(torch.tensor([ids]), use_cache=False).logits[0, :, list(pair.shared_ids)].double())
    return found


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 10.0])
def test_the_reported_error_is_that_of_the_combined_logits(folders, alpha, caplog):
    """RMS over positions and ids of the difference to the unquantised pair, up to a shift of each position."""
    with caplog.at_level("INFO"):
        pair = load(*folders, quantize="int8")
    ids = byte_tokenizer().encode(CALIBRATION_TEXT)[:CALIBRATION_TOKENS]
    combined = [(1 + alpha) * a - alpha * b for a, b in (plain_logits(p, ids) for p in (pair, load(*folders)))]
    error = combined[0] - combined[1]
    wanted = (error - error.mean(1, keepdim=True)).square().mean().sqrt().item()
    assert pair.quantization_error.rms(alpha) == pytest.approx(wanted, rel=1e-3)
    assert 0 < wanted < 0.1 * combined[1].std().item()
    for logged in (1, 10):
        assert f"{pair.quantization_error.rms(logged):.3g}" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_shrink_and_output_layers_do_not_change(folders, dtype):
    """One byte a weight in linear layers; the float32 output layer is the unquantised one's bit by bit."""
    small, full = load(*folders, dtype=dtype, quantize="int8"), load(*folders, dtype=dtype)
    assert torch.equal(*(pair.after.get_output_embeddings().weight for pair in (small, full)))
    layer = "model.layers.0.mlp.up_proj"
    one, other = (stored_bytes(pair.after.get_submodule(layer)) for pair in (small, full))
    assert one < other * (0.35 if dtype == "float32" else 0.65)
    tokens = tokens_of(run(Engine(small, EngineConfig()), generation()))
    assert len(tokens) > 0


def test_equal_tensors_stay_shared(folders):
    """A model beside itself is stored once in 8 bits too."""
    pair = load(folders[0], folders[0], quantize="int8")
    assert stored_bytes(pair.after, pair.before) == stored_bytes(pair.after)
    assert pair.quantization_error.rms(0.0) == pytest.approx(pair.quantization_error.rms(10.0), rel=1e-4)


def test_an_adapter_over_a_quantised_base(folders, tmp_path):
    """The base is rounded, the adapter is not; the pair decodes and reports."""
    adapter, _ = make_adapter(tmp_path, folders[1], **LORA["llama"])
    pair = LDAModelPair(str(adapter), str(folders[1]), device="cpu", quantize="int8")
    assert pair.quantization_error(10.0) > pair.quantization_error(0.0) > 0
    assert pair.generate_lda("Hello", max_new_tokens=4, seed=1).tokens_generated > 0


def test_without_torchao(folders, monkeypatch):
    """The error names what to install; without the option nothing is needed, and the error is 0."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"lda-service\[quantize\]"):
        load(*folders, quantize="int8")
    assert LDAModelPair(*map(str, folders), device="cpu").quantization_error(5.0) == 0.0


def test_unknown_kind():
    """Kinds that do not exist are named with those that do."""
    with pytest.raises(ConfigError, match="none, int8"):
        PairConfig("a", "b", quantize="int1")
