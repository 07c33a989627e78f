"""Forward passes of one model over rows of its cache. Knows modules, slots and positions; nothing of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lda_service.engine.kv_cache import CacheView, Group, KVCache, PassInputs

if TYPE_CHECKING:
    from collections.abc import Sequence as Ordered

    from transformers import PreTrainedModel

    from lda_service.engine.native import Kernels
    from lda_service.engine.paged_attention import PagedBatch
    from lda_service.engine.pages import PageTable
    from lda_service.engine.scheduler import PrefillChunk, Sequence


class SlotMap:
    """Slots of every running sequence's positions, by row: int64, shape (rows, context). Shared by both models."""

    def __init__(self, rows: int, context: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, context, dtype=torch.int64, device=device)

    def add_nobody(self, slot: int) -> None:
        """One row more, behind the others, whose positions all stand in this slot, which belongs to nobody."""
        self.slots = torch.cat([self.slots, torch.full_like(self.slots[:1], slot)])

    def assign(self, row: int, *tables: PageTable) -> None:
        """Give a row the positions of these tables."""
        for table in tables:
            stop = table.start + table.capacity
            slots = torch.tensor(table.slots(table.start, stop), dtype=torch.int64)
            self.slots[row, table.start : stop] = slots.to(self.slots.device)


def prefill_inputs(chunk: PrefillChunk, stored: int, device: torch.device, offset: int = 0) -> PassInputs:
    """One row: the chunk's positions, behind what stands in the cache; those before `stored` stay as they are.

    `offset` is added to every slot.
    """
    slots = torch.tensor(chunk.slots(), device=device)[None] + offset
    positions = torch.arange(chunk.start, chunk.stop, device=device)[None]
    ids = torch.tensor(chunk.ids, device=device)[None]
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    groups = (Group(0, 1, chunk.prefix),)
    return PassInputs(ids, positions, slots, rows, chunk.stop, groups, stored=stored, is_prefill=True)


def decode_inputs(
    sequences: Ordered[Sequence], slot_map: SlotMap, *, invariant: bool = False, twins: Ordered[Sequence] = ()
) -> PassInputs:
    """One query for each sequence, its last token. Sequences of one prompt must stand together.

    `twins` follow as further rows, whose slots stand in the second half of the slot map.
    """
    ids = last_tokens([*sequences, *twins], slot_map.slots.device)
    return block_inputs(sequences, ids, 0, slot_map, invariant=invariant, twins=twins)


def last_tokens(sequences: Ordered[Sequence], device: torch.device) -> Tensor:
    """The token that each sequence runs next: int64, shape (sequences, 1)."""
    return torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=device)


def block_inputs(
    sequences: Ordered[Sequence],
    ids: Tensor,
    offset: int,
    slot_map: SlotMap,
    *,
    invariant: bool = False,
    twins: Ordered[Sequence] = (),
) -> PassInputs:
    """Some queries for each sequence: `ids`, of shape (rows, queries), from `offset` behind its last token on."""
    device = slot_map.slots.device
    rows = [sequence.row for sequence in sequences]
    if twins:
        rows += [sequence.row + len(slot_map.slots) // 2 for sequence in twins]
    starts = [sequence.length - 1 + offset for sequence in (*sequences, *twins)]
    queries = ids.shape[1]
    return PassInputs(
        ids,
        torch.tensor([range(start, start + queries) for start in starts], device=device),
        slot_map.slots,
        torch.tensor(rows, device=device),
        max(starts) + queries,
        (*_groups(sequences, 0), *_groups(twins, len(sequences))),
        invariant=invariant,
    )


def _groups(sequences: Ordered[Sequence], first_row: int) -> list[Group]:
    groups = []
    start = 0
    for i, sequence in enumerate(sequences):
        is_last = i + 1 == len(sequences)
        if is_last or sequences[i + 1].job.table.pages != sequence.job.table.pages:  # type: ignore[union-attr]
            groups.append(Group(first_row + start, first_row + i + 1, len(sequence.job.prompt_ids)))
            start = i + 1
    return groups


def fit(logits: Tensor, vocabulary: int) -> Tensor:
    """The logits in float32, their last dimension cut or padded (-inf) to the pair's vocabulary."""
    logits = logits.float()[..., :vocabulary]
    missing = vocabulary - logits.shape[-1]
    return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits


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
        """Run a chunk of new positions; float32 logits of its last ones, shape (logits_to_keep, vocabulary)."""
        logits = self.logits(inputs, logits_to_keep)[0]
        self.cache.advance(chunk.owner, chunk.start, chunk.stop)
        return logits

    def decode(self, sequences: Ordered[Sequence], inputs: PassInputs, *, hidden: bool = False) -> Tensor:
        """Run the last token of each sequence.

        Returns:
            float32 logits, shape (sequences, vocabulary); if `hidden`, what goes into the output layer instead.
        """
        values = self.hidden(inputs) if hidden else self.logits(inputs, 1)[:, 0]
        for sequence in sequences:
            self.cache.advance(sequence, sequence.length - 1, sequence.length)
        return values

    def run_block(self, sequences: Ordered[Sequence], inputs: PassInputs, offset: int) -> Tensor:
        """Run the queries of `block_inputs`; float32 logits, shape (sequences, queries, vocabulary)."""
        queries = inputs.ids.shape[1]
        logits = self.logits(inputs, queries)
        for sequence in sequences:
            start = sequence.length - 1 + offset
            self.cache.advance(sequence, start, start + queries)
        return logits

    def decode_static(self, inputs: PassInputs, paged: PagedBatch | None) -> Tensor:
        """Run one query of each row on torch's operators and note nothing: float32 logits, shape (rows, vocabulary)."""
        view = CacheView(self.cache, inputs, None, paged)
        return fit(self._pass(self.model, inputs, view, logits_to_keep=1).logits[:, -1], self.vocabulary)

    def logits(self, inputs: PassInputs, logits_to_keep: int) -> Tensor:
        """One pass; float32 logits of the last positions, shape (rows, logits_to_keep, vocabulary)."""
        output = self._pass(self.model, inputs, logits_to_keep=logits_to_keep)
        return fit(output.logits[:, -logits_to_keep:], self.vocabulary)

    def hidden(self, inputs: PassInputs) -> Tensor:
        """One pass without the output layer; what goes into it at the last position, shape (rows, hidden)."""
        states: Tensor = self._pass(self.model.base_model, inputs).last_hidden_state[:, -1]
        return states

    def _pass(self, module: nn.Module, inputs: PassInputs, view: CacheView | None = None, **options: int) -> Any:
        view = view or CacheView(self.cache, inputs, self.kernels)
        return module(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False, kv=view, **options)
