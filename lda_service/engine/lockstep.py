"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the two runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine.runner import ModelRunner, SlotMap

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
        self.runners = tuple(ModelRunner(model, num_slots, self.vocabulary) for model in (pair.after, pair.before))
        self.slot_map = SlotMap(max_rows, context_tokens, self.device)

    def assign(self, sequence: Sequence) -> None:
        """Point the sequence's row at the slots of its prompt and its own pages."""
        assert sequence.job.table is not None
        assert sequence.table is not None
        self.slot_map.assign(sequence.row, sequence.job.table, sequence.table)

    def prefill(self, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        """Run a chunk of a prompt through the models that its job needs.

        Returns:
            float32 logits of the chunk's last positions, shape (2, logits_to_keep, vocabulary): after, then before. A
            model that was not run stands in as equal to the other: alpha 0 and -1 do not look at it.
        """
        needed = zip(self.runners, chunk.job.needs, strict=True)
        ran = [runner.prefill(chunk, logits_to_keep) if needs else None for runner, needs in needed]
        self._check_lock_step([chunk.job])
        return torch.stack([logits for logits in (ran[0], ran[1]) if logits is not None]).expand(2, -1, -1)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        """Run the last token of each sequence; float32 logits, shape (2, rows, vocabulary), as `prefill` says."""
        both = torch.empty(2, len(sequences), self.vocabulary, device=self.device)
        for side, runner in enumerate(self.runners):
            at = [i for i, sequence in enumerate(sequences) if sequence.needs[side]]
            if at:
                logits = runner.decode([sequences[i] for i in at], self.slot_map)
                missing = [i for i, sequence in enumerate(sequences) if not sequence.needs[1 - side]]
                both[side, at] = logits
                both[1 - side, missing] = both[side, missing]
        self._check_lock_step(sequences)
        return both

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
