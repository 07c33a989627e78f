"""The one attention function, registered with transformers under the name "lda".

Keys and values go to and come from the `CacheView` that the runner passes through the model as the keyword `kv`. Causal
masks are made here from absolute positions, so that transformers builds none. Knows layers, windows, soft caps and
sinks as transformers names them; nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lda_service.engine.kv_cache import CacheView

NAME = "lda"


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
    kv.store(layer, key, value)
    keys, values = kv.load(layer)
    mask = kv.mask(sliding_window)
    if softcap is None and s_aux is None:
        grouped = keys.shape[1] != query.shape[1]
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    else:
        out = _explicit(query, keys, values, mask, scaling, softcap, s_aux)
    return out.transpose(1, 2), None


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention step by step, for what the fused kernel cannot do."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return weights.to(values.dtype) @ values


AttentionInterface.register(NAME, attend)
