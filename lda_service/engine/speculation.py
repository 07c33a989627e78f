"""Several tokens in one step, exactly: the after model drafts, one pass of the before model says which drafts stand.

A block is k one-token passes of the after model, which draw k drafts, then one pass of the before model over the k
positions. Now both models' logits are known at each of them, so each draft can be held against the law q that the
request asks for. Drafts stand up to the first that does not, which is replaced by a draw that makes the law exact. No
token follows the last draft that stands: the after model has not run on it. So a block gives 1 to k tokens at the cost
of k + 1 passes instead of 2k. Two rules say what stands; both need no generator, only noise that is hashed from
(sequence, position), so that a row's neighbours do not matter.

Knows both models' passes, laws and draws; nothing of requests. When a block pays is `speculation_policy`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from lda_service.engine.sampling import RowSampling, Sampler, uniform_noise

if TYPE_CHECKING:
    from lda_service.engine.lockstep import PairRunner
    from lda_service.engine.scheduler import Sequence

# What a uniform number decides.
_DRAFT, _ACCEPT, _RESIDUAL = -1, -2, -3


class Settled(NamedTuple):
    """What became of a block's drafts. Shapes (rows, drafts) but for `accepted`, (rows,).

    The first `accepted` tokens are drafts; the next, if there is one, replaces a draft; the rest mean nothing.
    `logprobs` and `sound` are as in `sampling.Drawn`.
    """

    tokens: Tensor
    logprobs: Tensor
    sound: Tensor
    accepted: Tensor


class Rule(Protocol):
    """Draws drafts and says which of them stand."""

    def draft(self, after: Tensor, rows: RowSampling) -> Tensor:
        """One draft for each row from the after model's logits, shape (rows, vocabulary); int64, shape (rows,)."""

    def settle(self, after: Tensor, before: Tensor, drafts: Tensor, rows: RowSampling) -> Settled:
        """Hold all drafts, shape (rows, drafts), against logits of shape (rows, drafts, vocabulary)."""


class Rejection:
    """Leviathan et al. (2211.17192), Chen et al. (2302.01318): most drafts stand that any rule can let stand.

    A draft x is drawn from p, the after model's law under the row's temperature and filters, and stands with
    probability min(1, q(x) / p(x)); what replaces it is drawn from (q - p)+. The law of the tokens is q, but they are
    not the tokens that the same seed gives without speculation.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._laws: list[Tensor] = []

    def draft(self, after: Tensor, rows: RowSampling) -> Tensor:
        """See `Rule`."""
        self._laws.append(self._sampler.law(after, after, _at_alpha_0(rows)))
        return draw_from(self._laws[-1], uniform_noise(rows.keys, rows.positions, _DRAFT))

    def settle(self, after: Tensor, before: Tensor, drafts: Tensor, rows: RowSampling) -> Settled:
        """See `Rule`."""
        spread = _spread(rows, drafts.shape[1])
        # The last ones: a block that ran out of memory may have left laws behind.
        p, self._laws = torch.stack(self._laws[-drafts.shape[1] :], 1), []
        q = self._sampler.law(after.flatten(0, 1), before.flatten(0, 1), spread).view_as(p)
        noise = [uniform_noise(spread.keys, spread.positions, tag).view_as(drafts) for tag in (_ACCEPT, _RESIDUAL)]
        tokens, accepted = accept_or_replace(p, q, drafts, *noise)
        chosen = q.gather(2, tokens[..., None])[..., 0]
        logprobs = torch.where(rows.temperature[:, None] > 0, chosen.log(), torch.nan)
        return Settled(tokens, logprobs, ~chosen.isnan(), accepted)


class Coupled:
    """A draft stands if it is the token that the row draws without speculation: drafts share its noise.

    Exact without any argument about laws: the tokens of a seed are the same with and without speculation, in blocks of
    any length. Fewer drafts stand than under `Rejection`: at least (1 - d) / (1 + d) of them where it lets 1 - d stand
    (Daliri, Musco, Suresh, 2408.07978).
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def draft(self, after: Tensor, rows: RowSampling) -> Tensor:
        """See `Rule`."""
        return self._sampler.draw(after, after, _at_alpha_0(rows)).tokens

    def settle(self, after: Tensor, before: Tensor, drafts: Tensor, rows: RowSampling) -> Settled:
        """See `Rule`."""
        spread = _spread(rows, drafts.shape[1])
        drawn = self._sampler.draw(after.flatten(0, 1), before.flatten(0, 1), spread)
        tokens, logprobs, sound = (column.view_as(drafts) for column in drawn)
        return Settled(tokens, logprobs, sound, _leading(sound & (tokens == drafts)))


class Yield(NamedTuple):
    """What one row got from a block: each token with its log-probability and whether its logits were finite."""

    tokens: list[tuple[int, float, bool]]
    accepted: int  # drafts that stood
    tried: int  # drafts that were held against the law: those that stood and the one that did not


class Speculation:
    """Runs blocks.

    Args:
        models: both models.
        rule: what stands.
    """

    def __init__(self, models: PairRunner, rule: Rule) -> None:
        self._models = models
        self._rule = rule
        self.drafted = 0
        self.accepted = 0

    def run(self, sequences: list[Sequence], length: int, rows: RowSampling) -> list[Yield]:
        """1 to `length` tokens for each sequence; both caches stand where the tokens end.

        Args:
            sequences: they need both models; those of one prompt stand together.
            length: drafts for each; the sequences have room for as many tokens.
            rows: settings, with the positions of the first token to draw.
        """
        ids = [self._models.last_tokens(sequences)]
        after = []
        for offset in range(length):
            after.append(self._models.draft(sequences, ids[-1], offset))
            ids.append(self._rule.draft(after[-1], rows._replace(positions=rows.positions + offset))[:, None])
        before = self._models.verify(sequences, torch.cat(ids[:-1], 1))
        settled = self._rule.settle(torch.stack(after, 1), before, torch.cat(ids[1:], 1), rows)
        yields = _yields(settled)
        self._models.keep(sequences, [len(one.tokens) for one in yields])
        self.drafted += length * len(sequences)
        self.accepted += sum(one.accepted for one in yields)
        return yields


def draw_from(weights: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulated weights: indices, int64, shape (...).

    Args:
        weights: float64, shape (..., n), not negative; they need not add up to 1. An entry of 0 is never drawn.
        uniform: float64, shape (...), strictly between 0 and 1.
    """
    cumulated = weights.cumsum(-1)
    at = torch.searchsorted(cumulated, (uniform * cumulated[..., -1])[..., None], right=True)[..., 0]
    # Rows of NaN, which are reported as such, must still give an id.
    return at.clamp_(max=weights.shape[-1] - 1)


def accept_or_replace(p: Tensor, q: Tensor, drafts: Tensor, accept: Tensor, replace: Tensor) -> tuple[Tensor, Tensor]:
    """Which drafts stand, and what replaces the first that does not.

    Args:
        p: what the drafts were drawn from, float64, shape (rows, drafts, vocabulary).
        q: what the tokens shall follow, likewise.
        drafts: int64, shape (rows, drafts).
        accept: uniform numbers, float64, shape (rows, drafts).
        replace: likewise.

    Returns:
        tokens, int64 of shape (rows, drafts), and how many drafts stand, int64 of shape (rows,).
    """
    at = drafts[..., None]
    stands = accept * p.gather(2, at)[..., 0] < q.gather(2, at)[..., 0]
    accepted = _leading(stands)
    first = accepted.clamp(max=drafts.shape[1] - 1)[:, None]
    row = torch.arange(len(drafts), device=drafts.device)[:, None]
    residual = (q[row, first] - p[row, first]).clamp_(min=0)
    # Where p and q differ by rounding alone, nothing may be left of their difference.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q[row, first])
    replaced = draw_from(residual, replace.gather(1, first))
    fails = (accepted < drafts.shape[1])[:, None]
    tokens = drafts.scatter(1, first, torch.where(fails, replaced, drafts.gather(1, first)))
    return tokens, accepted


def _leading(flags: Tensor) -> Tensor:
    """How many flags of each row hold before the first that does not."""
    return flags.long().cumprod(1).sum(1)


def _at_alpha_0(rows: RowSampling) -> RowSampling:
    return rows._replace(alpha=torch.zeros_like(rows.alpha))


def _spread(rows: RowSampling, count: int) -> RowSampling:
    """The settings of `count` consecutive positions for each row."""
    spread = RowSampling(*(setting.repeat_interleave(count) for setting in rows))
    steps = torch.arange(count, device=rows.positions.device).repeat(len(rows.positions))
    return spread._replace(positions=spread.positions + steps)


def _yields(settled: Settled) -> list[Yield]:
    length = settled.tokens.shape[1]
    yields = []
    for tokens, logprobs, sound, accepted in zip(*(column.tolist() for column in settled), strict=True):
        count = min(accepted + 1, length)
        yields.append(Yield(list(zip(tokens, logprobs, sound, strict=True))[:count], accepted, count))
    return yields
