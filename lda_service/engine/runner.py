"""Forward passes of one model over rows of its cache. Knows modules, slots and positions; nothing of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lda_service.engine.kv_cache import CacheView, Group, KVCache, PassInputs

if TYPE_CHECKING:
    from collections.abc import Sequence as Ordered

    from transformers import PreTrainedModel

    from lda_service.engine.native import Kernels
    from lda_service.engine.pages import PageTable
    from lda_service.engine.scheduler import PrefillChunk, Sequence


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


def prefill_inputs(chunk: PrefillChunk, device: torch.device) -> PassInputs:
    """One row: the chunk's positions, behind what stands in the cache already."""
    table = chunk.job.table
    assert table is not None
    slots = torch.tensor(table.slots(0, chunk.stop), device=device)[None]
    positions = torch.arange(chunk.start, chunk.stop, device=device)[None]
    ids = torch.tensor(chunk.job.prompt_ids[chunk.start : chunk.stop], device=device)[None]
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    return PassInputs(ids, positions, slots, rows, chunk.stop, (Group(0, 1, 0),), is_prefill=True)


def decode_inputs(sequences: Ordered[Sequence], slot_map: SlotMap, *, invariant: bool = False) -> PassInputs:
    """One query for each sequence, its last token. Sequences of one prompt must stand together."""
    return block_inputs(sequences, last_tokens(sequences, slot_map.slots.device), 0, slot_map, invariant=invariant)


def last_tokens(sequences: Ordered[Sequence], device: torch.device) -> Tensor:
    """The token that each sequence runs next: int64, shape (sequences, 1)."""
    return torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=device)


def block_inputs(
    sequences: Ordered[Sequence], ids: Tensor, offset: int, slot_map: SlotMap, *, invariant: bool = False
) -> PassInputs:
    """Some queries for each sequence: `ids`, of shape (sequences, queries), from `offset` behind its last token on."""
    device = slot_map.slots.device
    lengths = torch.tensor([[sequence.length] for sequence in sequences], device=device)
    queries = ids.shape[1]
    positions = lengths - 1 + torch.arange(offset, offset + queries, device=device)
    rows = torch.tensor([sequence.row for sequence in sequences], device=device)
    context = max(sequence.length for sequence in sequences) - 1 + offset + queries
    return PassInputs(ids, positions, slot_map.slots, rows, context, _groups(sequences), invariant=invariant)


def _groups(sequences: Ordered[Sequence]) -> tuple[Group, ...]:
    groups = []
    start = 0
    for i, sequence in enumerate(sequences):
        is_last = i + 1 == len(sequences)
        if is_last or sequences[i + 1].job.table.pages != sequence.job.table.pages:  # type: ignore[union-attr]
            groups.append(Group(start, i + 1, len(sequence.job.prompt_ids)))
            start = i + 1
    return tuple(groups)


class ModelRunner:
    """One model and its cache.

    Args:
        model: on its device.
        num_slots: positions the cache holds.
        vocabulary: width of the logits.
        kernels: the native kernels, where attention runs on them.
        cache_dtype: of the stored keys and values; that of the computation if None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        vocabulary: int,
        kernels: Kernels | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.cache = KVCache(num_slots, cache_dtype)
        self.vocabulary = vocabulary
        self.device = model.device
        self.kernels = kernels

    def prefill(self, chunk: PrefillChunk, inputs: PassInputs, logits_to_keep: int) -> Tensor:
        """Run a chunk of a prompt; float32 logits of its last positions, shape (logits_to_keep, vocabulary)."""
        logits = self._forward(inputs, logits_to_keep)[0]
        self.cache.advance(chunk.job, chunk.start, chunk.stop)
        return logits

    def decode(self, sequences: Ordered[Sequence], inputs: PassInputs) -> Tensor:
        """Run the last token of each sequence; float32 logits, shape (sequences, vocabulary)."""
        return self.run_block(sequences, inputs, 0)[:, 0]

    def run_block(self, sequences: Ordered[Sequence], inputs: PassInputs, offset: int) -> Tensor:
        """Run the queries of `block_inputs`; float32 logits, shape (sequences, queries, vocabulary)."""
        queries = inputs.ids.shape[1]
        logits = self._forward(inputs, queries)
        for sequence in sequences:
            start = sequence.length - 1 + offset
            self.cache.advance(sequence, start, start + queries)
        return logits

    def _forward(self, inputs: PassInputs, logits_to_keep: int) -> Tensor:
        """Float32 logits, shape (rows, logits_to_keep, vocabulary): cut or padded to the pair's vocabulary."""
        output = self.model(
            input_ids=inputs.ids,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=logits_to_keep,
            kv=CacheView(self.cache, inputs, self.kernels),
        )
        logits: Tensor = output.logits[:, -logits_to_keep:].float()[..., : self.vocabulary]
        missing = self.vocabulary - logits.shape[-1]
        return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits
