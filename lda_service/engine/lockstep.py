"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the two runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine.runner import ModelRunner, SlotMap, decode_inputs, prefill_inputs

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
        scratch_slots: slots more, behind the others, that nobody owns: the last row of the slot map, one more than
            `max_rows`, points to the first of them at all positions.
    """

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int, scratch_slots: int = 0) -> None:
        self.vocabulary = pair.vocabulary_size
        self.device = pair.after.device
        self.runners = tuple(
            ModelRunner(
                model, num_slots + scratch_slots, self.vocabulary, pair.backend.kernels, pair.backend.cache_dtype
            )
            for model in (pair.after, pair.before)
        )
        self.slot_map = SlotMap(max_rows + (scratch_slots > 0), context_tokens, self.device)
        if scratch_slots:
            self.slot_map.slots[max_rows] = num_slots

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

    def note_decoded(self, sequences: list[Sequence], positions: list[int]) -> None:
        """A static step runs these positions of the sequences, in the models that each needs."""
        for sequence, position in zip(sequences, positions, strict=True):
            for runner, needs in zip(self.runners, sequence.needs, strict=True):
                if needs:
                    runner.cache.advance(sequence, position, position + 1)
        self._check_lock_step(sequences)

    def rewind(self, sequence: Sequence) -> None:
        """The sequence's last token, and what was run behind it, will be run again."""
        for runner, needs in zip(self.runners, sequence.needs, strict=True):
            if needs:
                runner.cache.rewind(sequence, sequence.length - 1)

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
