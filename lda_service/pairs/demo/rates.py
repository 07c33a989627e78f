"""Counts of rollouts, and the exact interval of a rate. Knows scipy's binomial test; nothing of models."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True, slots=True)
class Rate:
    """`hits` of `rollouts` showed the behaviour; `ended` of them ended by themselves."""

    hits: int
    ended: int
    rollouts: int

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.hits + other.hits, self.ended + other.ended, self.rollouts + other.rollouts)

    @property
    def rate(self) -> float:
        """The naive estimate."""
        return self.hits / self.rollouts

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The exact (Clopper-Pearson) interval of the rate."""
        found = binomtest(self.hits, self.rollouts).proportion_ci(confidence, method="exact")
        return float(found.low), float(found.high)

    def cells(self, alpha: float) -> tuple[str, ...]:
        """A row of a table: alpha, hits, rollouts, rate, interval, share that ended by themselves."""
        interval = " to ".join(map(percent, self.interval()))
        ended = f"{self.ended / self.rollouts:.1%}"
        return f"{alpha:g}", f"{self.hits:,}", f"{self.rollouts:,}", percent(self.rate), interval, ended


def percent(share: float) -> str:
    """A share in percent, with three digits where it is small."""
    return f"{share:.1%}" if share >= 0.1 or share == 0 else f"{share * 100:.3g}%"
