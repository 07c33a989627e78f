"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the two runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine.runner import ModelRunner, SlotMap, decode_inputs, prefill_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lda_service.engine.pages import PageTable
    from lda_service.engine.pair import Pair
    from lda_service.engine.scheduler import Job, PrefillChunk, Sequence


class PairRunner:
    """The two models of a pair with their caches, addressed by the same slots.

    Args:
        pair: both models.
        num_slots: slots of each cache; the last one belongs to no page.
        max_rows: sequences decoded at once.
        context_tokens: positions of the longest sequence.
        invariant: how a row is computed must not depend on its company.
    """

    def __init__(
        self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int, *, invariant: bool = False
    ) -> None:
        self.invariant = invariant
        self.vocabulary = pair.vocabulary_size
        self.device = pair.after.device
        self.runners = tuple(
            ModelRunner(model, num_slots, self.vocabulary, pair.backend.kernels, pair.backend.cache_dtype)
            for model in (pair.after, pair.before)
        )
        self.slot_map = SlotMap(max_rows, context_tokens, self.device)

    def assign(self, sequence: Sequence, tables: tuple[PageTable, ...]) -> None:
        """Point the positions of `tables` at their slots, for the sequence's row."""
        self.slot_map.assign(sequence.row, *tables)

    def prefill(self, chunk: PrefillChunk, logits_to_keep: int) -> list[Tensor | None]:
        """Run a chunk through the models that it names.

        Returns:
            after, then before: float32 logits of the chunk's last positions, shape (logits_to_keep, vocabulary), or
            None for a model that did not run.
        """
        inputs = {stored: prefill_inputs(chunk, stored, self.device) for stored in set(chunk.stored)}
        runs = zip(self.runners, chunk.sides, chunk.stored, strict=True)
        logits = [
            runner.prefill(chunk, inputs[stored], logits_to_keep) if named else None for runner, named, stored in runs
        ]
        if chunk.sides == (True, True):
            self._check_lock_step([chunk.owner])
        return logits

    def decode(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Run the last token of each sequence; sequences of one prompt stand together.

        Returns:
            float32 logits, each of shape (rows, vocabulary): after, before. A model that was not run stands in as
            equal to the other: alpha 0 and -1 do not look at it.
        """
        if all(sequence.needs == sequences[0].needs for sequence in sequences):
            inputs = decode_inputs(sequences, self.slot_map, invariant=self.invariant)
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
                both[side, at] = runner.decode(rows, decode_inputs(rows, self.slot_map, invariant=self.invariant))
                missing = [i for i in at if not sequences[i].needs[1 - side]]
                both[1 - side, missing] = both[side, missing]
        return both[0], both[1]

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        for runner in self.runners:
            runner.cache.forget(owner)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        assert not any(runner.cache.lengths for runner in self.runners), "an idle cache remembers lengths"

    def _check_lock_step(self, owners: Iterable[Sequence | Job]) -> None:
        """Both caches stand at the same position for every row that needs both models."""
        after, before = (runner.cache.lengths for runner in self.runners)
        for owner in owners:
            if owner.needs == (True, True):
                assert after[owner] == before[owner], "the two models stand at different positions"
