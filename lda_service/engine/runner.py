"""Forward passes of one model over rows of its cache. Knows modules, slots and positions; nothing of sampling.

Logits leave the output layer in float32: at alpha 20 the rounding of two bf16 outputs would be as large as the signal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class SlotMap:
    """Slots of every running sequence's positions, by row: int64, shape (rows, context). Shared by both models."""

    def __init__(self, rows: int, context: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, context, dtype=torch.int64, device=device)

    def assign(self, row: int, *tables: PageTable) -> None:
        """Give a row the positions of these tables."""
        for table in tables:
            stop = table.start + table.capacity
            slots = torch.tensor(table.slots(table.start, stop), dtype=torch.int64)
            self.slots[row, table.start : stop] = slots.to(self.slots.device)


class ModelRunner:
    """One model and its cache. The last slot belongs to no page: what must not be stored is written there."""

    def __init__(self, model: PreTrainedModel, num_slots: int, vocabulary: int) -> None:
        self.model = model
        self.cache = KVCache(num_slots)
        self.vocabulary = vocabulary
        self.device = model.device

    def prefill(self, chunk: PrefillChunk, logits_to_keep: int, stored: int = 0) -> Tensor:
        """Run a chunk of new positions; positions before `stored` stand in the cache and are not written again.

        Another row may be reading those: what is computed for them goes to the last slot, which nobody reads.

        Returns:
            float32 logits of the chunk's last positions, shape (logits_to_keep, vocabulary).
        """
        slots = torch.tensor(chunk.slots(), device=self.device)
        positions = torch.arange(chunk.start, chunk.stop, device=self.device)
        ids = torch.tensor(chunk.ids, device=self.device)[None]
        write = slots[chunk.start :].masked_fill(positions < stored, self.cache.num_slots - 1)
        view = CacheView(self.cache, write, slots[None], positions[None])
        logits = self._forward(ids, positions[None], view, logits_to_keep)[0]
        self.cache.advance(chunk.owner, chunk.start, chunk.stop)
        return logits

    def decode(self, sequences: Ordered[Sequence], slot_map: SlotMap) -> Tensor:
        """Run the last token of each sequence; float32 logits, shape (sequences, vocabulary)."""
        rows = torch.tensor([sequence.row for sequence in sequences], device=self.device)
        positions = torch.tensor([[sequence.length - 1] for sequence in sequences], device=self.device)
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=self.device)
        context = slot_map.slots[rows, : max(sequence.length for sequence in sequences)]
        view = CacheView(self.cache, context.gather(1, positions)[:, 0], context, positions)
        logits = self._forward(ids, positions, view, 1)[:, 0]
        for sequence in sequences:
            self.cache.advance(sequence, sequence.length - 1, sequence.length)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, view: CacheView, logits_to_keep: int) -> Tensor:
        """Float32 logits, shape (rows, logits_to_keep, vocabulary): cut or padded to the pair's vocabulary."""
        output = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep, kv=view
        )
        logits: Tensor = output.logits[:, -logits_to_keep:].float()[..., : self.vocabulary]
        missing = self.vocabulary - logits.shape[-1]
        return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits
