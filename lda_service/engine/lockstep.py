"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the two runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine.runner import ModelRunner, SlotMap, block_inputs, decode_inputs, last_tokens, prefill_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.pair import Pair
    from lda_service.engine.scheduler import Job, PrefillChunk, Sequence


class PairRunner:
    """The two models of a pair with their caches, addressed by the same slots.

    Args:
        pair: both models.
        num_slots: positions each cache holds.
        max_rows: sequences decoded at once.
        context_tokens: positions of the longest sequence.
    """

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int) -> None:
        self.vocabulary = pair.vocabulary_size
        self.device = pair.after.device
        self.runners = tuple(
            ModelRunner(model, num_slots, self.vocabulary, pair.backend.kernels, pair.backend.cache_dtype)
            for model in (pair.after, pair.before)
        )
        self.slot_map = SlotMap(max_rows, context_tokens, self.device)

    def assign(self, sequence: Sequence) -> None:
        """Point the sequence's row at the slots of its prompt and its own pages."""
        assert sequence.job.table is not None
        assert sequence.table is not None
        self.slot_map.assign(sequence.row, sequence.job.table, sequence.table)

    def prefill(self, chunk: PrefillChunk, logits_to_keep: int) -> tuple[Tensor, Tensor]:
        """Run a chunk of a prompt through the models that its job needs.

        Returns:
            float32 logits of the chunk's last positions, each of shape (logits_to_keep, vocabulary): after, before. A
            model that was not run stands in as equal to the other: alpha 0 and -1 do not look at it.
        """
        inputs = prefill_inputs(chunk, self.device)
        ran = [
            runner.prefill(chunk, inputs, logits_to_keep)
            for runner, needs in zip(self.runners, chunk.job.needs, strict=True)
            if needs
        ]
        self._check_lock_step([chunk.job])
        return ran[0], ran[-1]

    def decode(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Run the last token of each sequence; sequences of one prompt stand together.

        Returns:
            float32 logits, each of shape (rows, vocabulary): after, before; stand-ins as `prefill` says.
        """
        if all(sequence.needs == sequences[0].needs for sequence in sequences):
            inputs = decode_inputs(sequences, self.slot_map)
            needed = zip(self.runners, sequences[0].needs, strict=True)
            ran = [runner.decode(sequences, inputs) for runner, needs in needed if needs]
            after, before = ran[0], ran[-1]
        else:
            after, before = self._decode_apart(sequences)
        self._check_lock_step(sequences)
        return after, before

    def _decode_apart(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Each model runs only the rows that need it."""
        both = torch.empty(2, len(sequences), self.vocabulary, device=self.device)
        for side, runner in enumerate(self.runners):
            at = [i for i, sequence in enumerate(sequences) if sequence.needs[side]]
            if at:
                rows = [sequences[i] for i in at]
                both[side, at] = runner.decode(rows, decode_inputs(rows, self.slot_map))
                missing = [i for i in at if not sequences[i].needs[1 - side]]
                both[1 - side, missing] = both[side, missing]
        return both[0], both[1]

    def last_tokens(self, sequences: list[Sequence]) -> Tensor:
        """The token that each sequence runs next: int64, shape (rows, 1)."""
        return last_tokens(sequences, self.device)

    def draft(self, sequences: list[Sequence], ids: Tensor, offset: int) -> Tensor:
        """Run the after model alone on one token for each sequence, `offset` positions behind its last one.

        The caller must `verify` the same positions, and then `keep` what stands: until then the caches are apart.

        Args:
            sequences: those of one prompt stand together.
            ids: int64, shape (rows, 1); at offset 0 the last tokens.
            offset: one more with each call.

        Returns:
            float32 logits, shape (rows, vocabulary).
        """
        inputs = block_inputs(sequences, ids, offset, self.slot_map)
        return self.runners[0].run_block(sequences, inputs, offset)[:, 0]

    def verify(self, sequences: list[Sequence], ids: Tensor) -> Tensor:
        """One pass of the before model over the tokens that `draft` ran.

        Args:
            sequences: as they were drafted.
            ids: int64, shape (rows, tokens): each sequence's last token, then the drafts that were run.

        Returns:
            float32 logits, shape (rows, tokens, vocabulary).
        """
        inputs = block_inputs(sequences, ids, 0, self.slot_map)
        return self.runners[1].run_block(sequences, inputs, 0)

    def keep(self, sequences: list[Sequence], counts: list[int]) -> None:
        """Of the positions just drafted and verified, the first `counts` of each sequence stand in both caches."""
        for sequence, count in zip(sequences, counts, strict=True):
            for runner in self.runners:
                runner.cache.truncate(sequence, sequence.length - 1 + count)
        self._check_lock_step(sequences)

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        for runner in self.runners:
            runner.cache.forget(owner)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        assert not any(runner.cache.lengths for runner in self.runners), "an idle cache remembers lengths"

    def _check_lock_step(self, owners: list[Sequence] | list[Job]) -> None:
        """Both caches stand at the same position for every row that needs both models."""
        after, before = (runner.cache.lengths for runner in self.runners)
        for owner in owners:
            if owner.needs == (True, True):
                assert after[owner] == before[owner], "the two models stand at different positions"
