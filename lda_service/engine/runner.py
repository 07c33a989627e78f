"""Forward passes of one model over rows of its cache. Knows modules, slots and positions; nothing of sampling.

Logits leave the output layer in float32: at alpha 20 the rounding of two bf16 outputs would be as large as the signal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lda_service.engine.kv_cache import CacheView, KVCache

if TYPE_CHECKING:
    from collections.abc import Sequence as Ordered

    from transformers import PreTrainedModel

    from lda_service.engine.pages import PageTable
    from lda_service.engine.scheduler import PrefillChunk, Sequence


class Float32Head(nn.Module):
    """An output layer that computes and answers in float32 whatever the type of the body."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        weight, bias = head.weight, getattr(head, "bias", None)
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=False)  # type: ignore[operator]
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float32, shape (..., vocabulary)."""
        return linear(hidden.float(), self.weight, self.bias)


def fit(logits: Tensor, vocabulary: int) -> Tensor:
    """The logits in float32, their last dimension cut or padded (-inf) to the pair's vocabulary."""
    logits = logits.float()[..., :vocabulary]
    missing = vocabulary - logits.shape[-1]
    return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits


class SlotMap:
    """Slots of every running sequence's positions, by row: int64, shape (rows, context). Shared by both models."""

    def __init__(self, rows: int, context: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, context, dtype=torch.int64, device=device)

    def assign(self, row: int, *tables: PageTable) -> None:
        """Give a row the positions of a prompt's table and a sequence's table."""
        for table in tables:
            stop = table.start + table.capacity
            slots = torch.tensor(table.slots(table.start, stop), dtype=torch.int64)
            self.slots[row, table.start : stop] = slots.to(self.slots.device)


class ModelRunner:
    """One model and its cache."""

    def __init__(self, model: PreTrainedModel, num_slots: int, vocabulary: int) -> None:
        self.model = model
        self.cache = KVCache(num_slots)
        self.vocabulary = vocabulary
        self.device = model.device

    def prefill(self, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        """Run a chunk of a prompt; float32 logits of its last positions, shape (logits_to_keep, vocabulary)."""
        table = chunk.job.table
        assert table is not None
        slots = torch.tensor(table.slots(0, chunk.stop), device=self.device)
        positions = torch.arange(chunk.start, chunk.stop, device=self.device)[None]
        ids = torch.tensor(chunk.job.prompt_ids[chunk.start : chunk.stop], device=self.device)[None]
        view = CacheView(self.cache, slots[chunk.start :], slots[None], positions)
        output = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep, kv=view
        )
        self.cache.advance(chunk.job, chunk.start, chunk.stop)
        return fit(output.logits[0, -logits_to_keep:], self.vocabulary)

    def decode(self, sequences: Ordered[Sequence], slot_map: SlotMap) -> Tensor:
        """Run the last token of each sequence; float32 logits, shape (sequences, vocabulary)."""
        return fit(self._step(self.model, sequences, slot_map).logits[:, 0], self.vocabulary)

    def decode_hidden(self, sequences: Ordered[Sequence], slot_map: SlotMap) -> Tensor:
        """The same without the output layer: what goes into it, in the model's type, shape (sequences, hidden)."""
        hidden: Tensor = self._step(self.model.base_model, sequences, slot_map).last_hidden_state[:, 0]
        return hidden

    def _step(self, module: nn.Module, sequences: Ordered[Sequence], slot_map: SlotMap) -> Any:
        """The module's output for the last token of each sequence."""
        rows = torch.tensor([sequence.row for sequence in sequences], device=self.device)
        positions = torch.tensor([[sequence.length - 1] for sequence in sequences], device=self.device)
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=self.device)
        context = slot_map.slots[rows, : max(sequence.length for sequence in sequences)]
        view = CacheView(self.cache, context.gather(1, positions)[:, 0], context, positions)
        output = module(input_ids=ids, position_ids=positions, use_cache=False, kv=view)
        for sequence in sequences:
            self.cache.advance(sequence, sequence.length - 1, sequence.length)
        return output
