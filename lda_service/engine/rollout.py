"""One sequence as its reader gets it: text in whole characters, where it ends and why, its times and scores.

Knows requests, draws' records and the vocabulary's bytes; nothing of models, rows or schedules. Time is what its owner
says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lda_service.engine.detokenizer import TextStream
from lda_service.engine.request import FinishReason, SequenceDelta, SequenceFinished
from lda_service.engine.rows import RowSpec, row_spec

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.detokenizer import TokenPieces
    from lda_service.engine.request import Branch, Event, GenerationRequest, TokenRecord


@dataclass(eq=False, slots=True)
class Rollout:
    """A sequence's course. Every method that makes events returns them in order.

    `longest` is the number of new tokens that it may get here: what was asked for, or what the context leaves.
    """

    request: GenerationRequest
    branch: Branch
    index: int
    longest: int
    spec: RowSpec
    stop_ids: frozenset[int]
    text: TextStream
    alpha_scores: Tensor  # sums so far, (score alphas,), float64
    count: int = field(default=0)
    first_token_at: float = field(default=0.0)
    has_ended: bool = field(default=False)

    @classmethod
    def begin(
        cls,
        request: GenerationRequest,
        branch: Branch,
        index: int,
        longest: int,
        pieces: TokenPieces,
        stop_ids: frozenset[int],
    ) -> Rollout:
        """A sequence without tokens."""
        return cls(
            request,
            branch,
            index,
            longest,
            row_spec(request, branch, index, stop_ids),
            stop_ids,
            TextStream(pieces, request.stopping.stop_strings),
            torch.zeros(len(request.output.score_alphas), dtype=torch.float64),
        )

    def push(self, record: TokenRecord, now: float, admitted_at: float) -> list[Event]:
        """Take its next token: what became final through it, and the end if it ends the sequence."""
        if not self.count:
            self.first_token_at = now
        self.count += 1
        stopping, token = self.request.stopping, record.token_id
        if token in self.stop_ids and not stopping.ignore_eos:
            return self.end(FinishReason.EOS, now, admitted_at, record)
        if token in stopping.stop_token_ids:
            return self.end(FinishReason.STOP, now, admitted_at, record, stop_token_id=token)
        released = self.text.push(record)
        events = self._delta(released.text, released.tokens)
        if released.stop_string is not None:
            events.append(self._finished(FinishReason.STOP, now, admitted_at, stop_string=released.stop_string))
        elif self.count == self.longest:
            cut = self.longest < stopping.max_new_tokens
            events += self.end(FinishReason.CONTEXT_WINDOW if cut else FinishReason.MAX_TOKENS, now, admitted_at)
        return events

    def end(
        self,
        reason: FinishReason,
        now: float,
        admitted_at: float,
        last: TokenRecord | None = None,
        *,
        stop_token_id: int | None = None,
    ) -> list[Event]:
        """Release what is held and report the end. `last` is the token that ends it and adds no text."""
        released = self.text.flush()
        events = self._delta(released.text, released.tokens + ((last,) if last else ()))
        events.append(self._finished(reason, now, admitted_at, stop_token_id=stop_token_id))
        return events

    def _delta(self, text: str, tokens: tuple[TokenRecord, ...]) -> list[Event]:
        if not (text or tokens):
            return []
        return [SequenceDelta(self.request.request_id, self.branch.role, self.index, text, tokens)]

    def _finished(
        self,
        reason: FinishReason,
        now: float,
        admitted_at: float,
        *,
        stop_string: str | None = None,
        stop_token_id: int | None = None,
    ) -> SequenceFinished:
        self.has_ended = True
        first = self.first_token_at or now
        return SequenceFinished(
            self.request.request_id,
            self.branch.role,
            self.index,
            reason,
            self.count,
            stop_string,
            stop_token_id,
            tuple(self.alpha_scores.tolist()),
            prefill_s=first - admitted_at,
            decode_s=now - first,
        )
