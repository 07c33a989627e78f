"""Which way of decoding is right for this model? Asked once for each model at load, answered by the model itself.

Some architectures offer the attention seam but keep more state than keys and values (convolutions, recurrences), or
pass attention something that `attend` does not know. Decoding them through the cache would give plausible nonsense, so
a few tokens are run both ways: in chunks and one by one as the engine would, and whole in one plain pass. The first way
that agrees is taken. Knows one model; nothing of pairs or requests.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lda_service.engine import attention
from lda_service.engine.fallback import Decoding, make_runner
from lda_service.engine.pages import PagePool
from lda_service.engine.runner import SlotMap
from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
PROMPT_TOKENS = 8
CHUNK_TOKENS = 5
NEW_TOKENS = 4
TOLERANCE = {torch.float32: 0.01}
TOLERANCE_16_BITS = 0.3
HEAD_TOLERANCE = 1e-3  # the two passes round alike, whatever the type


def choose_decoding(model: PreTrainedModel, vocabulary: int) -> Decoding | None:
    """The fastest way that decodes the model rightly, with its attention implementation set for it; None if none does.

    Args:
        model: on its device.
        vocabulary: rows of its output layer.
    """
    own_attention = model.config._attn_implementation
    for decoding in Decoding:
        if decoding is Decoding.NATIVE and not getattr(model, "_supports_attention_backend", False):
            reason = "its attention cannot be replaced (transformers' AttentionInterface)"
        else:
            if decoding is Decoding.NATIVE:
                model.set_attn_implementation(attention.NAME)
            try:
                if decodes_rightly(model, vocabulary, decoding):
                    return decoding
                reason = "its logits differ from those of one plain pass: it keeps state that is not known here"
            except Exception as error:  # whatever a model may not like about being run this way
                reason = repr(error)
            model.set_attn_implementation(own_attention)
        logger.warning("%s is not decoded %s: %s", type(model).__name__, decoding.value, reason)
    return None


@torch.inference_mode()
def decodes_rightly(model: PreTrainedModel, vocabulary: int, decoding: Decoding) -> bool:
    """Whether logits as the engine decodes them equal those of one plain pass, up to rounding.

    The error is the RMS difference over the logits' own spread: rounding costs 1e-6 of it in float32 and about a
    hundredth in 16 bits, lost state about 1.

    Args:
        model: on its device, with `attention.NAME` in force if it is to decode natively; left as it was.
        vocabulary: rows of its output layer.
        decoding: the way in question.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (PROMPT_TOKENS + NEW_TOKENS,), generator=generator).tolist()
    stepwise = _step_by_step(model, ids, vocabulary, decoding)
    plain = whole_logits(model, ids)[PROMPT_TOKENS - 1 :, :vocabulary]
    error = (stepwise - plain).square().mean().sqrt() / plain.std()
    return bool(error < TOLERANCE.get(model.dtype, TOLERANCE_16_BITS))


def _step_by_step(model: PreTrainedModel, ids: list[int], vocabulary: int, decoding: Decoding) -> Tensor:
    """Logits after each of the last tokens: the prompt in two chunks, the rest one by one."""
    total = len(ids)
    pool = PagePool(total, 4)
    runner, slot_map = make_runner(model, decoding, total * 4, vocabulary), SlotMap(1, total, model.device)
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


@torch.inference_mode()
def ends_in_its_head(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether the logits are the output layer's product with what the body gives, and nothing is done to them after.

    Soft caps and scales make a model answer no. Asked of the model itself, as names of settings differ.
    """
    ids = torch.arange(PROMPT_TOKENS, device=model.device)[None] % vocabulary
    with _plain_attention(model):
        try:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            product = model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
        except Exception:  # another shape of model
            return False
        logits = model(input_ids=ids, use_cache=False).logits
    error = (product - logits).square().mean().sqrt() / logits.std()
    return bool(error < HEAD_TOLERANCE)


def whole_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Float32 logits at every position from one pass without any cache, shape (ids, vocabulary)."""
    with _plain_attention(model):
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0].float()


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that needs no cache of ours."""
    in_force = model.config._attn_implementation
    if in_force == attention.NAME:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(in_force)
