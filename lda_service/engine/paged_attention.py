"""Attention of one query per row by torch's paged CUDA kernel, `torch.nn.attention.varlen.varlen_attn`.

A row's context is two block tables: its prompt's, which starts at position 0 and is one for all rows of a prompt, and
its own, which starts on a fresh page. So a step is two calls of fixed shape, over the prompts (one sequence per group
of rows) and over the rows' own pages, merged by their log-sum-exp. What the kernel can do on this machine is found out
by a check at start-up: documentation and code disagree about its pages and about the layout of its log-sum-exp. Knows
tensors and page numbers; nothing of models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)
PAGE_MULTIPLE = 256
TOLERANCE = 0.02


class Layout(Enum):
    """How a kernel lays out its log-sum-exp; `PACKED` is (kv_heads, queries, heads of one kv_head), flat."""

    HEADS_FIRST = "(heads, queries)"
    QUERIES_FIRST = "(queries, heads)"
    PACKED = "(kv_heads, queries, heads / kv_heads)"

    def by_query(self, lse: Tensor, queries: int, heads: int, kv_heads: int) -> Tensor:
        """The same numbers in shape (queries, heads)."""
        if self is Layout.HEADS_FIRST:
            return lse.reshape(heads, queries).transpose(0, 1)
        if self is Layout.QUERIES_FIRST:
            return lse.reshape(queries, heads)
        return lse.reshape(kv_heads, queries, heads // kv_heads).transpose(0, 1).reshape(queries, heads)


class Kind(NamedTuple):
    """What a layer's attention is like, as far as a kernel may care."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class PagedKernel:
    """A kernel that passed the check.

    Attributes:
        call: `varlen_attn`, or what takes its place.
        page_tokens: positions of a page.
        layouts: what it passed the check for, and how it lays out its log-sum-exp there: where each sequence has one
            query (the kernel has a path of its own for that), and where one has more.
    """

    call: Callable[..., Any]
    page_tokens: int
    layouts: Mapping[Kind, tuple[Layout, Layout]]

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether it was found right for such a layer; all of shape (rows, heads or kv_heads, queries, head_dim)."""
        kind = Kind(query.dtype, query.shape[1], key.shape[1], query.shape[3])
        return kind in self.layouts and key.shape == value.shape

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        bounds: Tensor,
        lengths: Tensor,
        table: Tensor,
        *,
        max_queries: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Each sequence's queries over the first `lengths` positions of its pages, all of them seen by all queries.

        One split always: what a row gets then depends on no other row.

        Args:
            query: shape (queries, heads, head_dim).
            keys: shape (slots, kv_heads, head_dim); slots are whole pages.
            values: likewise.
            bounds: int32, shape (sequences + 1,): where each sequence's queries begin and end.
            lengths: int32, shape (sequences,).
            table: int32, shape (sequences, pages).
            max_queries: of one sequence.
            scale: on the scores.

        Returns:
            shape (queries, heads, head_dim), float32; its log-sum-exp, shape (queries, heads), -inf over nothing.
        """
        from torch.nn.attention.varlen import AuxRequest

        pages = [x.view(-1, self.page_tokens, *x.shape[1:]) for x in (keys, values)]
        out, lse = self.call(
            query, *pages, bounds, None, max_queries, table.shape[1] * self.page_tokens,
            return_aux=AuxRequest(lse=True), scale=scale, enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=lengths, block_table=table, num_splits=1,
        )  # fmt: skip
        single, many = self.layouts[Kind(query.dtype, query.shape[1], keys.shape[1], query.shape[2])]
        layout = single if max_queries == 1 else many
        lse = layout.by_query(lse, len(query), query.shape[1], keys.shape[1])
        # The kernel says +inf where it saw no key.
        return out.float(), torch.where(lse == torch.inf, -torch.inf, lse)


class Lane(NamedTuple):
    """A row's pages: those of its prompt, the positions in these, and its own."""

    prompt_pages: tuple[int, ...]
    prompt_tokens: int
    own_pages: tuple[int, ...]


class PagedBatch:
    """The block tables of a step of fixed shape.

    Args:
        kernel: that computes.
        rows: queries of a step.
        context: positions of the longest row.
        scratch_page: where rows that stand for nobody read.
        positions: int64, shape (rows, 1): of the queries; read at every step.
    """

    def __init__(self, kernel: PagedKernel, rows: int, context: int, scratch_page: int, positions: Tensor) -> None:
        self.kernel, self.rows, self.scratch_page, self.positions = kernel, rows, scratch_page, positions
        pages = -(-context // kernel.page_tokens)
        device = positions.device
        self.own_table, self.prompt_table = (
            torch.full((rows, pages), scratch_page, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.own_start, self.prompt_lengths = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.each = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.groups = self.each.clone()

    def load(self, lanes: Sequence[Lane]) -> None:
        """Point the first rows at these pages; lanes with the same prompt stand together, the rest is for nobody."""
        starts = [i for i, lane in enumerate(lanes) if i == 0 or lane.prompt_pages != lanes[i - 1].prompt_pages]
        # Rows for nobody are a group with no positions, and the groups behind it have no rows.
        bounds = [*starts, len(lanes)]
        bounds += [self.rows] * (self.rows + 1 - len(bounds))
        width = self.own_table.shape[1]
        fill = [self.scratch_page]
        own = [list(lane.own_pages[:width]) for lane in lanes]
        prompts = [list(lanes[i].prompt_pages[:width]) for i in starts]
        for target, tables in ((self.own_table, own), (self.prompt_table, prompts)):
            padded = [table + fill * (width - len(table)) for table in tables]
            _copy(target, padded + [fill * width] * (self.rows - len(padded)))
        _copy(self.own_start, _pad([lane.prompt_tokens for lane in lanes], self.rows))
        _copy(self.prompt_lengths, _pad([lanes[i].prompt_tokens for i in starts], self.rows))
        _copy(self.groups, bounds[: self.rows + 1])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of one query per row, shape (rows, heads, head_dim); keys and values as `PagedKernel` says."""
        own_lengths = self.positions[:, 0].int() + 1 - self.own_start
        parts = [
            self.kernel(query, keys, values, self.each, own_lengths, self.own_table, max_queries=1, scale=scale),
            self.kernel(
                query, keys, values, self.groups, self.prompt_lengths, self.prompt_table,
                max_queries=self.rows, scale=scale,
            ),
        ]  # fmt: skip
        total = torch.logaddexp(parts[0][1], parts[1][1])
        shares = [(lse - total).exp()[..., None] for _, lse in parts]
        return (parts[0][0] * shares[0] + parts[1][0] * shares[1]).to(query.dtype)


def _copy(target: Tensor, values: list[Any]) -> None:
    target.copy_(torch.tensor(values, dtype=target.dtype))


def _pad(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


def find_kernel(device: torch.device, page_tokens: int, kinds: set[Kind]) -> PagedKernel | None:
    """The kernel, for those kinds of layers for which it is right on this machine; the log says where it is not."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        logger.warning("no paged attention, rows gather their context instead: %s", error)
        return None
    layouts = {}
    for kind in sorted(kinds, key=str):
        try:
            layouts[kind] = check_kernel(varlen_attn, device, page_tokens, kind)
        except Exception as error:  # what an unsupported kernel raises is its own choice
            logger.warning("no paged attention for %s, rows gather their context instead: %s", kind, error)
    return PagedKernel(varlen_attn, page_tokens, layouts) if layouts else None


def check_kernel(call: Callable[..., Any], device: torch.device, page_tokens: int, kind: Kind) -> tuple[Layout, Layout]:
    """Run the kernel on rows with known answers, one query each and in groups; says in which layouts it answers.

    Raises:
        ValueError: it answers wrongly, in either layout, or its pages cannot have this size.
    """
    if page_tokens % PAGE_MULTIPLE:
        raise ValueError(f"a page has {page_tokens} positions, not a multiple of {PAGE_MULTIPLE}")
    dtype, heads, kv_heads, head_dim = kind
    rows = heads + 1  # unlike the heads, so that the layout shows
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, head_dim, generator=generator).to(device, dtype)
    keys, values = (
        torch.randn(4 * page_tokens, kv_heads, head_dim, generator=generator).to(device, dtype) for _ in range(2)
    )
    tensors = query, keys, values
    # The last row sees nothing, as rows that stand for nobody do.
    lengths = [page_tokens + 7, 5, 2 * page_tokens] + [9] * (rows - 3)
    single = _layout(call, page_tokens, kind, tensors, list(range(rows + 1)), [*lengths[:-1], 0], 1)
    many = _layout(call, page_tokens, kind, tensors, [0, 1, rows - 1, rows, rows], [page_tokens + 7, 5, 0, 0], rows)
    return single, many


def _layout(
    call: Callable[..., Any],
    page_tokens: int,
    kind: Kind,
    tensors: tuple[Tensor, Tensor, Tensor],
    bounds: list[int],
    lengths: list[int],
    max_queries: int,
) -> Layout:
    """In which layout the kernel gives the right answers."""
    pages = [[3, 1] if i % 2 else [2, 0] for i in range(len(lengths))]
    bound, length, table = (
        torch.tensor(x, dtype=torch.int32, device=tensors[0].device) for x in (bounds, lengths, pages)
    )
    scale = tensors[0].shape[2] ** -0.5
    wanted = reference(*tensors, bound, length, table, page_tokens, scale)
    for layout in Layout:
        kernel = PagedKernel(call, page_tokens, {kind: (layout, layout)})
        got = kernel(*tensors, bound, length, table, max_queries=max_queries, scale=scale)
        if all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(got, wanted, strict=True)):
            return layout
    raise ValueError("torch's paged attention gives other answers than plain attention")


def reference(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, lengths: Tensor, table: Tensor, page: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What `PagedKernel` returns, one sequence after the other, in float32."""
    outs, lses = [], []
    heads_per_kv = query.shape[1] // keys.shape[1]
    for i, length in enumerate(lengths.tolist()):
        slots = (table[i, :, None] * page + torch.arange(page, device=table.device)).flatten()[:length].long()
        k, v = (x[slots].float().repeat_interleave(heads_per_kv, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->qhk", query[int(bounds[i]) : int(bounds[i + 1])].float(), k) * scale
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs), torch.cat(lses)
