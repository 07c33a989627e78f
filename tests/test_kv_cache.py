"""The cache gives every row its own past back, in order, whatever the others do with the slots around it."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lda_service.engine.attention import attend
from lda_service.engine.kv_cache import CacheView, Group, KVCache, PassInputs
from lda_service.engine.pages import PagePool
from lda_service.engine.runner import SlotMap

HEADS = 2


class Layer(torch.nn.Module):
    """All that attention asks of a layer."""

    layer_idx = 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 7)), min_size=1, max_size=4),
    new=st.integers(1, 70),
    page_tokens=st.integers(1, 5),
    width=st.sampled_from([4, 16, 24]),
    window=st.one_of(st.none(), st.integers(1, 90)),
    softcap=st.one_of(st.none(), st.just(5.0)),
    has_sinks=st.booleans(),
    seed=st.integers(0, 100),
)
def test_paged_attention_equals_plain_attention(
    kernels, prompts, new, page_tokens, width, window, softcap, has_sinks, seed
):
    """Prompts prefilled one by one, then all rows decoded together, some of them sharing a prompt: each row's output
    equals plain causal attention, with windows, soft caps and sinks.
    """
    generator = torch.Generator().manual_seed(seed)
    pool, cache = PagePool(3000, page_tokens), KVCache(3000 * page_tokens)
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "s_aux": torch.randn(2 * HEADS, generator=generator) if has_sinks else None,
    }
    rows, groups, wholes = [], [], []
    slot_map = SlotMap(28, 150, torch.device("cpu"))
    for length, count in prompts:
        prompt = torch.randn(3, 2 * HEADS, length, width, generator=generator)
        table = pool.allocate(0, length)
        positions = torch.arange(length)[None]
        slots = torch.tensor(table.slots(0, length))[None]
        inputs = PassInputs(
            positions, positions, slots, torch.zeros(1, dtype=torch.int64), length, (Group(0, 1, 0),), is_prefill=True
        )
        out = run(prompt[None], CacheView(cache, inputs, kernels), options)
        for position in looked_at(length):
            torch.testing.assert_close(out[0, position], plain(prompt, position, options), atol=1e-4, rtol=1e-4)
        groups.append(Group(len(rows), len(rows) + count, length))
        for _ in range(count):
            slot_map.assign(len(rows), table, pool.allocate(length, new))
            rows.append(length)
            wholes.append(torch.cat([prompt, torch.randn(3, 2 * HEADS, new, width, generator=generator)], 2))
    for step in range(new):
        positions = torch.tensor([[length + step] for length in rows])
        context = int(positions.max()) + 1
        inputs = PassInputs(positions, positions, slot_map.slots, torch.arange(len(rows)), context, tuple(groups))
        here = torch.stack([whole[:, :, p : p + 1] for whole, p in zip(wholes, positions[:, 0].tolist(), strict=True)])
        out = run(here, CacheView(cache, inputs, kernels), options)
        if step in looked_at(new):
            for row, length in enumerate(rows):
                wanted = plain(wholes[row], length + step, options)
                torch.testing.assert_close(out[row, 0], wanted, atol=1e-4, rtol=1e-4)


def looked_at(count):
    """All of a few, some of many."""
    return set(range(count)) if count <= 9 else {0, 1, count // 2, count - 2, count - 1}


def run(tensors, view, options):
    """Attention of (rows, 3, heads, queries, width)."""
    query, key, value = tensors.unbind(1)
    out, _ = attend(Layer(), query, key[:, :HEADS], value[:, :HEADS], None, kv=view, **options)
    return out


def plain(tensors, position, options):
    """Attention of one position, head by head."""
    query, key, value = tensors
    window, softcap, sinks = options["sliding_window"], options["softcap"], options["s_aux"]
    first = 0 if window is None else max(0, position - window + 1)
    outputs = []
    for head in range(2 * HEADS):
        shared = head // 2
        scores = key[shared, first : position + 1] @ query[head, position] / query.shape[-1] ** 0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1]])
        outputs.append(scores.softmax(0)[: position + 1 - first] @ value[shared, first : position + 1])
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
