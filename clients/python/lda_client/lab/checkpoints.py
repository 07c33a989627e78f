"""Checkpoints over time: one before, many after, each with a run of its own; behaviour x checkpoint x alpha.

    timeline = compare_checkpoints({"step 0": Run.open("runs/0"), "step 500": Run.open("runs/500")}, ["refusal"])
    timeline.alarms              # cells whose rate departs from that of the first checkpoint
    heat_maps(timeline)          # shows itself in a notebook

A cell is held against the first checkpoint at the same alpha by Fisher's exact test, two-sided. An alarm is a cell that
stays when the share of false alarms among them is held down (Benjamini and Hochberg, 1995) over all cells of all
behaviours. Every checkpoint draws the same prompts equally often, so counts over prompts compare like with like, and
the test errs on the side of silence where prompts differ in their rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scipy import stats

from lda_client.lab import charts
from lda_client.lab._errors import LabError
from lda_client.lab._pages import exhibit, page
from lda_client.lab.estimate import _by_alpha as rates_by_alpha
from lda_client.lab.estimators import LEVEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lda_client.lab._pages import Exhibit, Page
    from lda_client.lab.charts import Mark
    from lda_client.lab.estimate import AlphaRate
    from lda_client.lab.runs import Run

FALSE_ALARMS = 0.05
# Other settings may differ: these change what a rollout is.
_SHARED = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "plausibility",
    "min_new_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "raw",
    "system",
)


class CheckpointsDiffer(LabError):
    """Runs that cannot be held against each other."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One behaviour at one checkpoint and one alpha.

    Attributes:
        behaviour: name of the judge.
        checkpoint: its label.
        alpha: where.
        rollouts: that the judge decided.
        hits: among them.
        low: lower end of the interval of the rate.
        high: upper end.
        p: of Fisher's test against the first checkpoint at this alpha; NaN at the first checkpoint.
        q: the least share of false alarms at which this cell is one of the alarms; NaN likewise.
        alarm: "up" or "down" where the rate departs from the first checkpoint's, else "".
    """

    behaviour: str
    checkpoint: str
    alpha: float
    rollouts: int
    hits: int
    low: float
    high: float
    p: float = math.nan
    q: float = math.nan
    alarm: Mark = ""

    @property
    def rate(self) -> float:
        """Hits as a share of rollouts."""
        return self.hits / self.rollouts


@dataclass(frozen=True, slots=True)
class Timeline:
    """The answer of `compare_checkpoints`.

    Attributes:
        behaviours: names of the judges.
        checkpoints: labels in order; the first is what the others are held against.
        alphas: those that all runs have, ascending.
        cells: by behaviour, checkpoint and alpha.
        false_alarms: the share of alarms that may be false.
        notes: what a reader must know.
    """

    behaviours: tuple[str, ...]
    checkpoints: tuple[str, ...]
    alphas: tuple[float, ...]
    cells: tuple[Cell, ...]
    false_alarms: float
    notes: tuple[str, ...]

    @property
    def alarms(self) -> tuple[Cell, ...]:
        """The cells that depart from the first checkpoint."""
        return tuple(cell for cell in self.cells if cell.alarm)

    def _repr_html_(self) -> str:
        return heat_maps(self)._repr_html_()


def compare_checkpoints(
    runs: Mapping[str, Run], judges: Sequence[str], false_alarms: float = FALSE_ALARMS, level: float = LEVEL
) -> Timeline:
    """Behaviours over checkpoints and alphas.

    Args:
        runs: by label, in order of time; the first is what the others are held against.
        judges: whose verdicts; every run has them all, made in the same way.
        false_alarms: the share of alarms that may be false.
        level: of the intervals.

    Raises:
        CheckpointsDiffer: fewer than two runs, other prompts, settings or judges, or no alpha in common.
        RunError: no such verdicts.
    """
    if len(runs) < 2:
        raise CheckpointsDiffer("There is nothing to compare: give at least two runs, the first checkpoint first.")
    _require_alike(runs, judges)
    cells: list[Cell] = []
    for judge in judges:
        rates = {label: _rates(run, judge, level) for label, run in runs.items()}
        shared = set.intersection(*(set(each) for each in rates.values()))
        if not shared:
            raise CheckpointsDiffer(
                f"No alpha has verdicts of {judge!r} in every run; draw all with the same --alphas."
            )
        cells += [_cell(judge, label, rates, alpha) for label in runs for alpha in sorted(shared)]
    cells = _with_alarms(cells, false_alarms)
    alphas = tuple(sorted({cell.alpha for cell in cells}))
    return Timeline(tuple(judges), tuple(runs), alphas, tuple(cells), false_alarms, _notes(runs, alphas))


def _require_alike(runs: Mapping[str, Run], judges: Sequence[str]) -> None:
    (first_label, first), *others = runs.items()
    for label, run in others:
        if run.prompts() != first.prompts():
            raise CheckpointsDiffer(f"{label}: has other prompts than {first_label}; draw it with the same file.")
        for name in _SHARED:
            one, other = getattr(first.settings, name), getattr(run.settings, name)
            if one != other:
                raise CheckpointsDiffer(
                    f"{label}: was drawn with {name} {other!r}, and {first_label} with {one!r}; draw it again alike."
                )
        for judge in judges:
            if run.judge_of(judge) != first.judge_of(judge):
                raise CheckpointsDiffer(
                    f"{label}: its judge {judge!r} is not that of {first_label}; judge both runs with the same command."
                )


def _rates(run: Run, judge: str, level: float) -> dict[float, AlphaRate]:
    decided = run.judged(judge, ["output_tokens"]).drop_nulls("hit")
    return {each.alpha: each for each in rates_by_alpha(decided, level)}


def _cell(judge: str, label: str, rates: Mapping[str, Mapping[float, AlphaRate]], alpha: float) -> Cell:
    found, first = rates[label][alpha], next(iter(rates.values()))[alpha]
    p = math.nan
    if found is not first:
        table = [[each.hits, each.rollouts - each.hits] for each in (found, first)]
        p = float(stats.fisher_exact(table).pvalue)
    return Cell(judge, label, alpha, found.rollouts, found.hits, found.low, found.high, p)


def _with_alarms(cells: Sequence[Cell], false_alarms: float) -> list[Cell]:
    first = {(cell.behaviour, cell.alpha): cell.rate for cell in cells if math.isnan(cell.p)}
    tested = [cell for cell in cells if not math.isnan(cell.p)]
    found = dict(zip(map(id, tested), stats.false_discovery_control([cell.p for cell in tested]), strict=True))
    marked = []
    for cell in cells:
        q = float(found.get(id(cell), math.nan))
        direction: Mark = "up" if cell.rate > first[cell.behaviour, cell.alpha] else "down"
        marked.append(replace(cell, q=q, alarm=direction if q <= false_alarms else ""))
    return marked


def _notes(runs: Mapping[str, Run], alphas: Sequence[float]) -> tuple[str, ...]:
    found = []
    before = {
        (each["model_id"], each["revision"]) for run in runs.values() if (each := run.manifest.pair.get("before"))
    }
    if len(before) > 1:
        names = ", ".join(sorted(f"{name} ({revision})" for name, revision in before))
        found.append(f"The runs have different before models, {names}: rates at other alphas than 0 hang on them too.")
    unfinished = [label for label, run in runs.items() if not run.is_complete]
    if unfinished:
        found.append(f"The survey is not complete: {', '.join(unfinished)}.")
    every = {alpha for run in runs.values() for alpha in run.settings.alphas}
    if left_out := sorted(every - set(alphas)):
        found.append(f"Left out, since not every run has them: alpha {', '.join(f'{alpha:g}' for alpha in left_out)}.")
    return tuple(found)


def heat_map(timeline: Timeline, behaviour: str) -> Exhibit:
    """One behaviour as a picture: checkpoints from the top, alphas from the left; frames and arrows are alarms."""
    cells = {(cell.checkpoint, cell.alpha): cell for cell in timeline.cells if cell.behaviour == behaviour}
    grid = [[cells.get((checkpoint, alpha)) for alpha in timeline.alphas] for checkpoint in timeline.checkpoints]
    return charts.heat_map(
        behaviour,
        timeline.checkpoints,
        [f"{alpha:g}" for alpha in timeline.alphas],
        [[math.nan if cell is None else cell.rate for cell in row] for row in grid],
        [["" if cell is None else cell.alarm for cell in row] for row in grid],
    )


def heat_maps(timeline: Timeline) -> Exhibit:
    """All behaviours, with what the marks mean."""
    pictures = [heat_map(timeline, behaviour) for behaviour in timeline.behaviours]
    return exhibit("heat_maps", pictures=pictures, timeline=timeline)


def checkpoints_page(timeline: Timeline) -> Page:
    """Heat maps, and every cell with its interval and its test, as one HTML file."""
    return page("checkpoints.html.j2", title="Checkpoints over time", timeline=timeline, pictures=heat_maps(timeline))
