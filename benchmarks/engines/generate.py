"""Peer 1: transformers' `generate()`, batched, with a logits processor that runs the second model beside it."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import child
from benchmarks.engines.transformers_pair import Side, TransformersPair
from benchmarks.workloads import ALPHA, TEMPERATURE


class Amplify(LogitsProcessor):
    """after + alpha (after - before), with the before model's own cache."""

    def __init__(self, before: Side) -> None:
        self.before = before
        self.seen = 0
        before.restart()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Combine, for the ids that are new since the last call."""
        other = self.before.next_logits(input_ids[:, self.seen :])
        self.seen = input_ids.shape[1]
        return scores + ALPHA * (scores - other)


class Generate(TransformersPair):
    """All rows in one batch, the prompt once for each."""

    @torch.inference_mode()
    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int) -> dict[str, Any]:
        """Decode the workload: tokens and seconds."""
        ids = self.prompt(prompt, seed)
        config = self.generation_config(
            max_new_tokens=new, temperature=TEMPERATURE, top_p=top_p, num_return_sequences=rows
        )
        start = time.perf_counter()
        processors = LogitsProcessorList([Amplify(self.before)])
        mask = torch.ones_like(ids)
        output = self.after.model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
        seconds = time.perf_counter() - start
        return {"tokens": output[:, prompt:].numel(), "rows": rows, "seconds": seconds}


if __name__ == "__main__":
    child.serve(Generate)
