"""Equal tensors of a pair are stored once, and nothing that is computed changes."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from lda_service.config import PairConfig
from lda_service.engine import sharing
from lda_service.engine.pair import load_pair


def held_bytes(*models):
    """Bytes of the distinct storages behind every parameter and buffer."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def load(after, before, **settings):
    return load_pair(PairConfig(str(after), str(before), device="cpu", **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_pair_that_differs_in_one_tensor_stores_the_others_once(tmp_path, dtype, tied, caplog):
    """One changed matrix: the second model adds that matrix to memory and nothing else, and the log says what it saved.

    The float32 output layers made at load are shared too.
    """
    after = save_model(tmp_path / "after", seed=1, tie_word_embeddings=tied)
    before = tmp_path / "before"
    shutil.copytree(after, before)
    weights = load_file(before / "model.safetensors")
    changed = "model.layers.1.mlp.up_proj.weight"
    weights[changed][3, 5] += 1
    save_file(weights, before / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO"):
        pair = load(after, before, dtype=dtype, native=False)
    different = pair.before.get_parameter(changed)
    alone = held_bytes(pair.after)
    assert held_bytes(pair.after, pair.before) == alone + different.untyped_storage().nbytes()
    assert not torch.equal(different, pair.after.get_parameter(changed))
    plain = AutoModelForCausalLM.from_pretrained(after, dtype=dtype)
    shared = held_bytes(plain) - plain.get_parameter(changed).untyped_storage().nbytes()
    assert f"shared_weight_bytes={shared}" in caplog.text


def test_packed_weights_are_shared_too(tmp_path):
    """What is laid out anew for the native kernels is laid out once for both models."""
    after = save_model(tmp_path / "after", seed=1)
    before = tmp_path / "before"
    shutil.copytree(after, before)
    weights = load_file(before / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(weights, before / "model.safetensors", {"format": "pt"})
    pair = load(after, before)
    different = pair.before.get_parameter("model.layers.1.mlp.up_proj.packed")
    assert held_bytes(pair.after, pair.before) == held_bytes(pair.after) + different.untyped_storage().nbytes()


def test_unlike_models_share_nothing_they_should_not(tmp_path):
    """Models of other weights, another type or another size keep every parameter of their own."""
    after = save_model(tmp_path / "after", seed=1)
    for name, changes in {"weights": {"seed": 2}, "size": {"seed": 1, "hidden_size": 64}}.items():
        pair = load(after, save_model(tmp_path / name, **changes))
        theirs = {p.data_ptr() for n, p in pair.before.named_parameters() if "norm" not in n}
        assert theirs.isdisjoint(p.data_ptr() for p in pair.after.parameters())


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
    rows=st.integers(0, 9),
    columns=st.integers(1, 7),
    at=st.one_of(st.none(), st.integers(0, 62)),
    chunk=st.integers(1, 20),
)
def test_one_bit_anywhere_is_seen(dtype, rows, columns, at, chunk):
    """Tensors are equal if and only if their bytes are, whatever their type and however they are cut into chunks."""
    one = torch.arange(rows * columns).view(rows, columns).to(dtype)
    other = one.clone()
    if at is not None and at < one.numel():
        other.view(-1)[at] = ~other.view(-1)[at] if dtype is torch.bool else other.view(-1)[at] + 1
    kept, sharing.CHUNK_ELEMENTS = sharing.CHUNK_ELEMENTS, chunk
    try:
        found = sharing.bit_equal(one, other)
    finally:
        sharing.CHUNK_ELEMENTS = kept
    raw = [bytes(x.contiguous().view(-1).view(torch.uint8).tolist()) for x in (one, other)]
    assert found == (raw[0] == raw[1])


@pytest.mark.parametrize(("one", "other", "equal"), [(0.0, -0.0, False), (torch.nan, torch.nan, True)])
def test_equality_is_of_bits_not_of_numbers(one, other, equal):
    """Minus zero is another tensor than zero, NaN the same as itself."""
    assert sharing.bit_equal(torch.tensor(one), torch.tensor(other)) is equal
