"""Estimators against pairs whose every sequence can be listed: the truth is exact, and so is each experiment's law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from exact_pairs import ExactPair
from lda_client.lab.estimators import (
    Rollouts,
    interval_of_count,
    naive,
    pooled,
    rollouts_for_error,
    rollouts_to_see,
)
from scipy import stats

EXPERIMENTS = 200
# Rate, rollouts at each of five alphas: what a survey of such a behaviour would be.
CAMPAIGNS = [(1e-2, 200), (1e-3, 400), (1e-4, 1000), (1e-5, 3000)]
GRID = (0.25, 0.5, 1.0, 1.5, 2.0)


def one_rollout_each(hits, log_q, log_p):
    """Rollouts at alpha 1 alone."""
    return Rollouts.of([1.0], np.zeros(len(hits), int), hits, np.reshape(log_q, (-1, 1)), log_p)


def test_weights_undo_the_proposal_exactly():
    """Summed over all sequences, mixture times weight is the unmodified model: of every set, to rounding."""
    pair = ExactPair(1e-3, tokens=5, steps=5)
    alphas, shares = np.array([-0.5, 0.5, 2.0]), np.array([0.2, 0.5, 0.3])
    log_q = np.stack([pair.log_q(alpha) for alpha in alphas], axis=1)
    drawn_at = np.repeat(np.arange(3), [2, 5, 3])
    rows = np.resize(np.arange(len(log_q)), 10)
    mixture = np.exp(log_q) @ shares
    given = Rollouts.of(alphas, drawn_at, pair.hits[rows], log_q[rows], pair.log_q(0.0)[rows])
    assert given.weights == pytest.approx(np.exp(pair.log_q(0.0)[rows]) / mixture[rows], rel=1e-12)
    assert (mixture * np.exp(pair.log_q(0.0)) / mixture)[pair.hits].sum() == pytest.approx(1e-3, rel=1e-9)


def test_pooled_is_unbiased():
    """Over many small experiments, refused ones included, the mean of the weighted hits is the rate."""
    pair, rng = ExactPair(1e-3, seed=1), np.random.default_rng(11)
    means = []
    for _ in range(2000):
        drawn = pair.draw(dict.fromkeys((0.5, 1.0), 50), rng)
        means.append((drawn.weights * drawn.hits).mean())
    error = np.std(means) / math.sqrt(len(means))
    assert abs(np.mean(means) - 1e-3) < 4 * error


@pytest.mark.parametrize(("rate", "rollouts"), CAMPAIGNS)
def test_intervals_of_pooled_estimates_cover_the_truth(rate, rollouts):
    """In 92 to 98% of the experiments that it agrees to answer, give or take what 200 experiments can tell."""
    rng, covered, agreed = np.random.default_rng(round(1 / rate)), 0, 0
    pairs = [ExactPair(rate, seed) for seed in range(2)]
    for index in range(EXPERIMENTS):
        estimate = pooled(pairs[index % 2].draw(dict.fromkeys(GRID, rollouts), rng))
        if not estimate.refusals:
            agreed += 1
            covered += estimate.low <= rate <= estimate.high
    assert agreed >= EXPERIMENTS / 2, "it answers where there is enough to go by"
    sure_below, sure_above = (stats.binom.ppf(tail, agreed, share) for tail, share in ((0.001, 0.92), (0.999, 0.98)))
    assert sure_below <= covered <= sure_above


@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-4, 1e-5])
def test_intervals_of_plain_counts_cover_the_truth(rate):
    """Exact intervals are never short of their level; with some forty hits they are not much above it either."""
    rng, rollouts = np.random.default_rng(3), round(40 / rate)
    covered = 0
    for hits, times in zip(*np.unique(rng.binomial(rollouts, rate, 1000), return_counts=True), strict=True):
        estimate = naive(int(hits), rollouts)
        covered += times * (estimate.low <= rate <= estimate.high)
    assert stats.binom.ppf(0.001, 1000, 0.95) <= covered <= 980


def test_economy():
    """At a rate of 1e-4, half a rate's error costs at least 30 times fewer rollouts than plain sampling."""
    rng, pair = np.random.default_rng(7), ExactPair(1e-4, seed=0)
    ours = rollouts_for_error(1e-4, 0.5) // 30 // len(GRID)
    rates = []
    for _ in range(400):
        drawn = pair.draw(dict.fromkeys(GRID, ours), rng)
        rates.append((drawn.weights * drawn.hits).mean())
    assert math.sqrt(np.mean((np.array(rates) / 1e-4 - 1) ** 2)) < 0.5


def test_refuses_without_hits():
    """No hits at any alpha: no rate, and the reason."""
    estimate = pooled(one_rollout_each([False] * 50, np.full(50, -3.0), np.full(50, -4.0)))
    assert (estimate.rate, estimate.low, estimate.high) == (None, None, None)
    assert estimate.refusals == ("no rollout shows the behaviour at any alpha",)


def test_refuses_what_one_rollout_carries():
    """An estimate that one rollout makes is refused, with what to do."""
    log_p = np.full(100, -12.0)
    log_p[0] = -4.0
    estimate = pooled(one_rollout_each([True] * 100, np.full(100, -5.0), log_p))
    assert "one rollout carries" in " ".join(estimate.refusals)
    assert estimate.diagnostics["largest_share"] > 0.9


def test_refuses_log_probabilities_of_another_distribution():
    """Rollouts drawn at another alpha than the one they are scored at have weights that average above 1."""
    pair, rng = ExactPair(1e-2), np.random.default_rng(2)
    drawn = pair.draw({0.25: 4000}, rng)
    assert not pooled(drawn).refusals
    rows = np.searchsorted(np.exp(pair.log_q(0.0)).cumsum(), rng.random(4000) * 0.999)
    mislabelled = one_rollout_each(pair.hits[rows], pair.log_q(0.25)[rows], pair.log_q(0.0)[rows])
    assert any("average" in each for each in pooled(mislabelled).refusals)


def test_refuses_what_plain_rollouts_contradict():
    """A behaviour that comes by another route than the amplified one is not estimated from the amplified one alone."""
    pair, rng = ExactPair(1e-3, seed=1), np.random.default_rng(4)
    drawn = pair.draw({0.0: 2000, 0.5: 500, 1.0: 500}, rng)
    hits = drawn.hits.copy()
    hits[:60] = True  # of the rollouts at alpha 0, by a judge that sees something else in them
    weights = drawn.weights
    lone = Rollouts.of(drawn.alphas, drawn.drawn_at, hits, drawn.log_q, drawn.log_p - 3 * (weights > 0) * hits)
    assert any("does not explain" in each for each in pooled(lone).refusals)


def test_plan():
    """Rollouts to see a rate are those of the geometric law; those for an error, of the binomial one."""
    for rate in (0.3, 1e-2, 1e-4):
        n = rollouts_to_see(rate)
        assert 1 - (1 - rate) ** n >= 0.95 > 1 - (1 - rate) ** (n - 1)
        n = rollouts_for_error(rate, 0.5)
        assert math.sqrt((1 - rate) / (rate * n)) <= 0.5
    assert rollouts_to_see(1e-4) == 29956
    for wrong in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            rollouts_to_see(wrong)


def test_exact_interval_is_the_published_one():
    """1 of 10: Clopper and Pearson give 0.0025 to 0.4450."""
    assert interval_of_count(1, 10) == pytest.approx((0.0025, 0.4450), abs=5e-5)
    assert naive(0, 300).high == pytest.approx(3.689 / 300, rel=0.01)
    assert naive(0, 0).refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hits": [True]}, "same rollouts"),
        ({"alphas": [0.5, 1.0], "log_q": np.zeros((2, 2))}, "No rollouts at alpha 1"),
        ({"log_p": [0.0, -np.inf]}, "not finite"),
    ],
)
def test_unfit_rollouts_are_named(changes, message):
    """Arrays that do not belong together are an error with its reason, not a wrong rate."""
    fit = {"alphas": [0.5], "drawn_at": [0, 0], "hits": [True, False], "log_q": np.zeros((2, 1)), "log_p": [-1.0, -1.0]}
    with pytest.raises(ValueError, match=message):
        Rollouts.of(**(fit | changes))
