"""Which way of decoding is right for this model? Asked once for each model at load, answered by the model itself.

Some architectures offer the attention seam but keep more state than keys and values (convolutions, recurrences), or
pass attention something that `attend` does not know. Decoding them through the cache would give plausible nonsense, so
a few tokens are run both ways: in chunks and one by one as the engine would, and whole in one plain pass of the model
as it was loaded. The first way that agrees is taken. Knows one model; nothing of pairs or requests.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from lda_service.engine import attention
from lda_service.engine.fallback import Decoding, make_runner
from lda_service.engine.pages import PagePool
from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, SequenceDelta, Stopping
from lda_service.engine.runner import SlotMap, decode_inputs, prefill_inputs
from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lda_service.engine.engine import Engine
    from lda_service.engine.prepack import Backend

logger = logging.getLogger(__name__)
PROMPT_TOKENS = 8
CHUNK_TOKENS = 5
NEW_TOKENS = 4
COMPANY = 7
TOLERANCE_32_BITS = 0.01
TOLERANCE_16_BITS = 0.3
HEAD_TOLERANCE = 1e-3  # the two passes round alike, whatever the type


def sample_ids(vocabulary: int) -> list[int]:
    """The text that models are checked on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROMPT_TOKENS + NEW_TOKENS,), generator=generator).tolist()


@torch.inference_mode()
def whole_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits at every position of one pass, without a cache; float32, shape (positions, vocabulary)."""
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return logits


def plain_logits(model: PreTrainedModel, vocabulary: int) -> Tensor:
    """What the model says in one pass, without a cache, its modules and attention as loaded.

    Args:
        model: on its device.
        vocabulary: rows of its output layer.

    Returns:
        float32, shape (positions, vocabulary).
    """
    return whole_logits(model, sample_ids(vocabulary))[PROMPT_TOKENS - 1 :, :vocabulary]


@torch.inference_mode()
def ends_in_its_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output layer's product with what the body gives, and nothing is done to them after.

    Soft caps and scales make a model answer no. Asked of the model itself, as names of settings differ.
    """
    ids = torch.arange(PROMPT_TOKENS, device=model.device)[None]
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        product = model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
    except Exception:  # another shape of model
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    error = (product - logits).float().square().mean().sqrt() / logits.float().std()
    return bool(error < HEAD_TOLERANCE)


def choose_decoding(model: PreTrainedModel, backend: Backend, plain: Tensor) -> Decoding | None:
    """The fastest way that decodes the model rightly, with its attention implementation set for it; None if none does.

    Args:
        model: with the modules it will decode with.
        backend: what it computes with.
        plain: `plain_logits` of the model as it was loaded.
    """
    own_attention = model.config._attn_implementation
    for decoding in Decoding:
        if decoding is Decoding.NATIVE and not getattr(model, "_supports_attention_backend", False):
            reason = "its attention cannot be replaced (transformers' AttentionInterface)"
        else:
            if decoding is Decoding.NATIVE:
                model.set_attn_implementation(attention.NAME)
            try:
                if decodes_rightly(model, backend, plain, decoding):
                    return decoding
                reason = "its logits differ from those of one plain pass: it keeps state that is not known here"
            except Exception as error:  # whatever a model may not like about being run this way
                reason = repr(error)
            model.set_attn_implementation(own_attention)
        logger.warning("%s is not decoded %s: %s", type(model).__name__, decoding.value, reason)
    return None


@torch.inference_mode()
def decodes_rightly(model: PreTrainedModel, backend: Backend, plain: Tensor, decoding: Decoding) -> bool:
    """Whether logits as the engine decodes them equal those of one plain pass, up to rounding.

    The error is the RMS difference over the logits' own spread: rounding costs 1e-6 of it in float32 and about a
    hundredth in 16 bits, lost state about 1.

    Args:
        model: as it will decode, with `attention.NAME` in force if natively.
        backend: what it computes with.
        plain: `plain_logits` of the model as it was loaded.
        decoding: the way in question.
    """
    stepwise = _step_by_step(model, backend, plain.shape[1], decoding)
    error = (stepwise - plain).square().mean().sqrt() / plain.std()
    exact = model.dtype == torch.float32 and backend.cache_dtype is None
    return bool(error < (TOLERANCE_32_BITS if exact else TOLERANCE_16_BITS))


def _step_by_step(model: PreTrainedModel, backend: Backend, vocabulary: int, decoding: Decoding) -> Tensor:
    """Logits after each of the last tokens: the prompt in two chunks, the rest one by one."""
    ids = sample_ids(vocabulary)
    total = len(ids)
    pool = PagePool(total, 4)
    runner = make_runner(model, decoding, total * 4, vocabulary, backend)
    slot_map = SlotMap(1, total, model.device)
    job = Job(None, tuple(ids[:PROMPT_TOKENS]), table=pool.allocate(0, PROMPT_TOKENS))  # type: ignore[arg-type]
    chunks = [PrefillChunk(job, 0, CHUNK_TOKENS), PrefillChunk(job, CHUNK_TOKENS, PROMPT_TOKENS)]
    rows = [runner.prefill(chunk, prefill_inputs(chunk, 0, model.device), 1) for chunk in chunks][1:]
    table = pool.allocate(PROMPT_TOKENS, NEW_TOKENS)
    slot_map.assign(0, job.table, table)  # type: ignore[arg-type]
    sequence = Sequence(job, None, 0, NEW_TOKENS, row=0, table=table)  # type: ignore[arg-type]
    for token in ids[PROMPT_TOKENS:]:
        sequence.tokens.append(token)
        rows.append(runner.decode([sequence], decode_inputs([sequence], slot_map)))
    return torch.cat(rows)


def decodes_alone_as_in_company(engine: Engine) -> bool:
    """Whether a sequence's log-probabilities are the same bits alone and beside others, of its own prompt and another.

    Args:
        engine: idle; idle again afterwards.
    """
    ids = engine.pair.shared_ids
    prompt, other = ids[:PROMPT_TOKENS], ids[-CHUNK_TOKENS:]
    alone = _logprobs(engine, [(prompt, 1)])
    return all(_logprobs(engine, [(other, rows), (prompt, 1 + rows)]) == alone for rows in (1, 2, COMPANY))


def _logprobs(engine: Engine, prompts: list[tuple[tuple[int, ...], int]]) -> list[float | None]:
    """Of the first sequence of the last prompt, each prompt with as many sequences as it says."""
    sampling, stopping = Sampling(1.0, 1.0), Stopping(NEW_TOKENS, ignore_eos=True)
    for i, (prompt, rows) in enumerate(prompts):
        branch = Branch(Role.AMPLIFIED, 1.0)
        engine.submit(GenerationRequest(f"self-check-{i}", prompt, (branch,), rows, sampling, stopping))
    last, found = f"self-check-{len(prompts) - 1}", []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, SequenceDelta) and event.request_id == last and event.sequence_index == 0:
                found += [record.logprob for record in event.tokens]
    return found
