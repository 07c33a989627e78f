"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lda_service.engine.fallback import Decoding, make_runner
from lda_service.engine.lora import ALL, AdaptedRows
from lda_service.engine.runner import (
    ModelRunner,
    SlotMap,
    block_inputs,
    decode_inputs,
    fit,
    last_tokens,
    prefill_inputs,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.fallback import Runner
    from lda_service.engine.pages import PageTable
    from lda_service.engine.pair import Pair
    from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

AFTER, BEFORE = 0, 1


def runner_for(
    pair: Pair, num_slots: int, max_rows: int, context_tokens: int, *, invariant: bool = False
) -> PairRunner:
    """What runs this pair.

    Args:
        pair: both models.
        num_slots: slots of each cache.
        max_rows: sequences decoded at once.
        context_tokens: positions of the longest sequence.
        invariant: how a row is computed must not depend on its company.
    """
    one_pass = pair.adapted_rows is not None and pair.decoding[AFTER] is Decoding.NATIVE
    kind = AdapterPairRunner if one_pass else PairRunner
    return kind(pair, num_slots, max_rows, context_tokens, invariant)


class PairRunner:
    """The two models of a pair with their caches, addressed by the same slots. For the arguments see `runner_for`."""

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int, invariant: bool) -> None:
        self.vocabulary = pair.vocabulary_size
        self.head = pair.head
        self.device = pair.after.device
        self.invariant = invariant
        self.adapted_rows = pair.adapted_rows or AdaptedRows()
        models = zip((pair.after, pair.before), pair.decoding, strict=True)
        self.runners: tuple[Runner, ...] = tuple(
            make_runner(model, how, num_slots, self.vocabulary, pair.backend) for model, how in models
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
        logits = [self._prefill(side, chunk, logits_to_keep) if chunk.sides[side] else None for side in (AFTER, BEFORE)]
        if chunk.sides == (True, True):
            self._check_lock_step([chunk.owner])
        return logits

    def decode(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Run the last token of each sequence; sequences of one prompt stand together.

        Returns:
            float32 logits, each of shape (rows, vocabulary): after, before. A model that was not run stands in as
            equal to the other: alpha 0 and -1 do not look at it. Where the models have one output layer, a row that
            nobody compares gets its combined logits as both.
        """
        sides = [[i for i, sequence in enumerate(sequences) if sequence.needs[side]] for side in (AFTER, BEFORE)]
        ran = self._decode([[sequences[i] for i in at] for at in sides])
        after, before = _fill(ran, sides, len(sequences))
        self._check_lock_step(sequences)
        return (after, before) if self.head is None else self._one_head(after.float(), before.float(), sequences)

    def _one_head(self, after: Tensor, before: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Logits of hidden states, shape (rows, hidden), by one product with the output layer that both models have.

        The layer is linear, so a row of which only the combination is looked at needs it for the combined state alone:
        its logits stand in for both models', which combine to themselves at any alpha.
        """
        alpha = torch.tensor([[sequence.branch.alpha] for sequence in sequences], device=self.device)
        combined = torch.where(alpha == -1, before, after + alpha * (after - before))
        compared = [i for i, sequence in enumerate(sequences) if sequence.compared]
        combined[compared] = after[compared]
        logits = fit(self.head(torch.cat([combined, before[compared]])), self.vocabulary)
        firsts = seconds = logits[: len(sequences)]
        if compared:
            seconds = firsts.clone()
            seconds[compared] = logits[len(sequences) :]
        return firsts, seconds

    @property
    def native(self) -> tuple[ModelRunner, ...]:
        """The runners, where both models run through this engine's cache."""
        assert all(isinstance(runner, ModelRunner) for runner in self.runners)
        return self.runners  # type: ignore[return-value]

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
        return self.native[AFTER].run_block(sequences, inputs, offset)[:, 0]

    def verify(self, sequences: list[Sequence], ids: Tensor) -> Tensor:
        """One pass of the before model over the tokens that `draft` ran.

        Args:
            sequences: as they were drafted.
            ids: int64, shape (rows, tokens): each sequence's last token, then the drafts that were run.

        Returns:
            float32 logits, shape (rows, tokens, vocabulary).
        """
        inputs = block_inputs(sequences, ids, 0, self.slot_map)
        return self.native[BEFORE].run_block(sequences, inputs, 0)

    def keep(self, sequences: list[Sequence], counts: list[int]) -> None:
        """Of the positions just drafted and verified, the first `counts` of each sequence stand in both caches."""
        for sequence, count in zip(sequences, counts, strict=True):
            for runner in self.native:
                runner.cache.rewind(sequence, sequence.length - 1 + count)
        self._check_lock_step(sequences)

    def note_decoded(self, sequences: list[Sequence], positions: list[int]) -> None:
        """A static step runs these positions of the sequences, in the models that each needs."""
        for sequence, position in zip(sequences, positions, strict=True):
            for runner, needs in zip(self.native, sequence.needs, strict=True):
                if needs:
                    runner.cache.advance(sequence, position, position + 1)
        self._check_lock_step(sequences)

    def rewind(self, sequence: Sequence) -> None:
        """The sequence's last token, and what was run behind it, will be run again."""
        for runner, needs in zip(self.native, sequence.needs, strict=True):
            if needs:
                runner.cache.rewind(sequence, sequence.length - 1)

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        for runner in self.runners:
            runner.cache.forget(owner)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        assert not any(runner.cache.lengths for runner in self.runners), "an idle cache remembers lengths"

    def _prefill(self, side: int, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        self._turn_adapter(side)
        inputs = prefill_inputs(chunk, chunk.stored[side], self.device)
        return self.runners[side].prefill(chunk, inputs, logits_to_keep)

    def _decode(self, rows: list[list[Sequence]]) -> list[Tensor | None]:
        """For each model what comes of the rows that need it, shape (rows, width): logits, or states for one head."""
        inputs, ran = None, []
        for side in (AFTER, BEFORE):
            if inputs is None or rows[BEFORE] != rows[AFTER]:
                inputs = decode_inputs(rows[side], self.slot_map, invariant=self.invariant) if rows[side] else None
            self._turn_adapter(side)
            runs = self.runners[side].decode
            ran.append(None if inputs is None else runs(rows[side], inputs, hidden=self.head is not None))
        return ran

    def _turn_adapter(self, side: int) -> None:
        """On for a whole pass of the after model, off for one of the before model; of no effect without an adapter."""
        self.adapted_rows.count = ALL if side == AFTER else 0

    def _length(self, side: int, owner: Sequence | Job) -> int:
        """Positions of the owner that stand in a model's cache."""
        return self.runners[side].cache.lengths[owner]

    def _check_lock_step(self, owners: list[Sequence] | list[Job | Sequence]) -> None:
        """Both caches stand at the same position for every row that needs both models."""
        for owner in owners:
            if owner.needs == (True, True):
                assert self._length(AFTER, owner) == self._length(BEFORE, owner), (
                    "the two models stand at different positions"
                )


class AdapterPairRunner(PairRunner):
    """A base model and the same model with a LoRA adapter, as one set of weights.

    A step is one pass: the after rows with the adapter, then the before rows without, so the weights are read once.
    One cache of twice the slots holds both models' keys and values, the before model's in its second half, and so does
    the slot map. A chunk of a prompt is two passes: it is bound by arithmetic, so one pass over twice the tokens would
    gain nothing.
    """

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int, invariant: bool) -> None:
        super().__init__(pair, 2 * num_slots, 2 * max_rows, context_tokens, invariant)
        self.runners = self.runners[:1]
        self._num_slots = num_slots
        self._max_rows = max_rows
        self._before_lengths: dict[Sequence | Job, int] = {}

    def assign(self, sequence: Sequence, tables: tuple[PageTable, ...]) -> None:
        """Point the positions of `tables` at their slots, for the sequence's row in both halves."""
        super().assign(sequence, tables)
        for table in tables:
            part = self.slot_map.slots[:, table.start : table.start + table.capacity]
            part[sequence.row + self._max_rows] = part[sequence.row] + self._num_slots

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        super().forget(owner)
        self._before_lengths.pop(owner, None)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        super().check_idle()
        assert not self._before_lengths, "an idle pair remembers lengths"

    def _prefill(self, side: int, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        self._turn_adapter(side)
        runner, stored = self._one_runner, chunk.stored[side]
        if side == AFTER:
            return runner.prefill(chunk, prefill_inputs(chunk, stored, self.device), logits_to_keep)
        self._before_lengths[chunk.owner] = chunk.stop
        inputs = prefill_inputs(chunk, stored, self.device, offset=self._num_slots)
        return runner.logits(inputs, logits_to_keep)[0]

    def _decode(self, rows: list[list[Sequence]]) -> list[Tensor | None]:
        after, before = rows
        self.adapted_rows.count = len(after)
        inputs = decode_inputs(after, self.slot_map, invariant=self.invariant, twins=before)
        values = self._one_runner.decode(after, inputs, hidden=self.head is not None)
        for sequence in before:
            self._before_lengths[sequence] = sequence.length
        return [values[: len(after)], values[len(after) :]]

    @property
    def _one_runner(self) -> ModelRunner:
        runner = self.runners[0]
        assert isinstance(runner, ModelRunner)
        return runner

    def _length(self, side: int, owner: Sequence | Job) -> int:
        return self._before_lengths[owner] if side == BEFORE else super()._length(side, owner)


def _fill(ran: list[Tensor | None], sides: list[list[int]], rows: int) -> tuple[Tensor, Tensor]:
    """Both models' values for all rows; where one model was not run, the other's."""
    after, before = ran
    if after is None or before is None or len(sides[AFTER]) == len(sides[BEFORE]) == rows:
        some = before if after is None else after
        assert some is not None
        return some, some if before is None else before
    both = after.new_empty(2, rows, after.shape[-1])
    for side, values in enumerate((after, before)):
        both[side, sides[side]] = values
    for side in (AFTER, BEFORE):
        missing = sorted(set(range(rows)) - set(sides[side]))
        both[side, missing] = both[1 - side, missing]
    return both[AFTER], both[BEFORE]
