"""Peer 3: transformers' continuous batching (`generate_batch`) with one model."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks import child
from benchmarks.workloads import TEMPERATURE

PAGE = 32


class Continuous(child.Measured):
    """One model of the pair; rows are copies of the prompt that share its pages where the library can."""

    def __init__(self, model: str, dtype: str) -> None:
        self.dtype = dtype
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
        self.model = loaded.eval().requires_grad_(False)
        self.vocabulary = self.model.config.vocab_size

    def versions(self) -> dict[str, str]:
        """See `child.Handler`."""
        threads = {"threads": str(torch.get_num_threads()), "dtype": self.dtype}
        return child.versions("torch", "transformers") | threads

    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int) -> dict[str, Any]:
        """Decode the workload: tokens and seconds."""
        ids = child.prompt_ids(prompt, self.vocabulary, seed)
        generation = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=top_p,
            max_new_tokens=new,
            num_return_sequences=rows,
            eos_token_id=-1,
            pad_token_id=0,
        )
        start = time.perf_counter()
        results = self.model.generate_batch(
            [ids], generation_config=generation, continuous_batching_config=self._batching(rows, prompt + new)
        )
        seconds = time.perf_counter() - start
        return {"tokens": sum(len(r.generated_tokens) for r in results.values()), "rows": rows, "seconds": seconds}

    def _batching(self, rows: int, length: int) -> Any:
        """A cache for exactly this workload: the size it picks for itself is most of the machine's memory."""
        blocks = rows * (-(-length // PAGE) + 1)
        return ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=512, seed=0)


if __name__ == "__main__":
    child.serve(Continuous)
