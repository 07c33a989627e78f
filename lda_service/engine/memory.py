"""How many positions the KV caches may hold, when nobody said. Knows configurations and free memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lda_service.engine.fallback import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lda_service.config import EngineConfig
    from lda_service.engine.pair import Pair

ROW_TOKENS = 2048
MEMORY_SHARE = 0.4
CPU_PAGE_TOKENS = 16
CUDA_PAGE_TOKENS = 256


def default_cache_tokens(pair: Pair, config: EngineConfig) -> int:
    """Every row's context up to `ROW_TOKENS`, as far as `MEMORY_SHARE` of the free memory goes.

    Models that run on transformers' own caches take none of these positions.
    """
    wanted = config.max_running_sequences * min(pair.info.context_tokens, ROW_TOKENS)
    models = zip((pair.after, pair.before), pair.decoding, strict=True)
    native = [token_bytes(model, pair.backend.cache_dtype) for model, how in models if how is Decoding.NATIVE]
    per_token = max(1, sum(native))
    affordable = int(free_bytes(pair.after.device) * MEMORY_SHARE) // per_token
    return max(page_tokens(config, pair.after.device), min(wanted, affordable))


def page_tokens(config: EngineConfig, device: torch.device) -> int:
    """Positions of a page, when nobody said."""
    return config.page_tokens or (CUDA_PAGE_TOKENS if device.type == "cuda" else CPU_PAGE_TOKENS)


def token_bytes(model: PreTrainedModel, cache_dtype: torch.dtype | None) -> int:
    """Bytes of keys and values of one position, stored in `cache_dtype` or the model's own type."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * (cache_dtype or model.dtype).itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
