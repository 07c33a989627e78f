"""Peer 2: one request at a time, two models in lock-step over DynamicCache, top_p by sorting. The obvious server."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import child
from benchmarks.engines.transformers_pair import TransformersPair
from benchmarks.workloads import ALPHA, TEMPERATURE

# One after the other, rollouts cost the same each: a few tell the rate.
MEASURED_ROWS = 3


class Loop(TransformersPair):
    """A request is one row; rows follow one another."""

    @torch.inference_mode()
    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int) -> dict[str, Any]:
        """Decode up to `MEASURED_ROWS` of the workload's rows: tokens, seconds, rows."""
        ids = self.prompt(prompt, seed)
        measured = min(rows, MEASURED_ROWS)
        start = time.perf_counter()
        tokens = sum(self._one(ids, new, top_p) for _ in range(measured))
        return {"tokens": tokens, "rows": measured, "seconds": time.perf_counter() - start}

    def _one(self, ids: torch.Tensor, new: int, top_p: float) -> int:
        self.after.restart()
        self.before.restart()
        drawn = []
        for _ in range(new):
            after, before = self.after.next_logits(ids), self.before.next_logits(ids)
            ids = draw(after + ALPHA * (after - before), top_p)
            drawn.append(int(ids))
        return len(drawn)


def draw(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """One token for each row, shape (rows, 1)."""
    logits = logits / TEMPERATURE
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        ordered[probability.cumsum(-1) - probability > top_p] = -torch.inf
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1)


if __name__ == "__main__":
    child.serve(Loop)
