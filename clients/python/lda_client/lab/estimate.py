"""From a run and the verdicts of a judge to the rate of the unmodified model, three ways.

Knows run folders and estimators. The rate is the mean over the prompts asked about: every prompt was drawn equally
often at every alpha, so pooling their rollouts weighs them alike.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lda_client.lab._errors import RunError
from lda_client.lab._settings import SLOPE_STEP
from lda_client.lab.estimators import LEVEL, Estimate, Rollouts, interval_of_count, naive, pooled
from lda_client.lab.path import Point, extrapolated

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lda_client.lab.estimators import Floats
    from lda_client.lab.runs import Run

DRAWS = 40_000  # for the interval of a rate that is corrected for its judge's errors
INFORMED_MIN = 0.1  # sensitivity + specificity - 1, below which a judge tells next to nothing


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a judge judges, as counts against a reference.

    Attributes:
        found: hits of the reference that it called hits.
        missed: hits that it did not.
        false_alarms: others that it called hits.
        passed: others that it did not.
    """

    found: int
    missed: int
    false_alarms: int
    passed: int

    @property
    def sensitivity(self) -> float:
        """Share of the hits that it finds; NaN without hits."""
        return self.found / (self.found + self.missed) if self.found + self.missed else math.nan

    @property
    def specificity(self) -> float:
        """Share of the others that it leaves alone; NaN without others."""
        return self.passed / (self.passed + self.false_alarms) if self.passed + self.false_alarms else math.nan


@dataclass(frozen=True, slots=True)
class AlphaRate:
    """What was counted at one alpha."""

    alpha: float
    rollouts: int
    hits: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RunEstimates:
    """The answer of `estimate_run`.

    Attributes:
        judge: whose verdicts.
        prompts: how many the rate is the mean of.
        undecided: rollouts left out, since the judge came to no verdict.
        by_alpha: what was counted, ascending alpha.
        estimates: naive, pooled and path.
        quality: of the judge, if it was measured; the estimates carry it then.
    """

    judge: str
    prompts: int
    undecided: int
    by_alpha: tuple[AlphaRate, ...]
    estimates: tuple[Estimate, ...]
    quality: Quality | None


def estimate_run(run: Run, judge: str, prompt_ids: Sequence[str] = (), level: float = LEVEL) -> RunEstimates:
    """How often the unmodified model shows what a judge looked for.

    Args:
        run: of a survey that is complete or was stopped.
        judge: a name of its verdicts.
        prompt_ids: only these prompts; all if empty.
        level: of the intervals.

    Raises:
        RunError: no verdicts, no such prompt, or a survey that was drawn for no estimates.
    """
    if not run.manifest.score_alphas:
        raise RunError(f"{run.path}: was drawn with --no-estimate, so its rollouts have no scores to weigh them by.")
    frame = _of_prompts(run, run.judged(judge, ["score_logprobs"]), prompt_ids)
    decided = frame.drop_nulls("hit")
    quality = read_quality(run, judge)
    estimates = estimates_of(run, decided, level)
    if quality is not None:
        estimates = tuple(corrected(estimate, quality) for estimate in estimates)
    return RunEstimates(
        judge,
        frame["prompt_id"].n_unique(),
        len(frame) - len(decided),
        tuple(_by_alpha(decided, level)),
        estimates,
        quality,
    )


def read_quality(run: Run, judge: str) -> Quality | None:
    """What `lda agree --reference` has kept of a judge; None if nothing."""
    path = run.quality_path(judge)
    if not path.exists():
        return None
    counts = json.loads(path.read_text("utf-8"))["counts"]
    return Quality(counts["both"], counts["second_only"], counts["first_only"], counts["neither"])


def corrected(estimate: Estimate, quality: Quality) -> Estimate:
    """The rate without the judge's errors: (observed - false alarms) / (sensitivity - false alarms).

    Rogan and Gladen (1978); the interval is drawn from what is known of all three. A judge whose false alarms alone
    could make the observed rate leaves an interval that reaches down to 0.
    """
    if estimate.rate is None or estimate.low is None or estimate.high is None:
        return estimate
    informed = quality.sensitivity + quality.specificity - 1
    if not informed > INFORMED_MIN:
        reason = "the judge, held against its reference, tells hits from others hardly better than chance"
        return replace(estimate, rate=None, low=None, high=None, refusals=(*estimate.refusals, reason))
    rng = np.random.default_rng(0)
    observed = _draws(estimate, rng)
    sensitivity = rng.beta(quality.found + 0.5, quality.missed + 0.5, DRAWS)
    specificity = rng.beta(quality.passed + 0.5, quality.false_alarms + 0.5, DRAWS)
    true = np.clip((observed - (1 - specificity)) / np.maximum(sensitivity + specificity - 1, INFORMED_MIN / 2), 0, 1)
    low, high = np.quantile(true, [(1 - estimate.level) / 2, (1 + estimate.level) / 2])
    rate = min(max((estimate.rate - (1 - quality.specificity)) / informed, 0.0), 1.0)
    facts = {"observed_rate": estimate.rate, "sensitivity": quality.sensitivity, "specificity": quality.specificity}
    return replace(estimate, rate=rate, low=float(low), high=float(high), diagnostics={**estimate.diagnostics, **facts})


def _draws(estimate: Estimate, rng: np.random.Generator) -> Floats:
    """From a distribution whose interval is the estimate's."""
    assert estimate.rate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    if estimate.method == "naive":
        return rng.beta(estimate.hits + 0.5, estimate.rollouts - estimate.hits + 0.5, DRAWS)
    reach = 2 * float(stats.norm.ppf((1 + estimate.level) / 2))
    spread = math.log(estimate.high / estimate.low) / reach
    return np.asarray(estimate.rate * np.exp(spread * rng.standard_normal(DRAWS)))


def _of_prompts(run: Run, frame: pl.DataFrame, prompt_ids: Sequence[str]) -> pl.DataFrame:
    known = set(frame["prompt_id"].unique())
    if unknown := [each for each in prompt_ids if each not in known]:
        raise RunError(f"{run.path}: has no rollouts of the prompt {unknown[0]!r}.")
    return frame.filter(frame["prompt_id"].is_in(list(prompt_ids))) if prompt_ids else frame


def _by_alpha(frame: pl.DataFrame, level: float) -> list[AlphaRate]:
    rates = []
    for (alpha,), part in sorted(frame.group_by(["alpha"])):
        hits, rollouts = int(part["hit"].sum()), len(part)
        rates.append(AlphaRate(float(str(alpha)), rollouts, hits, *interval_of_count(hits, rollouts, level)))
    return rates


def estimates_of(run: Run, frame: pl.DataFrame, level: float = LEVEL) -> tuple[Estimate, ...]:
    """Naive, pooled and path, from the rollouts of a frame with `hit` and `score_logprobs`."""
    at_zero = frame.filter(frame["alpha"] == 0)
    plain = naive(int(at_zero["hit"].sum()), len(at_zero), level)
    if frame.is_empty():
        return (plain,)
    alphas = sorted(frame["alpha"].unique())
    drawn_at = np.searchsorted(alphas, frame["alpha"].to_numpy())
    hits = frame["hit"].to_numpy().astype(bool)
    rollouts = Rollouts.of(alphas, drawn_at, hits, run.log_q(frame, alphas), run.log_q(frame, [0.0])[:, 0])
    return plain, pooled(rollouts, level), extrapolated(_points(run, frame, alphas), level)


def _points(run: Run, frame: pl.DataFrame, alphas: Sequence[float]) -> list[Point]:
    """One point of the path for each alpha, with its slope where rollouts were scored on both sides."""
    points = []
    for alpha in alphas:
        part = frame.filter(frame["alpha"] == alpha)
        sides = [round(alpha + step, 9) for step in (-SLOPE_STEP, SLOPE_STEP)]
        scores = None
        if run.settings.slopes and all(side in run.manifest.score_alphas for side in sides):
            below, above = run.log_q(part, sides).T
            scores = (above - below) / (2 * SLOPE_STEP)
        points.append(Point.of(alpha, part["hit"].to_numpy().astype(bool), scores))
    return points
