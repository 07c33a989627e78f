"""Pages of the KV cache: which slots belong to whom. One table serves both models.

A slot holds the key and value of one position, a page is `page_tokens` slots in a row. A prompt owns its pages once for
all its sequences; a sequence owns the pages of its own tokens, which start on a fresh page, so that no page is ever
copied. This module only counts: the tensors are in `kv_cache`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of `capacity` consecutive positions, starting at absolute position `start`."""

    start: int
    capacity: int
    pages: tuple[int, ...]
    page_tokens: int

    def slots(self, first: int, stop: int) -> list[int]:
        """Slots of the absolute positions `first` to `stop` - 1."""
        assert self.start <= first <= stop <= self.start + self.capacity
        offsets = range(first - self.start, stop - self.start)
        size = self.page_tokens
        return [self.pages[offset // size] * size + offset % size for offset in offsets]


class PagePool:
    """Hands out pages and takes them back; counts who holds what."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages > 0
        assert page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` positions need."""
        return -(-tokens // self.page_tokens)

    def can_allocate(self, *token_counts: int) -> bool:
        """Whether tables of these capacities could all be allocated now."""
        return sum(map(self.pages_for, token_counts)) <= self.num_free

    def allocate(self, start: int, capacity: int) -> PageTable:
        """A table for `capacity` positions from `start`; the caller has asked `can_allocate`."""
        count = self.pages_for(capacity)
        assert count <= self.num_free, "allocate without can_allocate"
        pages = tuple(self._free.pop() for _ in range(count))
        self._held.update(pages)
        return PageTable(start, capacity, pages, self.page_tokens)

    def release(self, table: PageTable) -> None:
        """Take the table's pages back."""
        assert self._held.issuperset(table.pages), "released twice"
        self._held.difference_update(table.pages)
        self._free.extend(reversed(table.pages))

    def check_integrity(self) -> None:
        """Every page is either free or held, once."""
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert self._held.isdisjoint(self._free), "a page is free and held"
        assert len(self._free) + len(self._held) == self.num_pages, "a page is lost"
