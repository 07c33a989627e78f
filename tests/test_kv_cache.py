"""The cache gives every row its own past back, in order, whatever the others do with the slots around it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lda_service.engine.attention import attend
from lda_service.engine.kv_cache import CacheView, KVCache
from lda_service.engine.pages import PagePool
from lda_service.engine.runner import SlotMap

HEADS, WIDTH = 2, 4


class Layer(torch.nn.Module):
    """All that attention asks of a layer."""

    layer_idx = 0


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    new=st.integers(1, 6),
    page_tokens=st.integers(1, 5),
    window=st.one_of(st.none(), st.integers(1, 6)),
    softcap=st.one_of(st.none(), st.just(5.0)),
    seed=st.integers(0, 100),
)
def test_paged_attention_equals_plain_attention(prompts, new, page_tokens, window, softcap, seed):
    """Prompts prefilled one by one, then all rows decoded together: each row's output equals plain causal attention."""
    generator = torch.Generator().manual_seed(seed)
    pool, cache = PagePool(100, page_tokens), KVCache(100 * page_tokens)
    slot_map = SlotMap(len(prompts), 20, torch.device("cpu"))
    whole = [torch.randn(3, 2 * HEADS, length + new, WIDTH, generator=generator) for length in prompts]
    for row, length in enumerate(prompts):
        tables = pool.allocate(0, length), pool.allocate(length, new)
        slot_map.assign(row, *tables)
        slots = torch.tensor(tables[0].slots(0, length))
        view = CacheView(cache, slots, slots[None], torch.arange(length)[None])
        run(whole[row], view, 0, length, window, softcap)
    for step in range(new):
        positions = torch.tensor([[length + step] for length in prompts])
        context = slot_map.slots[:, : int(positions.max()) + 1]
        view = CacheView(cache, context.gather(1, positions)[:, 0], context, positions)
        query, key, value = (
            torch.stack([x[i][:, p : p + 1] for x, p in zip(whole, positions[:, 0].tolist(), strict=True)])
            for i in range(3)
        )
        out, _ = attend(
            Layer(), query, key[:, :HEADS], value[:, :HEADS], None, kv=view, sliding_window=window, softcap=softcap
        )
        for row, length in enumerate(prompts):
            wanted = plain(whole[row], length + step, window, softcap)
            torch.testing.assert_close(out[row, 0], wanted, atol=1e-4, rtol=1e-4)


def run(tensors, view, start, stop, window, softcap):
    query, key, value = (x[None, :, start:stop] for x in tensors)
    out, _ = attend(
        Layer(), query, key[:, :HEADS], value[:, :HEADS], None, kv=view, sliding_window=window, softcap=softcap
    )
    for position in range(start, stop):
        torch.testing.assert_close(out[0, position], plain(tensors, position, window, softcap), atol=1e-4, rtol=1e-4)


def plain(tensors, position, window, softcap):
    """Attention of one position, head by head."""
    query, key, value = tensors
    first = 0 if window is None else max(0, position - window + 1)
    outputs = []
    for head in range(2 * HEADS):
        shared = head // 2
        scores = key[shared, first : position + 1] @ query[head, position] / WIDTH**0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outputs.append(scores.softmax(0) @ value[shared, first : position + 1])
    return torch.stack(outputs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60), st.integers(1, 8))
def test_pages_are_held_once_and_come_back(actions, page_tokens):
    """Whatever is allocated and released in whatever order: no slot is handed out twice, none is lost."""
    pool, tables = PagePool(20, page_tokens), []
    for take, size in actions:
        if take and pool.pages_for(size) <= pool.num_free:
            tables.append(pool.allocate(size % 7, size))
        elif tables:
            pool.release(tables.pop(size % len(tables)))
        slots = [slot for table in tables for slot in table.slots(table.start, table.start + table.capacity)]
        assert len(set(slots)) == len(slots)
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    assert pool.num_free == 20
