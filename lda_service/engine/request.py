"""What is asked of the engine and what comes out of it, as plain data.

These types cross the pipe between server and worker, and both sides import them. This module knows neither torch nor
tokenizers, and nothing of the wire format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda_service.errors import LdaError


class Role(Enum):
    """Which distribution a sequence is drawn from. Everything is an alpha: AFTER is 0, BEFORE is -1."""

    AFTER = "after"
    BEFORE = "before"
    AMPLIFIED = "amplified"


class FinishReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_WINDOW = "context_window"
    TIME_BUDGET = "time_budget"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; `top_k` 0, `min_p` 0 and `plausibility` 0 are off."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    plausibility: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends, besides the pair's end-of-sequence ids."""

    max_new_tokens: int = 80
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    time_budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What is reported besides ids and text."""

    diagnostics: bool = False
    top_candidates: int = 0
    score_alphas: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One group of sequences of a request: all at one alpha."""

    role: Role
    alpha: float


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`num_sequences` rollouts of one prompt for each branch. `GenerateBoth` is two branches, at 0 and -1."""

    request_id: str
    prompt_ids: tuple[int, ...]
    branches: tuple[Branch, ...]
    num_sequences: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    output: Output = field(default_factory=Output)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Teacher-force `continuation_ids` after `prompt_ids` through both models."""

    request_id: str
    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    alpha: float = 1.0
    top_candidates: int = 0
    score_alphas: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """An alternative at one position; natural logarithms at temperature 1."""

    token_id: int
    piece: bytes
    amplified_logprob: float
    after_logprob: float
    before_logprob: float


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """How the two models disagree at one position.

    Natural logarithms; distributions at temperature 1 over the shared vocabulary, before any filter; ranks from 1.
    `critical_alpha` is the smallest alpha > 0 at which the after model's top token is overtaken, by
    `critical_token_id`; both are None if no alpha does that.
    """

    after_logprob: float
    before_logprob: float
    amplified_logprob: float
    after_rank: int
    before_rank: int
    amplified_rank: int
    after_before_kl: float
    novel_mass: float
    critical_alpha: float | None
    critical_token_id: int | None
    critical_piece: bytes
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token. `logprob` is under the distribution it was drawn from; None when greedy or scored."""

    token_id: int
    piece: bytes
    logprob: float | None = None
    diagnostics: Diagnostics | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request left the queue: its first sequence has a row."""

    request_id: str


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """New tokens of one sequence, and the text they made final (whole UTF-8 characters)."""

    request_id: str
    role: Role
    sequence_index: int
    text: str
    tokens: tuple[TokenRecord, ...]


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """The end of one sequence. `alpha_scores` follow the order of `Output.score_alphas`."""

    request_id: str
    role: Role
    sequence_index: int
    reason: FinishReason
    output_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    alpha_scores: tuple[float, ...] = ()
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreBlock:
    """Scored positions `offset` and following of a continuation of `total_tokens`; the last block has the scores."""

    request_id: str
    offset: int
    tokens: tuple[TokenRecord, ...]
    total_tokens: int
    is_last: bool
    alpha_scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request ended with an error; nothing more follows for it."""

    request_id: str
    error: LdaError


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, and two counts since it was loaded.

    `pages_free` counts pages that nobody holds, whether or not they keep a known prompt. `reused_prompt_tokens` counts
    prompt positions that a model found in its cache.
    """

    running_sequences: int = 0
    waiting_requests: int = 0
    pages_free: int = 0
    pages_total: int = 0
    reused_prompt_tokens: int = 0
    preemptions: int = 0


Event = Admitted | SequenceDelta | SequenceFinished | ScoreBlock | RequestFailed
