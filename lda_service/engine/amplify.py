"""The formula, pure. Knows tensors of logits; nothing of models, sampling or requests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOVELTY_TOP = 100


def amplify(after: Tensor, before: Tensor, alpha: Tensor, *, capturable: bool = False) -> Tensor:
    """Logit diff amplification: `after + alpha * (after - before)`, row by row (Goodfire, 2025).

    Alpha 0 is `after` exactly and alpha -1 is `before` exactly. An id that `after` rules out (-inf) stays ruled out;
    where only `before` rules one out, `before` counts as the lowest finite logit of its row, so that nothing becomes
    NaN or +inf. Nothing is clamped.

    Args:
        after: float32 logits, shape (rows, vocabulary).
        before: float32 logits, same shape.
        alpha: float32, shape (rows,).
        capturable: never ask the device for a value: a CUDA graph can be made of it. Costs two passes more.

    Returns:
        float32 logits, shape (rows, vocabulary).
    """
    scale = alpha[:, None]
    if capturable or torch.isneginf(before).any():
        before = torch.where(torch.isneginf(before) & ~torch.isneginf(after), lowest_finite(before), before)
    amplified = torch.where(scale == -1, before, after + scale * (after - before))
    has_ruled_out = capturable or torch.isneginf(after).any()
    return torch.where(torch.isneginf(after), after, amplified) if has_ruled_out else amplified


def lowest_finite(logits: Tensor) -> Tensor:
    """The smallest finite value of each row, shape (rows, 1)."""
    return torch.where(torch.isfinite(logits), logits, torch.inf).amin(-1, keepdim=True)


class Comparison(NamedTuple):
    """How the two models disagree about the next token, for each row; see `request.Diagnostics`."""

    after_logprob: Tensor
    before_logprob: Tensor
    amplified_logprob: Tensor
    after_rank: Tensor
    before_rank: Tensor
    amplified_rank: Tensor
    after_before_kl: Tensor
    novel_mass: Tensor
    critical_alpha: Tensor
    critical_token: Tensor


def compare(after: Tensor, before: Tensor, amplified: Tensor, tokens: Tensor) -> Comparison:
    """Everything reported about one position.

    Args:
        after: log-probabilities, float32, shape (rows, vocabulary); -inf where an id may not be generated.
        before: likewise.
        amplified: likewise.
        tokens: the ids in question, int64, shape (rows,).
    """
    at = tokens[:, None]
    log_ratio = torch.nan_to_num(after - before, nan=0.0, posinf=torch.inf)
    outside = torch.ones_like(after, dtype=torch.bool)
    outside.scatter_(1, before.topk(min(NOVELTY_TOP, before.shape[1])).indices, False)
    drawn = [logprobs.gather(1, at) for logprobs in (after, before, amplified)]
    ranks = [1 + (all_ > one).sum(1) for all_, one in zip((after, before, amplified), drawn, strict=True)]
    kl = (after.exp() * log_ratio).sum(1)
    novel_mass = (amplified.exp() * outside).sum(1)
    return Comparison(*(one[:, 0] for one in drawn), *ranks, kl, novel_mass, *critical_alpha(after, before))  # type: ignore[call-arg]


def critical_alpha(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest alpha > 0 at which `after`'s top token i is overtaken, and by which token.

    Token j overtakes at (a_i - a_j) / (d_j - d_i) with d = after - before, if d_j > d_i.

    Args:
        after: logits or log-probabilities, shape (rows, vocabulary).
        before: likewise.

    Returns:
        alphas, float32 of shape (rows,), inf where no token overtakes; token ids, int64 of shape (rows,).
    """
    difference = torch.nan_to_num(after - before, nan=-torch.inf)
    top = after.argmax(1, keepdim=True)
    gap = after.gather(1, top) - after
    slope = difference - difference.gather(1, top)
    crossing = torch.where((slope > 0) & torch.isfinite(gap), gap / slope, torch.inf)
    smallest = crossing.min(1)
    return smallest.values, smallest.indices


def score(after: Tensor, before: Tensor, tokens: Tensor, alphas: Tensor, temperature: Tensor) -> Tensor:
    """log q_alpha(token) for every row and alpha, without filters.

    Args:
        after: float32 logits, shape (rows, vocabulary); -inf where an id may not be generated.
        before: likewise.
        tokens: int64, shape (rows,).
        alphas: float32, shape (alphas,).
        temperature: float32, shape (rows,), above 0.

    Returns:
        float64, shape (rows, alphas).
    """
    columns = []
    for alpha in alphas:
        logits = amplify(after, before, alpha.expand(len(after))) / temperature[:, None]
        columns.append(logits.gather(1, tokens[:, None])[:, 0].double() - logits.double().logsumexp(1))
    return torch.stack(columns, 1) if columns else torch.zeros(len(after), 0, dtype=torch.float64)
