"""What goes with a sequence to the ranks that run the models, and what comes back of each step. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda_service.engine.request import Diagnostics, TokenRecord
    from lda_service.engine.rows import RowSpec, Scoring

KEY = "lda"  # in the `extra_args` of vLLM's sampling parameters, and of a step's output


@dataclass(frozen=True, slots=True)
class DrawAsk:
    """Draw the tokens after a prompt of this length."""

    spec: RowSpec
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """Report the continuation's tokens, which stand behind the prompt in what is run; draw nothing that counts."""

    scoring: Scoring
    prompt_tokens: int
    continuation_ids: tuple[int, ...]


Ask = DrawAsk | ScoreAsk


@dataclass(frozen=True, slots=True)
class DrawAnswer:
    """Of one drawn token. `sound`: whether its logits were finite; `scores` follow the order of the score alphas."""

    logprob: float | None
    sound: bool
    diagnostics: Diagnostics | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreAnswer:
    """Of positions `offset` and following of a continuation, and the sums of their scores."""

    offset: int
    records: tuple[TokenRecord, ...]
    sums: tuple[float, ...]


Answer = DrawAnswer | ScoreAnswer
