"""The one attention function, registered with transformers under the name "lda".

Keys and values go to and come from the `CacheView` that the runner passes through the model as the keyword `kv`. Causal
masks are made from absolute positions, so that transformers builds none. Rows that share a prompt read its keys and
values once: attention over the prompt and over a row's own positions are merged by their log-sum-exp, where that pays.
On a CPU the native kernels do all of it, on CUDA a paged kernel what it can. Knows layers, windows, soft caps and sinks
as transformers names them; nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lda_service.engine.native import MAX_HEAD_DIM

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lda_service.engine.kv_cache import CacheView, Group

NAME = "lda"
# Below these, gathering every row's whole context costs less than two passes and a merge.
SHARED_ROWS = 4
SHARED_POSITIONS = 64


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv: CacheView,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of new positions over everything their rows have seen.

    Args:
        module: the attention layer; its `layer_idx` names the cache layer.
        query: shape (rows, heads, queries, head_dim).
        key: shape (rows, kv_heads, queries, head_dim); positions are already encoded in it.
        value: likewise.
        attention_mask: None; transformers builds no mask for this implementation.
        kv: cache, slots and positions of this pass.
        scaling: factor on the scores; 1 / sqrt(head_dim) if None.
        sliding_window: positions seen including the query's own; all if None.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: one attention sink per head.

    Returns:
        shape (rows, queries, heads, head_dim), and None for the weights.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv.kernels is not None and key.shape == value.shape and key.shape[-1] <= MAX_HEAD_DIM:
        cache = kv.cache.layer(layer, key, value)
        sinks = None if s_aux is None else s_aux.float().contiguous()
        out = kv.kernels.attend(
            kv.inputs.layout,
            _by_heads(query),
            _by_heads(key),
            _by_heads(value),
            cache,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
        return out.to(query.dtype), None
    kv.store(layer, key, value)
    is_plain = sliding_window is None and softcap is None and s_aux is None
    if kv.paged is not None and is_plain and kv.paged.kernel.takes(query, key, value):
        keys, values = kv.tensors(layer)
        return kv.paged.attend(query[:, :, 0], keys, values, scale)[:, None], None
    settings = _Settings(layer, scale, sliding_window, softcap, s_aux)
    return _attend(settings, query, kv).transpose(1, 2), None


def _by_heads(x: Tensor) -> Tensor:
    """Float32 with the last dimension dense, as the kernels read it."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


class _Settings:
    """What a layer's attention is like."""

    def __init__(
        self, layer: int, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> None:
        self.layer, self.scale, self.window, self.softcap, self.sinks = layer, scale, window, softcap, sinks


def _attend(settings: _Settings, query: Tensor, kv: CacheView) -> Tensor:
    """Torch's operators; shape (rows, heads, queries, head_dim)."""
    groups = kv.inputs.groups
    if any(g.stop - g.start >= SHARED_ROWS and g.prefix >= SHARED_POSITIONS for g in groups):
        return torch.cat([_attend_group(settings, query[g.start : g.stop], kv, g) for g in groups])
    keys, values = kv.load(settings.layer, kv.inputs.context_slots, query.dtype)
    mask = kv.inputs.mask(settings.window)
    if settings.softcap is None and settings.sinks is None:
        grouped = keys.shape[1] != query.shape[1]
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=settings.scale, enable_gqa=grouped
        )
    return _merge(settings, [_partial(settings, query, keys, values, mask)], query)


def _attend_group(settings: _Settings, query: Tensor, kv: CacheView, group: Group) -> Tensor:
    """Rows that share a prefix: the prefix's keys and values are read once for all of them."""
    slots, rows = kv.inputs.context_slots, slice(group.start, group.stop)
    own = kv.load(settings.layer, slots[rows, group.prefix :], query.dtype)
    parts = [_partial(settings, query, *own, kv.inputs.mask(settings.window, group.prefix)[rows])]
    if group.prefix:
        shared = kv.load(settings.layer, slots[group.start : group.start + 1, : group.prefix], query.dtype)
        mask = kv.inputs.mask(settings.window)[rows, ..., : group.prefix]
        # One row with all queries of the group: (1, heads, rows * queries, head_dim).
        as_one = query.transpose(0, 1).flatten(1, 2)[None]
        out, lse = _partial(settings, as_one, *shared, mask.transpose(0, 1).flatten(1, 2)[None])
        shape = (query.shape[1], len(query), query.shape[2])
        parts.append((out.view(*shape, -1).transpose(0, 1), lse.view(shape).transpose(0, 1)))
    return _merge(settings, parts, query)


def _partial(settings: _Settings, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a part of the context, and its log-sum-exp of shape (rows, heads, queries); float32.

    A query that sees nothing of this part gets the log-sum-exp -inf and a finite output.
    """
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (keys, values))
    scores = (query @ keys.transpose(-1, -2)).float() * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    return (weights.to(values.dtype) @ values).float(), lse


def _merge(settings: _Settings, parts: list[tuple[Tensor, Tensor]], query: Tensor) -> Tensor:
    """Parts of one attention, weighted by their share of the softmax's sum; a sink has a share and no output."""
    shares = [lse for _, lse in parts]
    if settings.sinks is not None:
        shares.append(settings.sinks.float().view(1, -1, 1).expand_as(shares[0]))
    total = torch.stack(shares).logsumexp(0)
    outs = [out * (lse - total).exp()[..., None] for out, lse in parts]
    return sum(outs[1:], outs[0]).to(query.dtype)


AttentionInterface.register(NAME, attend)
