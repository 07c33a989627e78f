"""Arithmetic on what engines answered: rates, pair-equivalents, order of repetitions, medians. Runs nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Workload


class WrongTokenCount(Exception):
    """An engine delivered another number of tokens than was asked: its time says nothing."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Several repetitions of one figure."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def tokens_per_s(workload: Workload, answer: dict[str, Any]) -> float:
    """The rate of one run.

    Raises:
        WrongTokenCount: not `new` tokens for each row that was run.
    """
    wanted = answer["rows"] * workload.new
    if answer["tokens"] != wanted or not 0 < answer["rows"] <= workload.rows:
        raise WrongTokenCount(
            f"{workload.name}: {answer['tokens']} tokens from {answer['rows']} rows of {workload.new} new ones each"
        )
    return float(answer["tokens"] / answer["seconds"])


def pair_equivalent(after: float, before: float) -> float:
    """Tokens/s of a pair decoded one model after the other, from each model's own rate.

    An upper bound for a pair engine built on that peer: combining and sampling cost nothing here.
    """
    return 1 / (1 / after + 1 / before)


def best(first: Any, second: Any) -> Any:
    """The greater of two measurements of the same rates, one by one; a dictionary holds rates or dictionaries."""
    if isinstance(first, dict):
        return {key: best(value, second[key]) for key, value in first.items()}
    return max(first, second)


def interleaved(engines: Sequence[str], repetitions: int) -> list[str]:
    """A B / B A / A B ...: every engine has its turn early and late, so that drift favours none."""
    order: list[str] = []
    for repetition in range(repetitions):
        order += engines if repetition % 2 == 0 else reversed(engines)
    return order
