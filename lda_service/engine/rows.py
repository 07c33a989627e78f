"""What a row of a step is drawn with, and what is reported of a draw: one definition for every engine.

Knows requests, the sampler and logits of both models; nothing of where logits come from, of caches or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lda_service.engine.amplify import amplify, score
from lda_service.engine.evidence import diagnose
from lda_service.engine.request import Role, TokenRecord
from lda_service.engine.sampling import RowSampling, sequence_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lda_service.engine.detokenizer import TokenPieces
    from lda_service.engine.request import Branch, Diagnostics, GenerationRequest
    from lda_service.engine.sampling import Sampler


@dataclass(frozen=True, slots=True)
class RowSpec:
    """All that a sequence's draws depend on, besides logits and positions. Plain data, which may cross processes.

    `endings` may not be drawn while the sequence has fewer than `min_new_tokens` new tokens.
    """

    alpha: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    plausibility: float
    key: int
    min_new_tokens: int
    endings: tuple[int, ...]
    diagnostics: bool
    top_candidates: int
    score_alphas: tuple[float, ...]

    @property
    def is_bare(self) -> bool:
        """Whether nothing but the token is asked for."""
        return not (self.diagnostics or self.score_alphas)


def row_spec(request: GenerationRequest, branch: Branch, index: int, stop_ids: frozenset[int]) -> RowSpec:
    """The spec of one sequence; `stop_ids` end a sequence of this pair."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    return RowSpec(
        alpha=branch.alpha,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        plausibility=0.0 if branch.role is Role.BEFORE else sampling.plausibility,
        key=sequence_key(sampling.seed, index),
        min_new_tokens=stopping.min_new_tokens,
        endings=tuple(sorted(stop_ids | set(stopping.stop_token_ids))),
        diagnostics=wants_diagnostics(request),
        top_candidates=output.top_candidates,
        score_alphas=output.score_alphas,
    )


def wants_diagnostics(request: GenerationRequest) -> bool:
    """Whether each token's comparison of the two models is asked for."""
    return request.output.diagnostics or request.output.top_candidates > 0


def columns(specs: Sequence[RowSpec], device: torch.device) -> RowSampling:
    """The specs as columns; positions are left empty, since they alone change from step to step."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return RowSampling(
        alpha=column([spec.alpha for spec in specs]),
        temperature=column([spec.temperature for spec in specs]),
        top_k=column([spec.top_k for spec in specs], torch.int64),
        top_p=column([spec.top_p for spec in specs]),
        min_p=column([spec.min_p for spec in specs]),
        plausibility=column([spec.plausibility for spec in specs]),
        keys=column([spec.key for spec in specs], torch.int64),
        positions=column([], torch.int64),
    )


def rule_out_endings(after: Tensor, specs: Sequence[RowSpec], new_tokens: Sequence[int]) -> Tensor:
    """The after model's logits of the ids that may be drawn now: no ending before its time.

    Args:
        after: shape (rows, vocabulary); left as it is.
        specs: one for each row.
        new_tokens: how many each row has.
    """
    early = [i for i, (spec, count) in enumerate(zip(specs, new_tokens, strict=True)) if count < spec.min_new_tokens]
    if not early:
        return after
    drawable = after.clone()
    for i in early:
        drawable[i, [token for token in specs[i].endings if token < after.shape[1]]] = -torch.inf
    return drawable


def diagnose_rows(
    sampler: Sampler, specs: Sequence[RowSpec], after: Tensor, before: Tensor, tokens: Tensor, pieces: TokenPieces
) -> dict[int, Diagnostics]:
    """Diagnostics by row, for the rows that asked.

    Args:
        sampler: knows which ids may never be drawn.
        specs: one for each row.
        after: float32 logits, shape (rows, vocabulary).
        before: likewise.
        tokens: the ids drawn, int64, shape (rows,).
        pieces: the bytes of every id.
    """
    rows = [i for i, spec in enumerate(specs) if spec.diagnostics]
    if not rows:
        return {}
    counts = [specs[i].top_candidates for i in rows]
    after, before = sampler.forbid(after[rows]), sampler.forbid(before[rows])
    alpha = torch.tensor([specs[i].alpha for i in rows], device=after.device)
    logits = after, before, amplify(after, before, alpha)
    return dict(zip(rows, diagnose(*logits, tokens[rows], counts, pieces), strict=True))


def score_rows(
    sampler: Sampler, specs: Sequence[RowSpec], drawable: Tensor, before: Tensor, tokens: Tensor, *, alone: bool = False
) -> dict[int, Tensor]:
    """log q_alpha of the drawn tokens by row, for the rows that asked: float64 on the CPU, shape (score alphas,).

    Args:
        sampler: knows which ids may never be drawn.
        specs: one for each row.
        drawable: what `rule_out_endings` gave.
        before: float32 logits, shape (rows, vocabulary).
        tokens: the ids drawn, int64, shape (rows,).
        alone: row by row, if results may not depend on company: how torch sums a row depends on how many there are.
    """
    groups: dict[object, list[int]] = {}
    for i, spec in enumerate(specs):
        if spec.score_alphas:
            groups.setdefault(i if alone else spec.score_alphas, []).append(i)
    found: dict[int, Tensor] = {}
    for rows in groups.values():
        alphas = torch.tensor(specs[rows[0]].score_alphas, device=drawable.device)
        temperature = torch.tensor([specs[i].temperature or 1.0 for i in rows], device=drawable.device)
        logits = sampler.forbid(drawable[rows]), sampler.forbid(before[rows])
        found.update(zip(rows, score(*logits, tokens[rows], alphas, temperature).cpu(), strict=True))
    return found


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is asked about each position of a scored text. Plain data, which may cross processes."""

    alpha: float
    top_candidates: int
    score_alphas: tuple[float, ...]

    def apply(
        self, sampler: Sampler, after: Tensor, before: Tensor, ids: Sequence[int], pieces: TokenPieces
    ) -> tuple[list[TokenRecord], Tensor]:
        """Records of forced tokens, and the sum of their scores at each of the score alphas, float64 on the CPU.

        Args:
            sampler: knows which ids may never be drawn.
            after: float32 logits that predict them, shape (tokens, vocabulary).
            before: likewise.
            ids: the tokens.
            pieces: the bytes of every id.
        """
        after, before = sampler.forbid(after), sampler.forbid(before)
        tokens = torch.tensor(ids, dtype=torch.int64, device=after.device)
        amplified = amplify(after, before, torch.full_like(after[:, 0], self.alpha))
        found = diagnose(after, before, amplified, tokens, [self.top_candidates] * len(ids), pieces)
        alphas = torch.tensor(self.score_alphas, device=after.device)
        sums = score(after, before, tokens, alphas, torch.ones_like(after[:, 0])).sum(0).cpu()
        records = [TokenRecord(i, pieces.piece(i), None, diagnosis) for i, diagnosis in zip(ids, found, strict=True)]
        return records, sums
