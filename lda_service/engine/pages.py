"""Pages of the KV cache: which slots belong to whom, and which text stands in them. One table serves both models.

A slot holds the key and value of one position, a page is `page_tokens` slots in a row. A prompt's pages are shared by
all its sequences and by every prompt that begins with the same tokens; a sequence owns the pages of its own tokens,
which start on a fresh page, so that no page is ever copied, nor written while another reads it. A prompt's page that
nobody holds any more keeps its content until the page is needed: least recently released first. This module only
counts: the tensors are in `kv_cache`. No torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

IDLE_STATES = 64  # prompts nobody holds that keep their state; a state is about as large as a page


@dataclass(eq=False, slots=True)
class Content:
    """What a prompt's page holds: `tokens`, after all that its parents hold.

    There is one entry for each such text, found by the tokens themselves, so two prompts share an entry exactly if they
    agree up to its last token. The last page of a prompt may hold fewer tokens than fit; it has no children then.
    """

    page: int
    tokens: tuple[int, ...]
    parent: Content | None = None
    children: dict[tuple[int, ...], Content] = field(default_factory=dict)
    written: list[int] = field(default_factory=lambda: [0, 0])  # scheduler: positions in the after, before cache
    states: list[Any] = field(default_factory=lambda: [None, None])  # engine: what follows, says after, before


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of `capacity` consecutive positions, starting at absolute position `start`. A prompt's has contents."""

    start: int
    capacity: int
    pages: tuple[int, ...]
    page_tokens: int
    contents: tuple[Content, ...] = ()

    @property
    def stop(self) -> int:
        """One more than the last position."""
        return self.start + self.capacity

    def slots(self, first: int, stop: int) -> list[int]:
        """Slots of the absolute positions `first` to `stop` - 1."""
        assert self.start <= first <= stop <= self.stop
        offsets = range(first - self.start, stop - self.start)
        size = self.page_tokens
        return [self.pages[offset // size] * size + offset % size for offset in offsets]

    def extended(self, more: PageTable) -> PageTable:
        """This table with the positions of `more` behind it."""
        assert more.start == self.stop
        assert self.capacity == len(self.pages) * self.page_tokens, "only full pages can be followed"
        return PageTable(self.start, self.capacity + more.capacity, self.pages + more.pages, self.page_tokens)

    def written(self, side: int) -> int:
        """Positions from the start that stand in the cache of the after (0) or before (1) model."""
        total = 0
        for content in self.contents:
            total += content.written[side]
            if content.written[side] < len(content.tokens):
                break
        return total

    def note_written(self, side: int, start: int, stop: int) -> None:
        """The model wrote positions `start` to `stop` - 1, the next ones it lacked, or some that it had."""
        first = start // self.page_tokens
        for i, content in enumerate(self.contents[first : -(-stop // self.page_tokens)], first):
            written = min(len(content.tokens), stop - i * self.page_tokens)
            content.written[side] = max(content.written[side], written)


class PagePool:
    """Hands out pages and takes them back; counts who holds what, and knows what the pages of prompts hold.

    Args:
        num_pages: pages there are.
        page_tokens: positions of a page.
        shares_prompts: whether a prompt may use what an earlier one left; if not, each prompt has pages of its own.
    """

    def __init__(self, num_pages: int, page_tokens: int, *, shares_prompts: bool = True) -> None:
        assert num_pages > 0
        assert page_tokens > 0
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._shares_prompts = shares_prompts
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # free, nothing known in them
        self._idle: dict[int, None] = {}  # free, with content; least recently released first
        self._idle_states: dict[int, None] = {}  # those of them that keep a state; likewise
        self._root = Content(-1, ())
        self._contents: dict[int, Content] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._blank) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` positions need."""
        return -(-tokens // self.page_tokens)

    def pages_to_share(self, tokens: tuple[int, ...]) -> int:
        """Free pages that `share` of this prompt takes: all but those that somebody holds."""
        held = sum(self._holders[content.page] > 0 for content in self._known(tokens))
        return self.pages_for(len(tokens)) - held

    def share(self, tokens: tuple[int, ...]) -> PageTable:
        """A table for a prompt, with the pages that are known; the caller has asked `pages_to_share`."""
        contents = self._known(tokens)
        for content in contents:
            self._hold(content.page)
        for first in range(len(contents) * self.page_tokens, len(tokens), self.page_tokens):
            parent = contents[-1] if contents else self._root
            part = tokens[first : first + self.page_tokens]
            content = Content(self._take(), part, parent)
            if self._shares_prompts:
                parent.children[part] = self._contents[content.page] = content
            contents.append(content)
        pages = tuple(content.page for content in contents)
        return PageTable(0, len(tokens), pages, self.page_tokens, tuple(contents))

    def allocate(self, start: int, capacity: int) -> PageTable:
        """A table of fresh pages for `capacity` positions from `start`; the caller knows that so many are free."""
        pages = tuple(self._take() for _ in range(self.pages_for(capacity)))
        return PageTable(start, capacity, pages, self.page_tokens)

    def release(self, table: PageTable) -> None:
        """The table's holder leaves. Its last pages come first, so that a page is reallocated before its parents."""
        for page in reversed(table.pages):
            assert self._holders[page] > 0, "released twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._retire(page)

    def discard(self, table: PageTable) -> None:
        """A prompt's table turned out to be broken: nothing that begins like it is found again."""
        first = table.contents[0]
        found = [first] if self._contents.get(first.page) is first else []
        for content in found:
            found += content.children.values()
        for content in reversed(found):
            if content.page in self._idle:
                self._blank.append(content.page)
            self._forget(content.page)

    def _known(self, tokens: tuple[int, ...]) -> list[Content]:
        """The contents of the longest beginning of a prompt that pages hold."""
        found: list[Content] = []
        node: Content | None = self._root
        for first in range(0, len(tokens), self.page_tokens):
            assert node is not None
            node = node.children.get(tokens[first : first + self.page_tokens])
            if node is None:
                break
            found.append(node)
        return found

    def _take(self) -> int:
        """A free page: one that holds nothing, or else the one released longest ago."""
        assert self.num_free > 0, "pages handed out that are not there"
        page = self._blank.pop() if self._blank else self._forget(next(iter(self._idle)))
        self._holders[page] = 1
        return page

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)
        self._idle_states.pop(page, None)

    def _retire(self, page: int) -> None:
        """Nobody holds the page now: it is blank, or idle if its content is worth keeping."""
        content = self._contents.get(page)
        if content is None or not any(content.written):
            self._blank.append(page if content is None else self._forget(page))
            return
        self._idle[page] = None
        if any(state is not None for state in content.states):
            self._idle_states[page] = None
            if len(self._idle_states) > IDLE_STATES:
                oldest = next(iter(self._idle_states))
                del self._idle_states[oldest]
                self._contents[oldest].states = [None, None]

    def _forget(self, page: int) -> int:
        """Drop what a page holds from the index; the page."""
        content = self._contents.pop(page)
        assert content.parent is not None
        assert not content.children, "a page is reallocated before its children"
        del content.parent.children[content.tokens]
        self._idle.pop(page, None)
        self._idle_states.pop(page, None)
        return page

    def check_integrity(self, held: Iterable[PageTable]) -> None:
        """Counts equal the holders given, all of them; every page is blank, idle or held; the index is exact."""
        tables = list(held)
        assert Counter(page for table in tables for page in table.pages) == Counter(
            {page: count for page, count in enumerate(self._holders) if count}
        ), "a page is held by nobody known, or not held by its holder"
        free = [*self._blank, *self._idle]
        assert sorted(free) == [page for page, count in enumerate(self._holders) if not count], "a page is lost"
        assert self._idle.keys() <= self._contents.keys(), "an idle page holds nothing"
        assert self._contents.keys().isdisjoint(self._blank), "a blank page holds something"
        assert self._idle_states.keys() <= self._idle.keys()
        for table in tables:
            if table.contents:
                assert tuple(content.page for content in table.contents) == table.pages
            else:
                assert all(self._holders[page] == 1 for page in table.pages), "a sequence's page has two holders"
                assert self._contents.keys().isdisjoint(table.pages), "a sequence's page is found as a prompt's"
        self._check_index()

    def _check_index(self) -> None:
        """Every content is found by exactly its tokens, and no model skipped a position."""
        for page, content in self._contents.items():
            assert content.page == page
            parent = content.parent
            assert parent is not None
            assert parent.children[content.tokens] is content, "a content is not found by its tokens"
            assert parent is self._root or self._contents[parent.page] is parent, "a content without its parent"
            assert not content.children or len(content.tokens) == self.page_tokens
            assert all(0 <= written <= len(content.tokens) for written in content.written)
            if parent is not self._root:
                assert self._holders[parent.page] >= self._holders[page], "a page is held without its parent"
                full = [written == len(parent.tokens) for written in parent.written]
                assert all(f or not w for f, w in zip(full, content.written, strict=True)), "a position was skipped"
