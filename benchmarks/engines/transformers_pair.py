"""What the two peers that run both models through transformers have in common: loading, and one model's next logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import child

# As in the engine's own choice of threads: a second thread only waits for models this small.
SMALL_PARAMETERS = 20_000_000


class Side:
    """One model and its cache."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        self.restart()

    def restart(self) -> None:
        """Forget the sequence."""
        self.cache = DynamicCache(config=self.model.config)

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after the ids, float32, shape (rows, vocabulary); `ids` are those since the last call."""
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]


class TransformersPair(child.Measured):
    """Both models of a pair; subclasses decode with them."""

    def __init__(self, after: str, before: str, dtype: str) -> None:
        self.after, self.before = Side(after, dtype), Side(before, dtype)
        self.dtype = dtype
        self.vocabulary = self.after.model.config.vocab_size
        if self.after.model.num_parameters() < SMALL_PARAMETERS:
            torch.set_num_threads(1)

    def versions(self) -> dict[str, str]:
        """See `child.Handler`."""
        threads = {"threads": str(torch.get_num_threads()), "dtype": self.dtype}
        return child.versions("torch", "transformers") | threads

    def prompt(self, length: int, seed: int) -> torch.Tensor:
        """Ids of shape (1, length)."""
        return torch.tensor([child.prompt_ids(length, self.vocabulary, seed)])

    def generation_config(self, **settings: Any) -> Any:
        """Sampling of `settings`, end-of-sequence ignored."""
        from transformers import GenerationConfig

        return GenerationConfig(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, **settings)
