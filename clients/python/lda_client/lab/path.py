"""The rate at alpha 0, extrapolated along the path of alphas at which the behaviour is common enough to count.

The log of the rate is a smooth curve f over alpha. Every alpha gives a point of it, its share of hits, and a slope:

    f'(alpha) = d/dalpha log P_alpha(hit) = E_alpha[ S | hit ],     S(y) = d/dalpha log q_alpha(y)

The identity is exact, and S comes with every rollout that was scored on both sides of its alpha, so half of what the
fit knows costs no rollout. The curve is a quadratic of any coefficients plus twice integrated Brownian motion: a
smoothing spline of the fifth degree with its Bayesian interval (Wahba, 1983), derivatives observed too (Solak et al.,
2003). How much the curve may bend is not known; the answer is averaged over it, so the interval widens with the
distance to the nearest alpha, and more where the points bend. After Pernice and Aranguri (2026), who extrapolate from
the blends between two models, alphas from -1 to 0; any side of 0 will do.

Pure: arrays in, estimates out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg, stats
from scipy.special import factorial, logsumexp, ndtr

from lda_client.lab.estimators import LEVEL, Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lda_client.lab.estimators import Floats

METHOD = "path"
HITS_MIN = 4  # fewer make a point whose logarithm is no use
HITS_FOR_SLOPE_MIN = 8
POINTS_MIN = 3
# More than a factor of four each way is not an answer.
HALF_WIDTH_MAX = math.log(4)
# Leave one alpha out and predict it: a miss this many standard errors wide means that the curve is no such curve.
MISS_MAX = 4.0

ORDER = 3  # the derivative that is white noise
# Of the curve over the whole path, so it is in nats: calibrated on pairs whose rates are known exactly.
ROUGHNESS_SCALE = 20.0
ROUGHNESS = np.exp(np.linspace(math.log(0.1), math.log(500), 30))
# The grid is even in the logarithm.
LOG_PRIOR = stats.halfcauchy.logpdf(ROUGHNESS, scale=ROUGHNESS_SCALE) + np.log(ROUGHNESS)
VAGUE = 1e4  # prior variance of the quadratic's coefficients
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(ORDER)  # exact for the products below


@dataclass(frozen=True, slots=True)
class Point:
    """What one alpha has to say.

    Attributes:
        alpha: where.
        rollouts: drawn there.
        hits: among them.
        slope: mean of S over the hits, nats per unit of alpha; NaN where there are too few, or no scores.
        slope_variance: of that mean.
    """

    alpha: float
    rollouts: int
    hits: int
    slope: float = math.nan
    slope_variance: float = math.nan

    @classmethod
    def of(cls, alpha: float, hits: ArrayLike, scores: ArrayLike | None = None) -> Point:
        """From the hits (N,) and, where rollouts were scored beside their alpha, S (N,)."""
        marks = np.asarray(hits, np.bool_)
        count = int(marks.sum())
        if scores is None or count < HITS_FOR_SLOPE_MIN:
            return cls(alpha, len(marks), count)
        of_hits = np.asarray(scores, np.float64)[marks]
        # Hits that are all alike say nothing of how far their mean is off.
        variance = max(float(of_hits.var(ddof=1)), 1e-3) / count
        return cls(alpha, len(marks), count, float(of_hits.mean()), variance)

    @property
    def log_rate(self) -> float:
        """With half a hit added, so that few hits are less biased."""
        return math.log((self.hits + 0.5) / (self.rollouts + 1))

    @property
    def log_rate_variance(self) -> float:
        """Of the logarithm of a binomial share."""
        return max(1 / (self.hits + 0.5) - 1 / (self.rollouts + 1), 1e-6)


def extrapolated(points: Sequence[Point], level: float = LEVEL) -> Estimate:
    """The rate at alpha 0 from all other alphas that have hits enough.

    Args:
        points: one for each alpha; that of alpha 0 is left out, so that the answer is one of its own.
        level: of the interval.
    """
    points = [point for point in points if point.alpha != 0]
    used = [point for point in points if point.hits >= HITS_MIN]
    rollouts, hits = sum(point.rollouts for point in points), sum(point.hits for point in points)
    if len(used) < POINTS_MIN:
        reason = f"{len(used)} alphas have {HITS_MIN} hits or more, and {POINTS_MIN} are needed"
        return Estimate(METHOD, None, None, None, level, rollouts, hits, {}, (reason,))
    path = _Path(used)
    low, middle, high = path.quantiles(0.0, ((1 - level) / 2, 0.5, (1 + level) / 2))
    diagnostics = {
        "points": float(len(used)),
        "slopes": float(sum(not math.isnan(point.slope) for point in used)),
        "half_width_nats": (high - low) / 2,
        "distance": min(abs(point.alpha) for point in used),
        "residual": _residual(path, used),
        "largest_miss": _largest_miss(used),
    }
    if refusals := _refusals(diagnostics):
        return Estimate(METHOD, None, None, None, level, rollouts, hits, diagnostics, refusals)
    rate, ends = math.exp(middle), (math.exp(low), min(math.exp(high), 1.0))
    return Estimate(METHOD, min(rate, 1.0), *ends, level, rollouts, hits, diagnostics)


def _refusals(diagnostics: dict[str, float]) -> tuple[str, ...]:
    found = []
    if (width := diagnostics["half_width_nats"]) > HALF_WIDTH_MAX:
        found.append(
            f"the interval spans a factor of {math.exp(width):.0f} each way: draw more, or at alphas nearer to 0 than "
            f"{diagnostics['distance']:g}"
        )
    if (miss := diagnostics["largest_miss"]) > MISS_MAX:
        found.append(f"a left-out alpha is missed by {miss:.1f} standard errors: the path is not smooth enough")
    return tuple(found)


def _residual(path: _Path, points: Sequence[Point]) -> float:
    """Root mean square distance of the points from the curve through them, in standard errors of the points."""
    off = [
        (point.log_rate - path.quantiles(point.alpha, (0.5,))[0]) / math.sqrt(point.log_rate_variance)
        for point in points
    ]
    return float(np.sqrt(np.mean(np.square(off))))


def _largest_miss(points: Sequence[Point]) -> float:
    """Each alpha predicted from the others, in standard errors; NaN where too few are left."""
    if len(points) <= POINTS_MIN:
        return math.nan
    misses = []
    for index, point in enumerate(points):
        low, middle, high = _Path([*points[:index], *points[index + 1 :]]).quantiles(point.alpha, (0.16, 0.5, 0.84))
        misses.append(abs(point.log_rate - middle) / math.hypot((high - low) / 2, math.sqrt(point.log_rate_variance)))
    return max(misses)


class _Path:
    """The curve given its points; alphas are scaled so that they and 0 span a unit."""

    def __init__(self, points: Sequence[Point]) -> None:
        alphas = [0.0, *(point.alpha for point in points)]
        self._origin, self._span = min(alphas), max(alphas) - min(alphas)
        sloped = [point for point in points if not math.isnan(point.slope)]
        self._at = self._scaled([point.alpha for point in (*points, *sloped)])
        self._order = np.repeat([0, 1], [len(points), len(sloped)])
        self._values = np.array(
            [point.log_rate for point in points] + [point.slope * self._span for point in sloped], np.float64
        )
        noise = [point.log_rate_variance for point in points]
        noise += [point.slope_variance * self._span**2 for point in sloped]
        basis = _powers(self._at, self._order)
        self._fixed = np.diag(noise) + VAGUE * basis @ basis.T
        self._rough = _covariance(self._at, self._order, self._at, self._order)

    def quantiles(self, alpha: float, shares: Sequence[float]) -> list[float]:
        """Of log P_alpha(hit), over all that is not known."""
        weights, means, deviations = self._predictions(alpha)
        kept = weights > 1e-8
        edge = 8 * deviations[kept]
        grid = np.linspace((means[kept] - edge).min(), (means[kept] + edge).max(), 2001)
        below = weights[kept] @ ndtr((grid - means[kept, None]) / deviations[kept, None])
        return [float(each) for each in np.interp(shares, below, grid)]

    def _predictions(self, alpha: float) -> tuple[Floats, Floats, Floats]:
        """For each roughness: its posterior weight, and mean and deviation of the curve at an alpha."""
        at, plain = self._scaled([alpha]), np.zeros(1, int)
        basis = _powers(at, plain)
        shared = VAGUE * basis @ _powers(self._at, self._order).T
        prior, rough = VAGUE * float((basis @ basis.T).item()), float(_covariance(at, plain, at, plain).item())
        cross = _covariance(at, plain, self._at, self._order)
        log_weights, means, variances = [], [], []
        for roughness in ROUGHNESS:
            factor = linalg.cholesky(self._fixed + roughness**2 * self._rough, lower=True)
            values = linalg.solve_triangular(factor, self._values, lower=True)
            towards = linalg.solve_triangular(factor, (shared + roughness**2 * cross)[0], lower=True)
            log_weights.append(-0.5 * values @ values - np.log(np.diag(factor)).sum())
            means.append(towards @ values)
            variances.append(max(prior + roughness**2 * rough - towards @ towards, 1e-12))
        log_posterior = LOG_PRIOR + log_weights
        return np.exp(log_posterior - logsumexp(log_posterior)), np.array(means), np.sqrt(variances)

    def _scaled(self, alphas: Sequence[float]) -> Floats:
        return (np.asarray(alphas, np.float64) - self._origin) / self._span


def _powers(at: Floats, order: np.ndarray) -> Floats:
    """(n, ORDER) values, or derivatives where `order` is 1, of 1, x, x^2."""
    columns = [np.where(order == 0, at**power, power * at ** max(power - 1, 0)) for power in range(ORDER)]
    return np.stack(columns, axis=1)


def _covariance(a: Floats, a_order: np.ndarray, b: Floats, b_order: np.ndarray) -> Floats:
    """Of a process whose third derivative is white noise from 0 on, and of its first derivative."""
    top = np.minimum(a[:, None], b[None, :])[..., None]
    nodes, weights = (NODES + 1) / 2 * top, NODE_WEIGHTS / 2 * top
    a_power, b_power = (ORDER - 1 - a_order)[:, None, None], (ORDER - 1 - b_order)[None, :, None]
    left = (a[:, None, None] - nodes) ** a_power / factorial(a_power)
    right = (b[None, :, None] - nodes) ** b_power / factorial(b_power)
    return np.asarray((weights * left * right).sum(axis=-1))
