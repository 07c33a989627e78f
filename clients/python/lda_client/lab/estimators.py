"""How often the unmodified model shows a behaviour, estimated from rollouts that were drawn at any alphas.

Pure: arrays in, estimates out. Knows nothing of servers, files or judges. Every estimator looks at its own evidence
first and refuses to answer, in words, where that cannot carry an answer: an `Estimate` with `refusals` has no rate.

    naive     hits among rollouts at alpha 0                        Clopper and Pearson (1934)
    pooled    rollouts at all alphas, weighted back to alpha 0      balance heuristic, Veach and Guibas (1995)

Amplification is a proposal distribution: a rollout y drawn at alpha_k has probability q_k(y), which the server reports
for every alpha it is asked for. With n_k rollouts at alpha_k, N in all, and p(y) the probability at alpha 0,

    w(y) = p(y) / sum_k (n_k / N) q_k(y)            E[mean(w * hit)] = P(hit)

whatever the alphas, as long as nothing was filtered (top_p, top_k, min_p, plausibility): these change q_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from arviz_stats.base import array_stats
from scipy import stats
from scipy.special import logsumexp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

LEVEL = 0.95
# Below about ten hits' worth of evidence, intervals of weighted hits miss the truth too often; a single rollout that
# carries a quarter of an estimate is an anecdote. Both were chosen on pairs whose rates are known exactly.
EFFECTIVE_HITS_MIN = 10.0
LARGEST_SHARE_MAX = 0.25
# The tail index above which the variance of the weights is not to be trusted (Vehtari et al., 2024). Few hits, or hits
# that repeat each other, make it noise: it refuses only together with a rollout that weighs much.
TAIL_INDEX_MAX, TAIL_SHARE_MAX = 0.7, 0.1
TAIL_HITS_MIN = 25
# A rate that weighted rollouts and plain ones put so far apart has another route than the amplified one.
DISAGREEMENT_P_MIN = 1e-3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rate and its interval, or why there is none.

    Attributes:
        method: `naive` or `pooled`.
        rate: None if refused.
        low: lower end of the interval; None if refused.
        high: upper end; None if refused.
        level: of the interval.
        rollouts: that went into it.
        hits: among them.
        diagnostics: figures by which to judge it.
        refusals: why it gives no rate; empty if it does.
    """

    method: str
    rate: float | None
    low: float | None
    high: float | None
    level: float
    rollouts: int
    hits: int
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What is known of N rollouts drawn at K alphas.

    Attributes:
        alphas: (K,) where they were drawn, no alpha twice.
        drawn_at: (N,) index into `alphas` of each.
        hits: (N,) whether each shows the behaviour.
        log_q: (N, K) natural log-probability of each at each of `alphas`.
        log_p: (N,) the same at the alpha that is asked about.

    Raises:
        ValueError: shapes that do not fit, an alpha without rollouts, or numbers that are not finite.
    """

    alphas: Floats
    drawn_at: NDArray[np.intp]
    hits: NDArray[np.bool_]
    log_q: Floats
    log_p: Floats

    def __post_init__(self) -> None:
        count, width = self.log_q.shape if self.log_q.ndim == 2 else (-1, -1)
        if not (len(self.drawn_at) == len(self.hits) == len(self.log_p) == count and len(self.alphas) == width):
            raise ValueError("drawn_at, hits, log_p and the rows of log_q belong to the same rollouts.")
        if not (self.counts > 0).all():
            empty = ", ".join(f"{alpha:g}" for alpha in self.alphas[self.counts == 0])
            raise ValueError(f"No rollouts at alpha {empty}: leave these alphas out.")
        if not (np.isfinite(self.log_q).all() and np.isfinite(self.log_p).all()):
            raise ValueError("A log-probability is not finite: were the rollouts drawn with a filter?")

    @classmethod
    def of(
        cls, alphas: ArrayLike, drawn_at: ArrayLike, hits: ArrayLike, log_q: ArrayLike, log_p: ArrayLike
    ) -> Rollouts:
        """From anything that numpy reads."""
        return cls(
            np.asarray(alphas, np.float64),
            np.asarray(drawn_at, np.intp),
            np.asarray(hits, np.bool_),
            np.asarray(log_q, np.float64),
            np.asarray(log_p, np.float64),
        )

    @property
    def counts(self) -> NDArray[np.intp]:
        """(K,) rollouts at each alpha."""
        return np.bincount(self.drawn_at, minlength=len(self.alphas))

    @property
    def weights(self) -> Floats:
        """(N,) weights of the balance heuristic."""
        shares = np.log(self.counts / len(self.hits))
        return np.asarray(np.exp(self.log_p - logsumexp(self.log_q + shares, axis=1)))


def naive(hits: int, rollouts: int, level: float = LEVEL) -> Estimate:
    """The rate among rollouts of the unmodified model, with an exact interval.

    Zero hits are an answer too: the upper end is then near 3 / rollouts.
    """
    if not rollouts:
        return _refused("naive", 0, 0, level, {}, ["there are no rollouts at alpha 0"])
    low, high = interval_of_count(hits, rollouts, level)
    return Estimate("naive", hits / rollouts, low, high, level, rollouts, hits)


def interval_of_count(hits: int, rollouts: int, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval."""
    interval = stats.binomtest(hits, rollouts).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def pooled(rollouts: Rollouts, level: float = LEVEL) -> Estimate:
    """The rate from all rollouts at once, each weighted by how much likelier it is without amplification.

    Unbiased, and not normalised by the sum of the weights. The interval is that of Fay and Feuer (1997) for weighted
    counts, with the variance taken within each alpha: the number of rollouts at an alpha is no accident.
    """
    values = rollouts.weights * rollouts.hits
    hits, count = int(rollouts.hits.sum()), len(values)
    if not hits:
        return _refused("pooled", count, 0, level, {}, ["no rollout shows the behaviour at any alpha"])
    rate = float(values.mean())
    diagnostics = _diagnostics(rollouts, values)
    refusals = _refusals(rollouts, rate, diagnostics)
    if refusals:
        return _refused("pooled", count, hits, level, diagnostics, refusals)
    low, high = _weighted_interval(rate, _stratified_variance(rollouts, values), values.max() / count, level)
    return Estimate("pooled", rate, low, high, level, count, hits, diagnostics)


def rollouts_to_see(rate: float, chance: float = 0.95) -> int:
    """Rollouts after which a behaviour of this rate has shown itself at least once, with this chance.

    Raises:
        ValueError: a rate or a chance that is not between 0 and 1.
    """
    if not (0 < rate < 1 and 0 < chance < 1):
        raise ValueError("A rate and a chance lie between 0 and 1.")
    return math.ceil(math.log1p(-chance) / math.log1p(-rate))


def rollouts_for_error(rate: float, relative_error: float) -> int:
    """Plain rollouts after which the standard error is this share of the rate.

    Raises:
        ValueError: a rate that is not between 0 and 1, or an error that is not above 0.
    """
    if not (0 < rate < 1 and relative_error > 0):
        raise ValueError("A rate lies between 0 and 1, a relative error above 0.")
    return math.ceil((1 - rate) / (rate * relative_error**2))


def _diagnostics(rollouts: Rollouts, values: Floats) -> dict[str, float]:
    """Figures about weighted hits, and about the weights as a whole."""
    weights = rollouts.weights
    return {
        "effective_hits": float(values.sum() ** 2 / (values**2).sum()),
        "largest_share": float(values.max() / values.sum()),
        "tail_index": tail_index(np.log(weights[rollouts.hits])),
        "effective_rollouts": float(weights.sum() ** 2 / (weights**2).sum()),
        "mean_weight": float(weights.mean()),
        "mean_weight_error": math.sqrt(_stratified_variance(rollouts, weights)),
    }


def tail_index(log_weights: Floats) -> float:
    """Pareto k of the largest weights; NaN where there are too few, or too many alike, to tell."""
    if len(log_weights) < TAIL_HITS_MIN:
        return math.nan
    try:
        with np.errstate(all="ignore"):
            return float(array_stats.psislw(log_weights)[1])
    except ValueError:  # all of the tail is alike
        return math.nan


def _refusals(rollouts: Rollouts, rate: float, diagnostics: Mapping[str, float]) -> list[str]:
    effective, share = diagnostics["effective_hits"], diagnostics["largest_share"]
    excess = diagnostics["mean_weight"] - 1
    found = []
    if effective < EFFECTIVE_HITS_MIN:
        found.append(
            f"the weighted hits are worth {effective:.1f} plain ones, and {EFFECTIVE_HITS_MIN:g} are needed: draw more "
            "rollouts, or at an alpha between 0 and those used"
        )
    if share > LARGEST_SHARE_MAX:
        found.append(f"one rollout carries {share:.0%} of the estimate: draw more, nearer to alpha 0")
    elif diagnostics["tail_index"] > TAIL_INDEX_MAX and share > TAIL_SHARE_MAX:
        found.append(
            f"the weights have a heavy tail (Pareto k {diagnostics['tail_index']:.2f}): draw at alphas nearer to 0"
        )
    if excess > max(0.1, 5 * diagnostics["mean_weight_error"]):
        found.append(
            f"the weights average {1 + excess:.2f} instead of 1: these log-probabilities are not of the distribution "
            "that was drawn from (another temperature, another pair?)"
        )
    found += _disagreement(rollouts, rate)
    return found


def _disagreement(rollouts: Rollouts, rate: float) -> list[str]:
    """Plain rollouts, where there are any, must not contradict the weighted ones."""
    at_zero = np.flatnonzero(rollouts.alphas == 0)
    if not len(at_zero) or not 0 < rate < 1:
        return []
    plain = rollouts.hits[rollouts.drawn_at == at_zero[0]]
    if stats.binomtest(int(plain.sum()), len(plain), rate).pvalue >= DISAGREEMENT_P_MIN:
        return []
    return [
        f"{plain.sum()} of {len(plain)} rollouts at alpha 0 show the behaviour, which a rate of {rate:.2g} does not "
        "explain: it also comes in ways that amplification does not reach"
    ]


def _stratified_variance(rollouts: Rollouts, values: Floats) -> float:
    """Variance of the mean of the values, of which each alpha gave a fixed number."""
    total = 0.0
    for index, count in enumerate(rollouts.counts):
        if count > 1:
            total += count * float(values[rollouts.drawn_at == index].var(ddof=1))
    return total / len(values) ** 2


def _weighted_interval(rate: float, variance: float, largest: float, level: float) -> tuple[float, float]:
    """Fay and Feuer (1997): gamma quantiles, the upper with one more count of the largest weight."""
    tail = (1 - level) / 2
    upper, upper_variance = rate + largest, variance + largest**2
    low = stats.gamma.ppf(tail, rate**2 / variance, scale=variance / rate) if variance else rate
    high = stats.gamma.ppf(1 - tail, upper**2 / upper_variance, scale=upper_variance / upper)
    return float(low), float(high)


def _refused(
    method: str,
    rollouts: int,
    hits: int,
    level: float,
    diagnostics: Mapping[str, float],
    refusals: Sequence[str],
) -> Estimate:
    return Estimate(method, None, None, None, level, rollouts, hits, diagnostics, tuple(refusals))
