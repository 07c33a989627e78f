"""What is reported about a position: the comparison of two models as `Diagnostics`. Knows logits and token pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lda_service.engine.amplify import compare
from lda_service.engine.request import Candidate, Diagnostics

if TYPE_CHECKING:
    from torch import Tensor

    from lda_service.engine.detokenizer import TokenPieces

INFINITY = float("inf")


def diagnose(
    after: Tensor, before: Tensor, amplified: Tensor, tokens: Tensor, candidate_counts: list[int], pieces: TokenPieces
) -> list[Diagnostics]:
    """Diagnostics of each row.

    Args:
        after: float32 logits, shape (rows, vocabulary); -inf where an id may not be generated.
        before: likewise.
        amplified: likewise.
        tokens: int64, shape (rows,): the ids drawn or forced.
        candidate_counts: alternatives wanted for each row.
        pieces: the bytes of every id.
    """
    after, before, amplified = (logits.log_softmax(-1) for logits in (after, before, amplified))
    values = zip(*(column.tolist() for column in compare(after, before, amplified, tokens)), strict=True)
    candidates = _candidates(after, before, amplified, candidate_counts, pieces)
    return [_diagnostics(row, alternatives, pieces) for row, alternatives in zip(values, candidates, strict=True)]


def _diagnostics(row: tuple[float, ...], candidates: tuple[Candidate, ...], pieces: TokenPieces) -> Diagnostics:
    *values, critical_alpha, critical_token = row
    if critical_alpha == INFINITY:
        return Diagnostics(*values, None, None, b"", candidates)  # type: ignore[call-arg, arg-type]
    token = int(critical_token)
    return Diagnostics(*values, critical_alpha, token, pieces.piece(token), candidates)  # type: ignore[call-arg, arg-type]


def _candidates(
    after: Tensor, before: Tensor, amplified: Tensor, counts: list[int], pieces: TokenPieces
) -> list[tuple[Candidate, ...]]:
    """The likeliest alternatives of each row under the amplified distribution."""
    top = amplified.topk(min(max(counts), amplified.shape[1]), dim=1).indices
    columns = (top, *(logprobs.gather(1, top) for logprobs in (amplified, after, before)))
    found = []
    for count, *row in zip(counts, *(column.tolist() for column in columns), strict=True):
        likeliest = list(zip(*row, strict=True))[:count]
        found.append(tuple(Candidate(i, pieces.piece(i), *p) for i, *p in likeliest if p[0] > -INFINITY))
    return found
