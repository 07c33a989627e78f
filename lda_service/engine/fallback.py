"""Forward passes of a model that this engine's cache does not fit: correct, and slow.

Hybrids and recurrent models keep more state than keys and values; some architectures do not let attention be replaced.
Such a model runs on transformers' own cache, one sequence at a time. Knows the model's call and its cache as an opaque
object; offers what `runner.ModelRunner` offers, without its slots.
"""

from __future__ import annotations

import copy
import inspect
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from lda_service.engine.request import ScoreRequest
from lda_service.engine.runner import ModelRunner, fit
from lda_service.engine.scheduler import Sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as Ordered

    from torch import Tensor
    from transformers import PreTrainedModel

    from lda_service.engine.kv_cache import PassInputs
    from lda_service.engine.prepack import Backend
    from lda_service.engine.scheduler import Job, PrefillChunk

CACHE_NAMES = ("past_key_values", "cache_params", "state")


class Decoding(Enum):
    """How a model is decoded, the fastest way first."""

    NATIVE = "through this engine's cache"
    CACHED = "one sequence at a time, through transformers' own cache"
    RECOMPUTED = "one sequence at a time, from its first token at every step"


def make_runner(
    model: PreTrainedModel, decoding: Decoding, num_slots: int, vocabulary: int, backend: Backend
) -> Runner:
    """The runner that decodes the model that way."""
    if decoding is Decoding.NATIVE:
        return ModelRunner(model, num_slots, vocabulary, backend.kernels, backend.cache_dtype)
    return FallbackRunner(model, vocabulary, keeps_cache=decoding is Decoding.CACHED)


class States:
    """Each owner's place and, where one is kept, transformers' cache of its tokens so far."""

    def __init__(self) -> None:
        self.lengths: dict[Sequence | Job, int] = {}
        self.caches: dict[Sequence | Job, dict[str, Any]] = {}

    def advance(self, owner: Sequence | Job, start: int, stop: int) -> None:
        """Note that positions `start` to `stop` - 1 of `owner` were run; they must follow the last ones."""
        assert self.lengths.get(owner, start) == start, "a position was skipped or run twice"
        self.lengths[owner] = stop

    def forget(self, owner: Sequence | Job) -> None:
        """The owner is gone."""
        self.lengths.pop(owner, None)
        self.caches.pop(owner, None)


class FallbackRunner:
    """One model and transformers' caches: one for each prompt, and a copy of it for each of its sequences.

    The caches only save work: a sequence without one is run from its first token. A prompt that comes in chunks is run
    whole, with its last chunk: not every model takes up a prompt where it left off. Chunks whose logits somebody reads
    (scores) are run with everything before them.

    Args:
        model: under whichever attention implementation it came with.
        vocabulary: width of the pair's logits.
        keeps_cache: whether the model's cache can be copied and gone on with; else every step starts over.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int, *, keeps_cache: bool) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.device = model.device
        self.cache = States()
        self._keeps_cache = keeps_cache
        self._cuts = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefill(self, chunk: PrefillChunk, inputs: PassInputs, logits_to_keep: int) -> Tensor:
        """Run a prompt up to the end of the chunk; float32 logits, shape (logits_to_keep, vocabulary).

        Zeros for a chunk that is neither the last one nor part of a score, and for a sequence's own tokens, which its
        next step runs again: nobody reads them.
        """
        owner = chunk.owner
        self.cache.advance(owner, chunk.start, chunk.stop)
        if isinstance(owner, Sequence) or not (
            chunk.stop == len(owner.prompt_ids) or isinstance(owner.request, ScoreRequest)
        ):
            return torch.zeros(logits_to_keep, self.vocabulary, device=self.device)
        logits, cache = self._run(owner.prompt_ids[: chunk.stop], {}, logits_to_keep)
        self.cache.caches[owner] = cache
        return logits

    def decode(self, sequences: Ordered[Sequence], inputs: PassInputs, *, hidden: bool = False) -> Tensor:
        """Run the last token of each sequence; float32 logits, shape (sequences, vocabulary). Slots play no part."""
        assert not hidden
        return torch.cat([self._decode_one(sequence) for sequence in sequences])

    def _decode_one(self, sequence: Sequence) -> Tensor:
        past = self.cache.caches.get(sequence, {})
        if not past and len(sequence.tokens) == 1:
            past = copy.deepcopy(self.cache.caches.get(sequence.job, {}))
        ids = sequence.tokens[-1:] if past else [*sequence.job.prompt_ids, *sequence.tokens]
        logits, self.cache.caches[sequence] = self._run(ids, past, 1)
        self.cache.advance(sequence, sequence.length - 1, sequence.length)
        return logits

    def _run(self, ids: Ordered[int], past: dict[str, Any], logits_to_keep: int) -> tuple[Tensor, dict[str, Any]]:
        """Logits of the last positions, and the cache under the name the model calls it; none if none is kept."""
        cut = {"logits_to_keep": logits_to_keep} if self._cuts else {}
        inputs = torch.tensor([list(ids)], device=self.device)
        output = self.model(input_ids=inputs, use_cache=self._keeps_cache, **past, **cut)
        caches = {name: getattr(output, name, None) for name in CACHE_NAMES} if self._keeps_cache else {}
        kept = {name: cache for name, cache in caches.items() if cache is not None}
        return fit(output.logits[0, -logits_to_keep:], self.vocabulary), kept


Runner = ModelRunner | FallbackRunner
