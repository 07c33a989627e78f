"""A rank's view of its batch: which sequence each row belongs to, what to draw for it, what to report of it.

vLLM tells every rank what a step schedules; from that alone follow positions and settings, so nothing here follows the
moves of vLLM's batch. Rows are matched by request id at each step. Knows torch and this engine's sampler; of vLLM only
the fields of its `SchedulerOutput`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lda_service.engine.rows import RowSpec, columns, diagnose_rows, rule_out_endings, score_rows
from lda_service.engine.sampling import Sampler
from lda_service.vllm_engine.wire import KEY, Answer, DrawAnswer, DrawAsk, ScoreAnswer, ScoreAsk

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lda_service.engine.sampling import Drawn, RowSampling
    from lda_service.vllm_engine.pair import SharedVocabulary
    from lda_service.vllm_engine.wire import Ask

    BothLogits = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]

SCORED_AT_ONCE = 256
# A scored text has a row too, whose token nobody reads.
UNREAD = RowSpec(0.0, 0.0, 0, 1.0, 0.0, 0.0, 0, 0, (), False, 0, ())
REHEARSED = replace(UNREAD, alpha=1.0, temperature=1.0, top_p=0.95, plausibility=0.1)


class StepRows:
    """What a rank of the last pipeline stage knows of the sequences in its batch.

    Args:
        vocabulary: ids that both models may generate, and the bytes of all.
        device: where logits are.
        reports: whether this rank's answers are the ones that are read; other ranks only draw.
    """

    def __init__(self, vocabulary: SharedVocabulary, device: torch.device, *, reports: bool) -> None:
        self.answers: dict[str, Answer | list[ScoreAnswer]] = {}  # of this step
        self._vocabulary = vocabulary
        self._device = device
        self._reports = reports
        self._sampler = Sampler(vocabulary.width, vocabulary.forbidden.to(device))
        self._asks: dict[str, Ask] = {}
        self._positions: dict[str, tuple[int, int]] = {}  # of this step: first one run, one past the last
        self._columns_of: list[str] = []
        self._columns: RowSampling

    def begin(self, scheduled: Any) -> None:
        """Take a step's `SchedulerOutput`."""
        self.answers = {}
        for request_id in scheduled.finished_req_ids:
            self._asks.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            self._asks[new.req_id] = new.sampling_params.extra_args[KEY]
        cached = scheduled.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        counts = scheduled.num_scheduled_tokens
        self._positions = {i: (computed[i], computed[i] + count) for i, count in counts.items()}

    # Drawing --------------------------------------------------------------------------------------------------------

    def draw(self, order: list[str], after: Tensor, before: Tensor) -> Tensor:
        """Draw a token for every row; logits that leave any sampler no other choice, of the same shape as `after`.

        Args:
            order: request ids, row by row.
            after: logits, shape (rows, vocabulary of the after model).
            before: likewise of the before model.
        """
        assert len(order) == len(after), f"{len(order)} requests and {len(after)} rows of logits"
        width = self._vocabulary.width
        forced = torch.zeros_like(after, dtype=torch.float32)
        after, before = after[:, :width].float(), before[:, :width].float()
        specs = [self._spec(request_id) for request_id in order]
        ends = [self._positions[request_id][1] for request_id in order]
        new_tokens = [end - self._asks[i].prompt_tokens for i, end in zip(order, ends, strict=True)]
        settings = self._settings(order, specs)._replace(positions=torch.tensor(ends, device=self._device))
        drawable = rule_out_endings(after, specs, new_tokens)
        drawn = self._sampler.draw(drawable, before, settings)
        if self._reports:
            self._report(order, specs, after, drawable, before, drawn)
        return forced.scatter_(1, drawn.tokens[:, None], 1.0)

    def rehearse(self, after: Tensor, before: Tensor) -> Tensor:
        """What vLLM's dummy runs are given, so that the memory they measure is that of a draw: `after`, as it is."""
        width, rows = self._vocabulary.width, len(after)
        settings = columns([REHEARSED] * rows, self._device)
        settings = settings._replace(positions=torch.arange(rows, device=self._device))
        self._sampler.draw(after[:, :width].float(), before[:, :width].float(), settings)
        return after

    def _spec(self, request_id: str) -> RowSpec:
        ask = self._asks[request_id]
        return ask.spec if isinstance(ask, DrawAsk) else UNREAD

    def _settings(self, order: list[str], specs: list[RowSpec]) -> RowSampling:
        """The rows' settings as columns, which stay as long as the same rows go on."""
        if self._columns_of != order:
            self._columns_of, self._columns = list(order), columns(specs, self._device)
        return self._columns

    def _report(
        self, order: list[str], specs: list[RowSpec], after: Tensor, drawable: Tensor, before: Tensor, drawn: Drawn
    ) -> None:
        found = diagnose_rows(self._sampler, specs, after, before, drawn.tokens, self._vocabulary.pieces)
        scores = score_rows(self._sampler, specs, drawable, before, drawn.tokens)
        for i, (logprob, sound) in enumerate(zip(drawn.logprobs.tolist(), drawn.sound.tolist(), strict=True)):
            if isinstance(self._asks[order[i]], DrawAsk):
                known = logprob if logprob == logprob else None
                sums = tuple(scores[i].tolist()) if i in scores else ()
                self.answers[order[i]] = DrawAnswer(known, sound, found.get(i), sums)

    # Scoring --------------------------------------------------------------------------------------------------------

    def score(self, order: list[str], hidden_states: Tensor, both_logits: BothLogits) -> None:
        """Report what this step's positions say about forced tokens. Every rank of a stage calls it alike.

        Args:
            order: request ids in the order of their positions in the batch.
            hidden_states: shape (positions, width), what the pair's `forward` gave.
            both_logits: both models' logits of some of them; a collective operation.
        """
        at = 0
        for request_id in order:
            ask, (start, stop) = self._asks[request_id], self._positions[request_id]
            if isinstance(ask, ScoreAsk):
                first = max(start, ask.prompt_tokens - 1)
                rows = hidden_states[at + first - start : at + stop - start]
                blocks = list(self._blocks(ask, first + 1 - ask.prompt_tokens, rows, both_logits))
                self.answers[request_id] = [block for block in blocks if block is not None]
            at += stop - start

    def _blocks(self, ask: ScoreAsk, offset: int, rows: Tensor, both_logits: BothLogits) -> Any:
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = rows[start : start + SCORED_AT_ONCE]
            yield self._block(ask, offset + start, *both_logits(part))

    def _block(self, ask: ScoreAsk, offset: int, after: Tensor | None, before: Tensor | None) -> ScoreAnswer | None:
        if not self._reports or after is None or before is None:
            return None
        width = self._vocabulary.width
        ids = ask.continuation_ids[offset : offset + len(after)]
        logits = after[:, :width].float(), before[:, :width].float()
        records, sums = ask.scoring.apply(self._sampler, *logits, ids, self._vocabulary.pieces)
        return ScoreAnswer(offset, tuple(records), tuple(sums.tolist()))
