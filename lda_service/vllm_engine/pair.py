"""What is told and known of a pair before, and without, loading its weights: vLLM does that in its own processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lda_service import vocabulary
from lda_service.engine import adapter
from lda_service.engine.detokenizer import TokenPieces
from lda_service.engine.memory import token_bytes
from lda_service.engine.pair import describe, eos_ids, explain, make_info, public_name

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.config import PairConfig
    from lda_service.pair_info import ModelInfo, PairInfo

logger = logging.getLogger(__name__)
Ranges = list[list[int]]


@dataclass(frozen=True, slots=True)
class PairFacts:
    """A pair as the engine's front needs it.

    `after_id` and `before_id` are whose weights are loaded, `adapter_id` what is added to the former's; `tokenizer_id`
    has the after model's tokenizer.
    """

    after_id: str
    before_id: str
    adapter_id: str | None
    tokenizer_id: str
    info: PairInfo
    pieces: TokenPieces
    shared_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    token_bytes: int  # keys and values of one position, both models


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """A pair's vocabulary as its ranks need it.

    `width` is one past the largest shared id; `forbidden` says of each id below whether it may never be drawn.
    """

    width: int
    forbidden: Tensor
    pieces: TokenPieces

    @classmethod
    def read(cls, shared: Ranges, tokenizer_id: str) -> SharedVocabulary:
        """From the ranges of shared ids, and the tokenizer that has their bytes."""
        forbidden = torch.ones(shared[-1][1], dtype=torch.bool)
        for start, stop in shared:
            forbidden[start:stop] = False
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_id, trust_remote_code=False)
        return cls(len(forbidden), forbidden, TokenPieces.from_tokenizer(tokenizer))


@dataclass(frozen=True, slots=True)
class _Side:
    tokenizer: Any
    info: ModelInfo
    eos_ids: tuple[int, ...]
    token_bytes: int


def read_pair(config: PairConfig, max_context_tokens: int | None) -> PairFacts:
    """Compare the two vocabularies, and describe both models from their configurations.

    Raises:
        StartupError: a model is missing or unreadable, or the pair cannot be amplified.
    """
    before = _read_side(config.model_before_id, config.dtype, max_context_tokens)
    lora_config = adapter.find_config(config.model_after_id)
    if lora_config is None:
        after = _read_side(config.model_after_id, config.dtype, max_context_tokens)
        after_id = tokenizer_id = config.model_after_id
    else:
        lora = adapter.read_adapter(config.model_after_id, lora_config)
        adapter.require_base(lora, config.model_before_id)
        after_id, tokenizer_id = config.model_before_id, config.model_before_id
        after = replace(before, info=replace(before.info, model_id=public_name(lora.model_id), revision=lora.revision))
        if adapter.brings_tokenizer(lora.model_id):
            tokenizer_id = lora.model_id
            after = replace(after, tokenizer=AutoTokenizer.from_pretrained(tokenizer_id, trust_remote_code=False))
    before = replace(before, info=replace(before.info, dtype=after.info.dtype))  # vLLM runs both in one type
    sides = [vocabulary.Side(side.tokenizer, side.info.vocab_size, side.eos_ids) for side in (after, before)]
    report, shared = vocabulary.admit(*sides, allow_incompatible=config.allow_incompatible)
    return PairFacts(
        after_id,
        config.model_before_id,
        config.model_after_id if lora_config else None,
        tokenizer_id,
        make_info(after.info, before.info, after.tokenizer, report, ""),
        TokenPieces.from_tokenizer(after.tokenizer),
        shared,
        frozenset(after.eos_ids + before.eos_ids) & frozenset(shared),
        after.token_bytes + before.token_bytes,
    )


def _read_side(model_id: str, dtype: str, max_context_tokens: int | None) -> _Side:
    try:
        config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind)  # type: ignore[no-untyped-call]
    except Exception as error:  # what a broken file makes the readers raise is theirs to choose
        raise explain(model_id, error) from error
    try:
        model.generation_config = GenerationConfig.from_pretrained(model_id)
    except OSError:
        logger.debug("%s has no generation configuration", model_id)
    info = describe(model_id, model, config)
    if max_context_tokens is not None:
        info = replace(info, context_tokens=min(info.context_tokens, max_context_tokens))
    return _Side(tokenizer, info, eos_ids(model, tokenizer), token_bytes(model, None))


def ranges(ids: tuple[int, ...]) -> Ranges:
    """Ascending ids as ranges, each from its first to one past its last."""
    found: Ranges = []
    for i in ids:
        if found and found[-1][1] == i:
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1])
    return found
