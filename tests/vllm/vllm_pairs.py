"""Small random pairs that vLLM's CPU kernels can run, and the engines that are run over them."""

from __future__ import annotations

from dataclasses import dataclass, field

from remote_engine import RemoteEngine
from tiny_models import save_model

HEADS = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)  # heads of 32, the least that vLLM knows
CHANGES = {"qwen3": dict(HEADS, head_dim=32)}


def save_pair(folder, architecture="llama", **before_changes):
    """Two models of one shape and other weights; returns their folders."""
    shape = CHANGES.get(architecture, HEADS)
    after, before = folder / "after", folder / "before"
    save_model(after, architecture, seed=1, **shape)
    save_model(before, architecture, seed=2, **{**shape, **before_changes})
    return after, before


def save_unlike_pair(folder):
    """4 layers of width 128 against 2 of width 64 with tied embeddings and another padding; returns their folders."""
    after, before = folder / "after", folder / "before"
    save_model(after, "llama", seed=3, vocab_size=320, **HEADS | dict(hidden_size=128, num_hidden_layers=4))
    save_model(before, "qwen2", seed=4, vocab_size=264, **HEADS, tie_word_embeddings=True)
    return after, before


@dataclass(frozen=True)
class Setup:
    """An engine and the pair under it. `is_tight`: the KV cache cannot hold what is asked at once."""

    save: object = save_pair
    options: dict = field(default_factory=dict)
    is_tight: bool = False

    def start(self, folder, **more):
        """The engine, and the two folders."""
        pair = self.save(folder)
        return RemoteEngine(pair, **self.options | more), pair
