"""Both models over the same rows: which of them runs which rows, and that they never drift apart.

Knows the runners and the slot map they share; nothing of sampling, text or requests beyond what a row needs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from lda_service.engine.fallback import Decoding, make_runner
from lda_service.engine.lora import ALL, AdaptedRows
from lda_service.engine.runner import ModelRunner, SlotMap, fit

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.fallback import Runner
    from lda_service.engine.pages import PageTable
    from lda_service.engine.pair import Pair
    from lda_service.engine.scheduler import Job, PrefillChunk, Sequence

AFTER, BEFORE = 0, 1


def runner_for(pair: Pair, num_slots: int, max_rows: int, context_tokens: int) -> PairRunner:
    """What runs this pair.

    Args:
        pair: both models.
        num_slots: positions each cache holds.
        max_rows: sequences decoded at once.
        context_tokens: positions of the longest sequence.
    """
    one_pass = pair.adapted_rows is not None and pair.decoding[AFTER] is Decoding.NATIVE
    kind = AdapterPairRunner if one_pass else PairRunner
    return kind(pair, num_slots, max_rows, context_tokens)


class PairRunner:
    """The two models of a pair with their caches, addressed by the same slots. For the arguments see `runner_for`."""

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int) -> None:
        self.vocabulary = pair.vocabulary_size
        self.head = pair.head
        self.device = pair.after.device
        self.adapted_rows = pair.adapted_rows or AdaptedRows()
        self.runners = self._make_runners(pair, num_slots)
        self.slot_map = SlotMap(max_rows, context_tokens, self.device)

    def _make_runners(self, pair: Pair, num_slots: int) -> tuple[Runner, ...]:
        models = zip((pair.after, pair.before), pair.decoding, strict=True)
        return tuple(make_runner(model, how, num_slots, self.vocabulary) for model, how in models)

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
        sides = [side for side in (AFTER, BEFORE) if chunk.job.needs[side]]
        ran = [self._prefill(side, chunk, logits_to_keep) for side in sides]
        self._check_lock_step([chunk.job])
        return torch.stack(ran).expand(2, -1, -1)

    def decode(self, sequences: list[Sequence]) -> Tensor:
        """Run the last token of each sequence.

        Returns:
            float32 logits, shape (2, rows, vocabulary), as `prefill` says. Where the models have one output layer, a
            row that nobody compares gets its combined logits as both.
        """
        rows = [[i for i, sequence in enumerate(sequences) if sequence.needs[side]] for side in (AFTER, BEFORE)]
        ran = self._decode(*([sequences[i] for i in at] for at in rows))
        both = ran[AFTER].new_empty(2, len(sequences), ran[AFTER].shape[-1])
        for side, values in enumerate(ran):
            missing = [i for i, sequence in enumerate(sequences) if not sequence.needs[1 - side]]
            both[side, rows[side]] = values
            both[1 - side, missing] = both[side, missing]
        self._check_lock_step(sequences)
        return both if self.head is None else self._one_head(both.float(), sequences)

    def _one_head(self, hidden: Tensor, sequences: list[Sequence]) -> Tensor:
        """Logits of hidden states, shape (2, rows, hidden), by one product with the output layer that both models have.

        The layer is linear, so a row of which only the combination is looked at needs it for the combined state alone:
        its logits stand in for both models', which combine to themselves at any alpha.
        """
        after, before = hidden
        alpha = torch.tensor([[sequence.branch.alpha] for sequence in sequences], device=self.device)
        combined = torch.where(alpha == -1, before, after + alpha * (after - before))
        compared = [i for i, sequence in enumerate(sequences) if sequence.compared]
        combined[compared] = after[compared]
        assert self.head is not None
        logits = fit(self.head(torch.cat([combined, before[compared]])), self.vocabulary)
        rows = len(sequences)
        if not compared:
            return logits.expand(2, -1, -1)
        both = logits[:rows].repeat(2, 1, 1)
        both[BEFORE, compared] = logits[rows:]
        return both

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        for runner in self.runners:
            runner.cache.forget(owner)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        assert not any(runner.cache.lengths for runner in self.runners), "an idle cache remembers lengths"

    def _prefill(self, side: int, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        self._turn_adapter(side)
        return self.runners[side].prefill(chunk, logits_to_keep)

    def _decode(self, *rows: list[Sequence]) -> list[Tensor]:
        """For each model what comes of the rows that need it, shape (rows, width): see `_step`."""
        ran: list[Tensor | None] = [None, None]
        for side in (AFTER, BEFORE):
            if rows[side]:
                self._turn_adapter(side)
                ran[side] = self._step(self.runners[side], rows[side])
        some = next(values for values in ran if values is not None)
        return [some[:0] if values is None else values for values in ran]

    def _step(self, runner: Runner, rows: list[Sequence]) -> Tensor:
        """Logits; hidden states if the output layer is applied to both models' together."""
        if self.head is None:
            return runner.decode(rows, self.slot_map)
        assert isinstance(runner, ModelRunner)
        return runner.decode_hidden(rows, self.slot_map)

    def _turn_adapter(self, side: int) -> None:
        """On for a whole pass of the after model, off for one of the before model; of no effect without an adapter."""
        self.adapted_rows.count = ALL if side == AFTER else 0

    def _length(self, side: int, owner: Sequence | Job) -> int:
        """Positions of the owner that stand in a model's cache."""
        return self.runners[side].cache.lengths[owner]

    def _check_lock_step(self, owners: list[Sequence] | list[Job]) -> None:
        """Both caches stand at the same position for every row that needs both models."""
        for owner in owners:
            if owner.needs == (True, True):
                assert self._length(AFTER, owner) == self._length(BEFORE, owner), (
                    "the two models stand at different positions"
                )


class AdapterPairRunner(PairRunner):
    """A base model and the same model with a LoRA adapter, as one set of weights.

    A step is one pass: the after rows with the adapter, then the before rows without, so the weights are read once.
    One cache of twice the slots holds both halves. Each job and sequence has a twin that stands for it in the before
    model: its pages lie in the second half, its row behind all after rows. A chunk of a prompt is two passes: it is
    bound by arithmetic, so one pass over twice the tokens would gain nothing.
    """

    def __init__(self, pair: Pair, num_slots: int, max_rows: int, context_tokens: int) -> None:
        super().__init__(pair, num_slots, 2 * max_rows, context_tokens)
        self._num_slots = num_slots
        self._max_rows = max_rows
        self._twins: dict[Sequence | Job, Sequence | Job] = {}

    def _make_runners(self, pair: Pair, num_slots: int) -> tuple[Runner, ...]:
        return (ModelRunner(pair.after, 2 * num_slots, self.vocabulary),)

    def assign(self, sequence: Sequence) -> None:
        """Point the sequence's row, and its twin's, at the slots of its prompt and its own pages."""
        super().assign(sequence)
        job = self._twin_job(sequence.job)
        row, table = sequence.row + self._max_rows, self._shifted(sequence.table)
        twin = dataclasses.replace(sequence, job=job, row=row, table=table)  # the list of tokens stays one and the same
        self._twins[sequence] = twin
        super().assign(twin)

    def forget(self, owner: Sequence | Job) -> None:
        """The owner's slots were given back."""
        super().forget(owner)
        twin = self._twins.pop(owner, None)
        if twin is not None:
            super().forget(twin)

    def check_idle(self) -> None:
        """An idle pair remembers nobody."""
        super().check_idle()
        assert not self._twins, "an idle pair remembers twins"

    def _twin_job(self, job: Job) -> Job:
        """The job's twin, with the job's present pages."""
        twin = self._twins.setdefault(job, dataclasses.replace(job))
        twin.table = self._shifted(job.table)
        return twin  # type: ignore[return-value]

    def _shifted(self, table: PageTable | None) -> PageTable:
        """The same positions in the cache's second half."""
        assert table is not None
        shift = self._num_slots // table.page_tokens
        return dataclasses.replace(table, pages=tuple(page + shift for page in table.pages))

    def _prefill(self, side: int, chunk: PrefillChunk, logits_to_keep: int) -> Tensor:
        self._turn_adapter(side)
        if side == BEFORE:
            chunk = dataclasses.replace(chunk, job=self._twin_job(chunk.job))
        return self.runners[0].prefill(chunk, logits_to_keep)

    def _decode(self, *rows: list[Sequence]) -> list[Tensor]:
        after, before = rows
        self.adapted_rows.count = len(after)
        twins: list[Sequence] = [self._twins[sequence] for sequence in before]  # type: ignore[misc]
        values = self._step(self.runners[0], after + twins)
        return [values[: len(after)], values[len(after) :]]

    def _length(self, side: int, owner: Sequence | Job) -> int:
        return self.runners[0].cache.lengths[owner if side == AFTER else self._twins[owner]]
