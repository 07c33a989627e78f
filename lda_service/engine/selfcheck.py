"""Does this engine decode this model rightly? Asked once for each model at load, answered by the model itself.

Some architectures offer the attention seam but keep more state than keys and values (convolutions, recurrences), or
pass attention something that `attend` does not know. Decoding them through the cache would give plausible nonsense, so
a few tokens are run both ways: in chunks and one by one through the cache, and whole through transformers' own
attention and modules. Knows one model; nothing of pairs or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine import attention
from lda_service.engine.pages import PagePool
from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, SequenceDelta, Stopping
from lda_service.engine.runner import ModelRunner, SlotMap, decode_inputs, prefill_inputs
from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lda_service.engine.engine import Engine
    from lda_service.engine.prepack import Backend

PROMPT_TOKENS = 8
CHUNK_TOKENS = 5
COMPANY = 7
NEW_TOKENS = 4
TOLERANCE_32_BITS = 0.01
TOLERANCE_16_BITS = 0.3


def sample_ids(vocabulary: int) -> list[int]:
    """The text that models are checked on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROMPT_TOKENS + NEW_TOKENS,), generator=generator).tolist()


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, vocabulary: int) -> Tensor:
    """What the model says in one pass of transformers' own attention, without a cache, its modules as loaded.

    Args:
        model: on its device, with `attention.NAME` in force; left as it was.
        vocabulary: rows of its output layer.

    Returns:
        float32, shape (positions, vocabulary).
    """
    model.set_attn_implementation("eager")
    try:
        logits = model(input_ids=torch.tensor([sample_ids(vocabulary)], device=model.device), use_cache=False).logits
    finally:
        model.set_attn_implementation(attention.NAME)
    kept: Tensor = logits[0, PROMPT_TOKENS - 1 :, :vocabulary].float()
    return kept


@torch.inference_mode()
def decodes_rightly(model: PreTrainedModel, backend: Backend, plain: Tensor) -> bool:
    """Whether logits through the cache equal those of one plain pass, up to rounding.

    The error is the RMS difference over the logits' own spread: rounding costs 1e-6 of it in float32 and about a
    hundredth in 16 bits, lost state about 1.

    Args:
        model: as it will decode.
        backend: what it computes with.
        plain: `plain_logits` of the model as it was loaded.
    """
    cached = _through_cache(model, backend, plain.shape[1])
    error = (cached - plain).square().mean().sqrt() / plain.std()
    exact = model.dtype == torch.float32 and backend.cache_dtype is None
    return bool(error < (TOLERANCE_32_BITS if exact else TOLERANCE_16_BITS))


def _through_cache(model: PreTrainedModel, backend: Backend, vocabulary: int) -> Tensor:
    """Logits after each of the last tokens: the prompt in two chunks, the rest one by one."""
    ids = sample_ids(vocabulary)
    total = len(ids)
    pool = PagePool(total, 4)
    runner = ModelRunner(model, total * 4, vocabulary, backend.kernels, backend.cache_dtype)
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
