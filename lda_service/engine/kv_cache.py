"""One model's keys and values, in slots that `pages` hands out. Knows tensors and slots; nothing of models or requests.

Both models of a pair have a cache each, addressed by the same page tables: a position has the same slot in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor


class KVCache:
    """Keys and values of one model: for each layer two tensors of shape (slots, kv_heads, head_dim).

    A layer's tensors are made at its first use, in the shape and type of what is stored. `lengths` counts, for each
    owner of slots, the positions written: the lock-step check compares it between the two models.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.lengths: dict[Hashable, int] = {}
        self._layers: dict[int, tuple[Tensor, ...]] = {}

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of shape (slots, kv_heads, head_dim)."""
        if layer not in self._layers:
            self._layers[layer] = tuple(x.new_zeros((self.num_slots, *x.shape[1:])) for x in (keys, values))
        for stored, new in zip(self._layers[layer], (keys, values), strict=True):
            stored[slots] = new

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, ...]:
        """Keys and values at `slots`, each of shape (slots, kv_heads, head_dim)."""
        return tuple(stored.index_select(0, slots) for stored in self._layers[layer])

    def advance(self, owner: Hashable, start: int, stop: int) -> None:
        """Note that positions `start` to `stop` - 1 of `owner` were written; they must follow the last ones."""
        assert self.lengths.get(owner, start) == start, "a position was skipped or written twice"
        self.lengths[owner] = stop

    def forget(self, owner: Hashable) -> None:
        """The owner's slots were given back."""
        self.lengths.pop(owner, None)


@dataclass(slots=True, eq=False)
class CacheView:
    """What attention needs for one pass over a batch of rows; handed through the model as a keyword.

    Attributes:
        cache: where keys and values are stored.
        write_slots: int64, shape (rows * queries,): where this pass's keys and values go.
        context_slots: int64, shape (rows, context): each row's positions in order, padded with any slot.
        query_positions: int64, shape (rows, queries): absolute positions.
    """

    cache: KVCache
    write_slots: Tensor
    context_slots: Tensor
    query_positions: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write keys and values of shape (rows, kv_heads, queries, head_dim)."""
        self.cache.write(layer, self.write_slots, *(x.transpose(1, 2).flatten(0, 1) for x in (key, value)))

    def load(self, layer: int) -> tuple[Tensor, Tensor]:
        """The context's keys and values, shape (rows, kv_heads, context, head_dim)."""
        read = self.cache.read(layer, self.context_slots.flatten())
        key, value = (x.view(*self.context_slots.shape, *x.shape[1:]).transpose(1, 2) for x in read)
        return key, value

    def mask(self, window: int | None) -> Tensor:
        """Which context positions a query sees: bool, shape (rows, 1, queries, context)."""
        if window not in self._masks:
            context = torch.arange(self.context_slots.shape[1], device=self.query_positions.device)
            query = self.query_positions[:, None, :, None]
            seen = context <= query
            self._masks[window] = seen if window is None else seen & (context > query - window)
        return self._masks[window]
