"""One model's keys and values, in slots that `pages` hands out. Knows tensors and slots; nothing of models or requests.

Both models of a pair have a cache each, addressed by the same page tables: a position has the same slot in both. So
what a pass is about, `PassInputs`, is made once and serves both models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from lda_service.engine import native

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from lda_service.engine.paged_attention import PagedBatch


class KVCache:
    """Keys and values of one model: for each layer two tensors of shape (slots, kv_heads, head_dim).

    A layer's tensors are made at its first use, in the shape of what is stored. `lengths` counts, for each owner of
    slots, the positions written: the lock-step check compares it between the two models.

    Args:
        num_slots: positions it holds.
        dtype: of what is stored; that of the first keys if None.
    """

    def __init__(self, num_slots: int, dtype: torch.dtype | None = None) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.lengths: dict[Hashable, int] = {}
        self._layers: dict[int, tuple[Tensor, ...]] = {}

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The layer's tensors, for keys and values of shape (rows, kv_heads, queries, head_dim)."""
        return self.of_shapes(layer, [(x.shape[1], x.shape[3]) for x in (key, value)], key)

    def of_shapes(self, layer: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, ...]:
        """The layer's tensors for keys and values of (kv_heads, head_dim), in the type of `like` unless one was set."""
        if layer not in self._layers:
            dtype = self.dtype or like.dtype
            self._layers[layer] = tuple(like.new_zeros((self.num_slots, *shape), dtype=dtype) for shape in shapes)
        return self._layers[layer]

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one position, over the layers used so far."""
        return sum(x[0].numel() * x.itemsize for tensors in self._layers.values() for x in tensors)

    def advance(self, owner: Hashable, start: int, stop: int) -> None:
        """Note that positions `start` to `stop` - 1 of `owner` were written; they must follow the last ones."""
        assert self.lengths.get(owner, start) == start, "a position was skipped or written twice"
        self.lengths[owner] = stop

    def rewind(self, owner: Hashable, stop: int) -> None:
        """Positions from `stop` on are void; they are written again before any query sees them."""
        assert stop <= self.lengths[owner], "a position that was never written cannot be kept"
        self.lengths[owner] = stop

    def forget(self, owner: Hashable) -> None:
        """The owner's slots were given back."""
        self.lengths.pop(owner, None)


class Group(NamedTuple):
    """Rows `start` to `stop` - 1 of a pass: their first `prefix` positions are the same slots."""

    start: int
    stop: int
    prefix: int


@dataclass(eq=False)
class PassInputs:
    """What a pass over a batch of rows is about, the same for both models.

    Attributes:
        ids: int64, shape (rows, queries).
        positions: int64, shape (rows, queries): absolute positions, consecutive in each row.
        slot_map: int64, shape (any rows, context): slots by absolute position; int64 and contiguous.
        rows: int64, shape (rows,): where each row stands in `slot_map`.
        context: positions up to the longest row's end.
        groups: all rows, those with the same prompt together.
        stored: positions before this one stand in the cache already and are not written again: others read them.
        is_prefill: many queries of few rows.
        invariant: how a row is computed must not depend on how many rows share its prompt.
    """

    ids: Tensor
    positions: Tensor
    slot_map: Tensor
    rows: Tensor
    context: int
    groups: tuple[Group, ...]
    stored: int = 0
    is_prefill: bool = False
    invariant: bool = False
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @cached_property
    def context_slots(self) -> Tensor:
        """Each row's slots in order of position, padded with any slot: int64, shape (rows, context)."""
        return self.slot_map[self.rows, : self.context]

    @cached_property
    def written(self) -> Tensor:
        """Which of this pass's keys and values are stored, in order of rows and queries: int64."""
        return (self.positions.flatten() >= self.stored).nonzero()[:, 0]

    @cached_property
    def write_slots(self) -> Tensor:
        """Where those go: int64."""
        slots = self.context_slots.gather(1, self.positions).flatten()
        return slots[self.written] if self.stored else slots

    def mask(self, window: int | None, start: int = 0) -> Tensor:
        """Which positions from `start` on a query sees: bool, shape (rows, 1, queries, context - start)."""
        if (window, start) not in self._masks:
            context = torch.arange(start, self.context, device=self.positions.device)
            query = self.positions[:, None, :, None]
            seen = context <= query
            self._masks[window, start] = seen if window is None else seen & (context > query - window)
        return self._masks[window, start]

    @cached_property
    def layout(self) -> native.Layout:
        """The same for the native kernels. Its pointers live as long as this object."""
        rows, queries = self.ids.shape
        starts = [group.start for group in self.groups] + [self.groups[-1].stop]
        self._group_start = torch.tensor(starts)
        self._group_prefix = torch.tensor([group.prefix for group in self.groups])
        shared = self.invariant or max(group.stop - group.start for group in self.groups) >= native.SHARED_ROWS
        return native.Layout(
            rows,
            queries,
            self.slot_map.data_ptr(),
            self.slot_map.shape[1],
            self.rows.data_ptr(),
            self.positions.data_ptr(),
            len(self.groups),
            self._group_start.data_ptr(),
            self._group_prefix.data_ptr(),
            shared,
            self.is_prefill or self.invariant,
            self.stored,
        )


@dataclass(frozen=True, slots=True, eq=False)
class CacheView:
    """One model's side of a pass; handed through the model as the keyword `kv`.

    `kernels` None: attention runs on torch's operators; `paged`: on a paged CUDA kernel, where the layer allows.
    """

    cache: KVCache
    inputs: PassInputs
    kernels: native.Kernels | None = None
    paged: PagedBatch | None = None

    def tensors(self, layer: int) -> tuple[Tensor, ...]:
        """The layer's keys and values, each of shape (slots, kv_heads, head_dim), for attention to read in place."""
        return self.cache._layers[layer]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write keys and values of shape (rows, kv_heads, queries, head_dim)."""
        stored = self.cache.layer(layer, key, value)
        for tensor, new in zip(stored, (key, value), strict=True):
            rows = new.transpose(1, 2).flatten(0, 1).to(tensor.dtype)
            tensor[self.inputs.write_slots] = rows[self.inputs.written] if self.inputs.stored else rows

    def load(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots` of shape (rows, positions): shape (rows, kv_heads, positions, head_dim)."""
        read = [stored.index_select(0, slots.flatten()).to(dtype) for stored in self.cache._layers[layer]]
        key, value = (x.view(*slots.shape, *x.shape[1:]).transpose(1, 2) for x in read)
        return key, value
