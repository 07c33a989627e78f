"""The paged kernel's bookkeeping, on a stand-in for torch's CUDA kernel that answers as its documentation says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_static_step import MIXED, engine_of, llama, run, told  # noqa: F401

from lda_service.engine.paged_attention import (
    Kind,
    Lane,
    Layout,
    PagedBatch,
    PagedKernel,
    check_kernel,
    find_kernel,
    reference,
)
from lda_service.engine.static_decoder import StaticDecoder

CPU = torch.device("cpu")
KIND = Kind(torch.float32, 4, 2, 8)
LAYOUTS = {KIND: (Layout.HEADS_FIRST, Layout.HEADS_FIRST)}


def stand_in(single=Layout.HEADS_FIRST, many=Layout.HEADS_FIRST, error=0.0):
    """A kernel with the signature of `varlen_attn`, +inf for nothing seen, and a chosen layout."""

    def call(query, keys, values, bounds, _, max_q, max_k, *, return_aux, scale, enable_gqa, **rest):
        lengths, table = rest.pop("seqused_k"), rest.pop("block_table")
        assert rest == {"num_splits": 1}
        assert return_aux.lse
        assert enable_gqa == (query.shape[1] != keys.shape[2])
        assert {bounds.dtype, lengths.dtype, table.dtype} == {torch.int32}
        assert int(bounds.diff().max()) <= max_q
        assert int(lengths.max()) <= max_k
        page = keys.shape[1]
        out, lse = reference(query, keys.flatten(0, 1), values.flatten(0, 1), bounds, lengths, table, page, scale)
        lse = torch.where(lse == -torch.inf, torch.inf, lse) + error
        layout = single if max_q == 1 else many
        if layout is Layout.HEADS_FIRST:
            lse = lse.transpose(0, 1).contiguous()
        elif layout is Layout.PACKED:
            groups = lse.view(len(query), keys.shape[2], -1).transpose(0, 1).contiguous()
            lse = groups.view(query.shape[1], len(query))
        return out.nan_to_num().to(query.dtype), lse

    return call


@pytest.mark.parametrize("single", Layout)
@pytest.mark.parametrize("many", Layout)
def test_the_check_finds_the_layouts(single, many):
    """Whatever the layout of the log-sum-exp, with one query for each sequence and with more."""
    kind = KIND._replace(dtype=torch.bfloat16)
    assert check_kernel(stand_in(single, many), CPU, 256, kind) == (single, many)


@pytest.mark.parametrize(("kernel", "page"), [(stand_in(error=0.3), 256), (stand_in(), 16)])
def test_the_check_refuses(kernel, page):
    """Wrong answers, and pages that the kernel cannot have."""
    with pytest.raises(ValueError, match=r"other answers|multiple of 256"):
        check_kernel(kernel, CPU, page, KIND)


def test_no_kernel_on_a_cpu():
    """Nor a warning: rows gather their context there, as ever."""
    assert find_kernel(CPU, 256, {KIND}) is None


def test_a_layer_that_was_not_checked_is_not_taken():
    """Another type, other heads, or values unlike the keys: such layers gather their context."""
    kernel = PagedKernel(stand_in(), 4, LAYOUTS)
    query, key = torch.zeros(3, 4, 1, 8), torch.zeros(3, 2, 1, 8)
    assert kernel.takes(query, key, key)
    assert not kernel.takes(query.bfloat16(), key, key)
    assert not kernel.takes(query, key[:, :1], key[:, :1])
    assert not kernel.takes(query, key, key[..., :4])


lanes = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(groups=lanes, spare=st.integers(1, 3))
def test_any_rows_attend_to_their_prompt_and_their_own_pages(groups, spare):
    """Rows of any prompts and lengths equal plain attention over their positions in order; spare rows are finite."""
    page, pages = 4, iter(range(1000))
    taken = [
        (tuple(next(pages) for _ in range(-(-prompt // page))), prompt, own,
         tuple(next(pages) for _ in range(-(-own // page))))
        for prompt, owns in groups for own in owns[:1]
    ]  # fmt: skip
    rows = [
        (first[0], prompt, own, tuple(next(pages) for _ in range(-(-own // page))))
        for first, (prompt, owns) in zip(taken, groups, strict=True)
        for own in owns
    ]
    scratch, count = next(pages), len(rows) + spare
    query, keys, values = (
        torch.randn(n, h, 8) for n, h in ((count, 4), ((scratch + 1) * page, 2), ((scratch + 1) * page, 2))
    )
    positions = torch.zeros(count, 1, dtype=torch.int64)
    batch = PagedBatch(PagedKernel(stand_in(), page, LAYOUTS), count, 18, scratch, positions)
    batch.load([Lane(prompt_pages, prompt, own_pages) for prompt_pages, prompt, _, own_pages in rows])
    positions[: len(rows), 0] = torch.tensor([prompt + own - 1 for _, prompt, own, _ in rows], dtype=torch.int64)
    out = batch.attend(query, keys, values, 0.3)
    assert out.isfinite().all()
    for i, (prompt_pages, prompt, own, own_pages) in enumerate(rows):
        slots = [prompt_pages[p // page] * page + p % page for p in range(prompt)]
        slots += [own_pages[p // page] * page + p % page for p in range(own)]
        k, v = (x[slots].repeat_interleave(2, 1) for x in (keys, values))
        weights = (torch.einsum("hd,khd->hk", query[i], k) * 0.3).softmax(1)
        torch.testing.assert_close(out[i], torch.einsum("hk,khd->hd", weights, v), rtol=1e-4, atol=1e-5)


def test_an_engine_on_the_paged_kernel_draws_the_same_tokens(llama):  # noqa: F811
    """Whole requests through block tables, log-sum-exps and scratch pages."""
    engine = engine_of(llama, page_tokens=4)
    called = []
    kernel = stand_in()
    engine._static = StaticDecoder(
        engine.models,
        engine.sampler,
        PagedKernel(lambda *a, **k: (called.append(1), kernel(*a, **k))[1], 4, LAYOUTS),
    )
    assert told(run(engine, *MIXED)) == told(run(engine_of(llama, "off"), *MIXED))
    assert called
