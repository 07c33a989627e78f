"""How far two judges agree, and how well one judges if the other is right.

Counts in, figures out; the files of a run only at the end. Intervals of rates are exact (Clopper and Pearson, through
scipy); kappa is that of Cohen (1960) with the standard error of Fleiss, Cohen and Everitt (1969).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from lda_client.lab._errors import JudgeError
from lda_client.lab._files import write_text
from lda_client.lab.runs import KEY

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lda_client.lab.runs import Run

LEVEL = 0.95


class Interval(NamedTuple):
    """A figure and its interval; NaN where there is nothing to tell it from."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Two judges on the rollouts that both decided.

    Attributes:
        both: hits for both.
        first_only: hits for the first alone.
        second_only: hits for the second alone.
        neither: hits for neither.
        undecided: rollouts that at least one of them did not decide.
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    undecided: int = 0

    @property
    def labelled(self) -> int:
        """Rollouts that both decided."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def observed(self) -> Interval:
        """The share on which they agree."""
        return share(self.both + self.neither, self.labelled)

    @property
    def kappa(self) -> Interval:
        """Cohen's kappa: agreement beyond chance."""
        return cohen_kappa([[self.both, self.first_only], [self.second_only, self.neither]])

    @property
    def sensitivity(self) -> Interval:
        """Of the second judge's hits, the share that the first finds."""
        return share(self.both, self.both + self.second_only)

    @property
    def specificity(self) -> Interval:
        """Of what is no hit for the second judge, the share that the first leaves alone."""
        return share(self.neither, self.neither + self.first_only)


def share(count: int, of: int, level: float = LEVEL) -> Interval:
    """A share with its exact interval."""
    if not of:
        return Interval(math.nan, 0.0, 1.0)
    low, high = stats.binomtest(count, of).proportion_ci(level, method="exact")
    return Interval(count / of, float(low), float(high))


def cohen_kappa(table: ArrayLike, level: float = LEVEL) -> Interval:
    """Cohen's kappa of a square table of counts (first judge by rows), with its large-sample interval.

    Fleiss, Cohen and Everitt, "Large sample standard errors of kappa and weighted kappa", Psychological Bulletin 72
    (1969), equation 13. NaN if both judges always say the same one thing.
    """
    counts = np.asarray(table, np.float64)
    total = counts.sum()
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    shares = counts / total
    rows, columns = shares.sum(1), shares.sum(0)
    observed, chance = np.trace(shares), rows @ columns
    if math.isclose(chance, 1):
        return Interval(math.nan, math.nan, math.nan)
    kappa = (observed - chance) / (1 - chance)
    # [i, j]: how often the first judge says what the second said here, and the other way round.
    expected = np.add.outer(columns, rows)
    terms = shares * (np.eye(len(counts)) - (1 - kappa) * expected) ** 2
    error = math.sqrt(max(0.0, terms.sum() - (kappa - chance * (1 - kappa)) ** 2) / total) / (1 - chance)
    reach = stats.norm.ppf((1 + level) / 2) * error
    return Interval(float(kappa), float(kappa - reach), float(min(1.0, kappa + reach)))


def agree(run: Run, first: str, second: str) -> Agreement:
    """Compare two judges of a run. Raises RunError, or JudgeError if there is nothing that both decided."""
    left, right = run.judged(first, ["output_tokens"]), run.judged(second, ["output_tokens"])
    joined = left.select(*KEY, "hit").join(right.select(*KEY, "hit"), on=list(KEY), validate="1:1")
    decided = joined.drop_nulls()
    if decided.is_empty():
        raise JudgeError(f"There is no rollout that both {first!r} and {second!r} decided.")
    one, two = decided["hit"].to_numpy(), decided["hit_right"].to_numpy()
    both, first_only, second_only, neither = (
        int(np.sum(part)) for part in (one & two, one & ~two, ~one & two, ~one & ~two)
    )
    return Agreement(both, first_only, second_only, neither, len(joined) - len(decided))


def keep_quality(run: Run, judge: str, reference: str, agreement: Agreement) -> None:
    """Keep sensitivity and specificity of a judge, measured by a reference judge, for the estimators."""
    quality: dict[str, Any] = {
        "judge": judge,
        "reference": reference,
        "judge_description": run.judge_of(judge),
        "reference_description": run.judge_of(reference),
        "labelled": agreement.labelled,
        "counts": asdict(agreement),
        "level": LEVEL,
        "sensitivity": _or_null(agreement.sensitivity),
        "specificity": _or_null(agreement.specificity),
    }
    write_text(run.quality_path(judge), json.dumps(quality, indent=2, ensure_ascii=False) + "\n")


def _or_null(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in interval._asdict().items()}
