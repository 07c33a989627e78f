"""Rollouts that a rate costs, plain and amplified: `python -m benchmarks.economy`.

On pairs whose sequences can all be listed (`tests/exact_pairs.py`): for each true rate, how many rollouts give a root
mean square error of half the rate. Plain sampling from the formula; the weighted estimate over five alphas from
repeated experiments. Prints a table and draws docs/economy.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lda_client.lab.estimators import rollouts_for_error

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from exact_pairs import ExactPair  # noqa: E402

RATES = (1e-2, 1e-3, 1e-4, 1e-5)
GRID = (0.25, 0.5, 1.0, 1.5, 2.0)
PAIRS, EXPERIMENTS, ERROR = 3, 300, 0.5
PER_ALPHA = tuple(round(4 * 2 ** (step / 2)) for step in range(22))


def error_of(pair: Any, rate: float, per_alpha: int, rng: np.random.Generator) -> float:
    """Root mean square error of the weighted estimate, as a share of the rate."""
    drawn = (pair.draw(dict.fromkeys(GRID, per_alpha), rng) for _ in range(EXPERIMENTS))
    rates = np.array([(each.weights * each.hits).mean() for each in drawn])
    return float(np.sqrt(np.mean((rates / rate - 1) ** 2)))


def rollouts_needed(pair: Any, rate: float, rng: np.random.Generator) -> int:
    """The fewest of the tried numbers at which the error is small enough, and stays so."""
    for per_alpha in PER_ALPHA:
        if error_of(pair, rate, per_alpha, rng) < ERROR:
            return len(GRID) * per_alpha
    raise SystemExit(f"more than {len(GRID) * PER_ALPHA[-1]} rollouts at a rate of {rate:g}")


def draw(plain: list[int], amplified: list[list[int]], path: Path) -> None:
    """Both curves, log against log."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "economy"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes.loglog(RATES, plain, "o-", color="#5b6470", label="plain rollouts")
    axes.loglog(RATES, [np.median(each) for each in amplified], "o-", color="#c2571a", label="amplified, weighted back")
    axes.fill_between(RATES, [min(each) for each in amplified], [max(each) for each in amplified], color="#c2571a33")
    axes.set(xlabel="true rate", ylabel="rollouts", title="Rollouts for an error of half the rate", xlim=(2e-2, 5e-6))
    axes.grid(color="#00000022")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """The command."""
    rng = np.random.default_rng(0)
    plain = [rollouts_for_error(rate, ERROR) for rate in RATES]
    amplified = []
    print("| true rate | plain | amplified, median of the pairs | least and most | ratio |")
    print("| ---: | ---: | ---: | :---: | ---: |")
    for rate, naive in zip(RATES, plain, strict=True):
        needed = sorted(rollouts_needed(ExactPair(rate, seed), rate, rng) for seed in range(PAIRS))
        amplified.append(needed)
        middle = needed[len(needed) // 2]
        print(
            f"| {rate:g} | {naive:,} | {middle:,} | {needed[0]:,} to {needed[-1]:,} | {naive / middle:.0f} |",
            flush=True,
        )
    draw(plain, amplified, ROOT / "docs/economy.svg")


if __name__ == "__main__":
    main()
