"""Does this engine decode this model rightly? Asked once for each model at load, answered by the model itself.

Some architectures offer the attention seam but keep more state than keys and values (convolutions, recurrences), or
pass attention something that `attend` does not know. Decoding them through the cache would give plausible nonsense, so
a few tokens are run both ways: in chunks and one by one through the cache, and whole through transformers' own
attention. Knows one model; nothing of pairs or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine import attention
from lda_service.engine.pages import PagePool
from lda_service.engine.runner import ModelRunner, SlotMap
from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT_TOKENS = 8
CHUNK_TOKENS = 5
NEW_TOKENS = 4
TOLERANCE = {torch.float32: 0.01}
TOLERANCE_16_BITS = 0.3


@torch.inference_mode()
def decodes_rightly(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether logits through the cache equal those of one plain pass, up to rounding.

    The error is the RMS difference over the logits' own spread: rounding costs 1e-6 of it in float32 and about a
    hundredth in 16 bits, lost state about 1.

    Args:
        model: on its device, with `attention.NAME` in force; left as it was.
        vocabulary: rows of its output layer.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (PROMPT_TOKENS + NEW_TOKENS,), generator=generator).tolist()
    cached, plain = _through_cache(model, ids, vocabulary), _whole(model, ids, vocabulary)
    error = (cached - plain).square().mean().sqrt() / plain.std()
    return bool(error < TOLERANCE.get(model.dtype, TOLERANCE_16_BITS))


def _through_cache(model: PreTrainedModel, ids: list[int], vocabulary: int) -> Tensor:
    """Logits after each of the last tokens: the prompt in two chunks, the rest one by one."""
    total = len(ids)
    pool = PagePool(total, 4)
    runner, slot_map = ModelRunner(model, total * 4, vocabulary), SlotMap(1, total, model.device)
    job = Job(None, tuple(ids[:PROMPT_TOKENS]), table=pool.allocate(0, PROMPT_TOKENS))  # type: ignore[arg-type]
    runner.prefill(PrefillChunk(job, 0, CHUNK_TOKENS), 1)
    rows = [runner.prefill(PrefillChunk(job, CHUNK_TOKENS, PROMPT_TOKENS), 1)]
    table = pool.allocate(PROMPT_TOKENS, NEW_TOKENS)
    slot_map.assign(0, job.table, table)  # type: ignore[arg-type]
    sequence = Sequence(job, None, 0, NEW_TOKENS, row=0, table=table)  # type: ignore[arg-type]
    for token in ids[PROMPT_TOKENS:]:
        sequence.tokens.append(token)
        rows.append(runner.decode([sequence], slot_map))
    return torch.cat(rows)


def _whole(model: PreTrainedModel, ids: list[int], vocabulary: int) -> Tensor:
    """Logits at the same positions from one pass of transformers' own attention, without a cache."""
    model.set_attn_implementation("eager")
    try:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    finally:
        model.set_attn_implementation(attention.NAME)
    kept: Tensor = logits[0, PROMPT_TOKENS - 1 :, :vocabulary].float()
    return kept
