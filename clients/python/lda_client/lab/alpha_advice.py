"""Choosing alpha: how far amplified text is from what the unmodified model says, and how coherent it still is.

    advice = advise(Run.open("runs/small"), kl_budget=1.0, coherence=0.7)
    advice.alpha                 # the largest alpha within both, None if none is
    advice.curve                 # one `AlphaPoint` for each alpha

Everything is a mean over tokens, so that long and short rollouts weigh as they read. With log p the log-probability of
a rollout in the unmodified model and log q that at the alpha at which it was drawn, both at the run's temperature:

    extra surprise    mean over tokens of log p, of rollouts at alpha 0, minus the same of the amplified rollouts
    divergence        mean over tokens of log q - log p of the amplified rollouts: an estimate of the KL divergence
                      per token of the amplified model from the unmodified one

Intervals are percentiles of a bootstrap over rollouts, within each alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lda_client.lab._errors import RunError
from lda_client.lab.agreement import Interval
from lda_client.lab.estimators import LEVEL

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl
    from numpy.typing import NDArray

    from lda_client.lab.estimators import Floats
    from lda_client.lab.runs import Run

KL_BUDGET = 1.0
COHERENCE = 0.7
RESAMPLES = 999
NGRAM = 2
ENDED = ("EOS", "STOP")


class AdviceError(RunError):
    """A run from which no alpha can be chosen."""


@dataclass(frozen=True, slots=True)
class AlphaPoint:
    """What text at one alpha is like.

    Attributes:
        alpha: where.
        rollouts: drawn there.
        surprise: minus the mean log p of a token, in nats.
        extra_surprise: beyond that of text at alpha 0, in nats per token.
        divergence: mean log q - log p of a token, in nats.
        kl_after_before: mean KL(after || before) over the tokens, in nats; NaN without stored diagnostics.
        distinct: of the pairs of neighbouring tokens of a rollout, the share that are distinct; the mean over rollouts.
        ended: share of rollouts that ended by themselves before the cap on tokens.
        coherence: the smaller of `distinct` and `ended`, each as a share of what it is at alpha 0.
        reasons: why this alpha is too much; empty if it is not.
    """

    alpha: float
    rollouts: int
    surprise: float
    extra_surprise: Interval
    divergence: float
    kl_after_before: float
    distinct: float
    ended: float
    coherence: Interval
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer of `advise`.

    Attributes:
        alpha: the largest within both limits, such that all smaller ones above 0 are too; None if there is none.
        kl_budget: extra surprise allowed, in nats per token.
        coherence: allowed, as a share of what it is at alpha 0.
        budget_alpha: where the curve of extra surprise crosses the budget, by a line between neighbours; None if it
            does not.
        curve: one point for each alpha, ascending.
        level: of the intervals.
    """

    alpha: float | None
    kl_budget: float
    coherence: float
    budget_alpha: float | None
    curve: tuple[AlphaPoint, ...]
    level: float


@dataclass(frozen=True, slots=True)
class _Texts:
    """The rollouts at one alpha, as arrays over rollouts."""

    alpha: float
    log_p: Floats
    log_q: Floats
    tokens: Floats
    distinct: Floats  # NaN where a rollout has no pair of tokens
    ended: Floats
    kl: Floats | None  # sums over tokens


def advise(run: Run, kl_budget: float = KL_BUDGET, coherence: float = COHERENCE, level: float = LEVEL) -> Advice:
    """The largest alpha of a run at which its text is not too far from the unmodified model's.

    An alpha is within a limit if its whole interval is: the upper end of its extra surprise, the lower end of its
    coherence.

    Args:
        run: with rollouts at alpha 0 and at some alphas above it, scored (not drawn with --no-estimate).
        kl_budget: extra surprise allowed, in nats per token.
        coherence: the share of alpha 0's distinct pairs, and of its rollouts that end by themselves, that must be left.
        level: of the intervals.

    Raises:
        AdviceError: the run has no scores, nothing at alpha 0, or nothing above it.
    """
    texts = _texts(run)
    plain = next(each for each in texts if each.alpha == 0)
    curve = tuple(_point(each, plain, kl_budget, coherence, level) for each in texts)
    above = [point for point in curve if point.alpha > 0]
    first_out = next((place for place, point in enumerate(above) if point.reasons), len(above))
    chosen = above[first_out - 1].alpha if first_out else None
    return Advice(chosen, kl_budget, coherence, _crossing(curve, kl_budget), curve, level)


def _texts(run: Run) -> list[_Texts]:
    if not run.manifest.score_alphas:
        raise AdviceError(
            f"{run.path}: was drawn with --no-estimate and has no scores; draw a small survey without it."
        )
    columns = ["alpha", "token_ids", "output_tokens", "finish_reason", "score_logprobs"]
    if run.settings.diagnostics:
        columns.append("token_after_before_kl")
    frame = run.rollouts(columns)
    alphas = sorted(frame["alpha"].unique())
    if 0 not in alphas or alphas[-1] <= 0:
        raise AdviceError(
            f"{run.path}: needs rollouts at alpha 0 and above it, and has alphas "
            f"{', '.join(f'{alpha:g}' for alpha in alphas)}; draw a small survey with --alphas 0,0.5,1,2,4."
        )
    return [_texts_at(run, frame.filter(frame["alpha"] == alpha), alpha) for alpha in alphas]


def _texts_at(run: Run, frame: pl.DataFrame, alpha: float) -> _Texts:
    log_p, log_q = run.log_q(frame, [0.0, alpha]).T
    kl = frame["token_after_before_kl"].list.sum().to_numpy() if run.settings.diagnostics else None
    return _Texts(
        alpha,
        log_p,
        log_q,
        np.maximum(frame["output_tokens"].to_numpy().astype(float), 1),
        np.array([distinct_share(ids) for ids in frame["token_ids"].to_list()]),
        frame["finish_reason"].is_in(ENDED).to_numpy().astype(float),
        kl,
    )


def distinct_share(token_ids: list[int]) -> float:
    """Of the pairs of neighbouring tokens, the share that are distinct; NaN where there is no pair."""
    pairs = list(pairwise(token_ids))
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def _point(texts: _Texts, plain: _Texts, kl_budget: float, coherence: float, level: float) -> AlphaPoint:
    extra, kept = _compared(texts, plain, _extra_surprise, level), _compared(texts, plain, _coherence, level)
    total = texts.tokens.sum()
    return AlphaPoint(
        alpha=texts.alpha,
        rollouts=len(texts.tokens),
        surprise=float(-texts.log_p.sum() / total),
        extra_surprise=extra,
        divergence=float((texts.log_q - texts.log_p).sum() / total),
        kl_after_before=math.nan if texts.kl is None else float(texts.kl.sum() / total),
        distinct=float(_mean(texts.distinct)),
        ended=float(texts.ended.mean()),
        coherence=kept,
        reasons=_reasons(extra, kept, kl_budget, coherence) if texts.alpha > 0 else (),
    )


def _reasons(extra: Interval, kept: Interval, kl_budget: float, coherence: float) -> tuple[str, ...]:
    found = []
    if extra.high > kl_budget:
        found.append(f"extra surprise may be {extra.high:.2f} nats per token, over the budget of {kl_budget:g}")
    if kept.low < coherence:
        found.append(f"coherence may be {kept.low:.2f}, under {coherence:g}")
    return tuple(found)


def _extra_surprise(texts: _Texts, plain: _Texts, rows: NDArray[np.intp], plain_rows: NDArray[np.intp]) -> Floats:
    surprise = -texts.log_p[rows].sum(-1) / texts.tokens[rows].sum(-1)
    return np.asarray(surprise + plain.log_p[plain_rows].sum(-1) / plain.tokens[plain_rows].sum(-1))


def _coherence(texts: _Texts, plain: _Texts, rows: NDArray[np.intp], plain_rows: NDArray[np.intp]) -> Floats:
    """The smaller of two shares of what alpha 0 has; one that alpha 0 has nothing of does not count."""
    shares = [
        _ratio(_mean(texts.distinct[rows]), _mean(plain.distinct[plain_rows])),
        _ratio(texts.ended[rows].mean(-1), plain.ended[plain_rows].mean(-1)),
    ]
    return np.asarray(np.minimum(*shares))


def _ratio(value: Floats, of: Floats) -> Floats:
    return np.where(of > 0, value / np.where(of > 0, of, 1), 1.0)


def _mean(values: Floats) -> Floats:
    """Over the last axis, without NaN; 0 where nothing is left."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(-1) / np.maximum(known.sum(-1), 1))


def _compared(
    texts: _Texts,
    plain: _Texts,
    figure: Callable[[_Texts, _Texts, NDArray[np.intp], NDArray[np.intp]], Floats],
    level: float,
) -> Interval:
    """A figure of two sets of rollouts with its bootstrap interval; at alpha 0 it is what it is by definition."""
    rows, plain_rows = np.arange(len(texts.tokens)), np.arange(len(plain.tokens))
    value = float(figure(texts, plain, rows, plain_rows))
    if texts is plain:
        return Interval(value, value, value)
    drawn = stats.bootstrap(
        (rows, plain_rows),
        lambda one, two, axis: figure(texts, plain, one, two),
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=64,
        method="percentile",
        confidence_level=level,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(drawn.low), float(drawn.high))


def _crossing(curve: tuple[AlphaPoint, ...], kl_budget: float) -> float | None:
    points = [point for point in curve if point.alpha >= 0]
    for near, far in pairwise(points):
        start, end = near.extra_surprise.estimate, far.extra_surprise.estimate
        if start <= kl_budget < end:
            return near.alpha + (far.alpha - near.alpha) * (kl_budget - start) / (end - start)
    return None
