"""Extrapolation along alpha against pairs whose rate is known at every alpha."""

from __future__ import annotations

import math

import numpy as np
import pytest
from exact_pairs import ExactPair
from lda_client.lab.path import Point, extrapolated
from scipy import stats

DELTA = 0.05
# A behaviour that training made rare (common in the before model), and one that it made possible.
BELOW, ABOVE = (-1.0, -0.85, -0.7, -0.55, -0.4, -0.25), (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PATHS = [(BELOW, -6.0), (ABOVE, 5.0)]


def points_of(pair, alphas, rollouts, rng, *, slopes=True):
    """Rollouts at each alpha, and what they say of it."""
    points = []
    for alpha in alphas:
        cumulative = np.exp(pair.log_q(alpha)).cumsum()
        rows = np.searchsorted(cumulative, rng.random(rollouts) * cumulative[-1])
        scores = (pair.log_q(alpha + DELTA) - pair.log_q(alpha - DELTA))[rows] / (2 * DELTA)
        points.append(Point.of(alpha, pair.hits[rows], scores if slopes else None))
    return points


def test_slopes_are_those_of_the_exact_curve():
    """The mean of S over hits is the derivative of the log of the rate, within its own error."""
    pair, rng = ExactPair(1e-2), np.random.default_rng(1)
    for point in points_of(pair, ABOVE, 20_000, rng):
        exact = (math.log(pair.rate(point.alpha + 1e-4)) - math.log(pair.rate(point.alpha - 1e-4))) / 2e-4
        assert abs(point.slope - exact) < 4.5 * math.sqrt(point.slope_variance) + 0.02


@pytest.mark.parametrize(("rate", "rollouts"), [(1e-2, 500), (1e-3, 5000), (1e-4, 20_000), (1e-5, 60_000)])
def test_intervals_cover_the_truth(rate, rollouts):
    """In 92 to 98% of 200 experiments that it agrees to answer, over pairs of both kinds, give or take chance."""
    rng, covered, agreed, asked = np.random.default_rng(8), 0, 0, 0
    for seed in range(5):
        for alphas, gain in PATHS:
            pair = ExactPair(rate, seed, gain=gain, noise=0.8 if seed % 2 else 0.3)
            for _ in range(20):
                estimate = extrapolated(points_of(pair, alphas, rollouts, rng))
                asked += 1
                if not estimate.refusals:
                    agreed += 1
                    covered += estimate.low <= rate <= estimate.high
    assert agreed >= asked / 3
    sure_below, sure_above = (stats.binom.ppf(tail, agreed, share) for tail, share in ((0.001, 0.92), (0.999, 0.98)))
    assert sure_below <= covered <= sure_above, (covered, agreed)


def test_residuals_are_those_of_chance():
    """Points lie about their standard error from the curve, over experiments whose curve is smooth."""
    rng, pair = np.random.default_rng(9), ExactPair(1e-2, seed=2)
    residuals = [extrapolated(points_of(pair, ABOVE, 2000, rng)).diagnostics["residual"] for _ in range(30)]
    assert 0.4 < np.median(residuals) < 1.2
    assert max(residuals) < 2.5


def test_slopes_are_worth_rollouts():
    """With the slopes that come for nothing the interval is narrower than without, in nearly every experiment."""
    rng, narrower = np.random.default_rng(5), 0
    pair = ExactPair(1e-2, seed=3)
    for _ in range(20):
        widths = []
        for slopes in (True, False):
            points = points_of(pair, ABOVE, 3000, np.random.default_rng(rng.integers(1 << 32)), slopes=slopes)
            widths.append(extrapolated(points).diagnostics["half_width_nats"])
        narrower += widths[0] < widths[1]
    assert narrower >= 18


def test_refuses_with_too_few_points():
    """Two alphas with hits are no path; alpha 0 is not one of them, whatever it shows."""
    estimate = extrapolated([Point(1.0, 100, 50), Point(0.5, 100, 9), Point(0.25, 100, 3), Point(0.0, 100, 40)])
    assert estimate.rate is None
    assert estimate.refusals == ("2 alphas have 4 hits or more, and 3 are needed",)
    assert estimate.rollouts == 300


def test_refuses_from_far_away():
    """Points far from 0 and few hits carry no answer, and it says where to draw."""
    estimate = extrapolated([Point(alpha, 200, hits) for alpha, hits in ((1.0, 5), (1.5, 9), (2.0, 20))])
    assert "draw more, or at alphas nearer to 0 than 1" in estimate.refusals[0]


def test_refuses_a_path_with_a_step():
    """A rate that jumps between two alphas is not a smooth curve."""
    shares = (0.002, 0.003, 0.5, 0.004, 0.006, 0.008, 0.01)
    points = [Point(alpha, 20_000, round(20_000 * share)) for alpha, share in zip(ABOVE, shares, strict=True)]
    assert any("not smooth" in each for each in extrapolated(points).refusals)


def test_the_scale_of_alpha_does_not_matter():
    """Early in RL training alphas of 20 are usual: the same path over a wider range gives the same answer."""
    pair, rng = ExactPair(1e-2), np.random.default_rng(2)
    points = points_of(pair, ABOVE, 2000, rng)
    wide = [Point(10 * p.alpha, p.rollouts, p.hits, p.slope / 10, p.slope_variance / 100) for p in points]
    one, ten = extrapolated(points), extrapolated(wide)
    assert (ten.rate, ten.low, ten.high) == pytest.approx((one.rate, one.low, one.high), rel=1e-6)
