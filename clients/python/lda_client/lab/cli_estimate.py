"""The commands that answer "how often": `lda estimate` and `lda plan`, as `COMMANDS`.

Knows click and the lab's public side. What is heavy is imported when a command runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lda_client._cli._common import examples, note
from lda_client.lab._answers import METHOD_NAMES, without_nan
from lda_client.lab.cli import LabCommand

if TYPE_CHECKING:
    from lda_client.lab.estimate import RunEstimates
    from lda_client.lab.estimators import Estimate

_RUN = click.Path(file_okay=False, path_type=Path)
_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command(
    cls=LabCommand,
    short_help="Estimate how often the unmodified model shows a behaviour.",
    epilog=examples(
        "lda estimate runs/first --judge ad",
        "lda estimate runs/first --judge ad --prompt who --prompt why",
        "lda estimate runs/first --judge ad --json",
    ),
)
@click.argument("run", type=_RUN)
@click.option("--judge", required=True, help="Whose verdicts; `lda judge` makes them.")
@click.option("--prompt", "prompt_ids", multiple=True, metavar="ID", help="Of this prompt only; may be repeated.")
@click.option("--level", type=_SHARE, default=0.95, show_default=True, help="Of the intervals.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def estimate(run: Path, judge: str, prompt_ids: tuple[str, ...], level: float, as_json: bool) -> None:
    """How often the unmodified model shows what a judge looked for, three ways from one run.

    Counted at alpha 0; all rollouts, each weighted by how much likelier it is without amplification; and the rates at
    the other alphas, extrapolated to 0. A method whose evidence does not carry an answer gives none and says why. If
    `lda agree --reference` has measured the judge, its errors are taken out and widen the intervals. Exit code 1: no
    method answered.
    """
    from lda_client.lab.estimate import estimate_run
    from lda_client.lab.runs import Run

    found = estimate_run(Run.open(run), judge, prompt_ids, level)
    if as_json:
        click.echo(json.dumps(without_nan(asdict(found)), ensure_ascii=False))
    else:
        _print(found)
    if all(each.rate is None for each in found.estimates):
        raise click.exceptions.Exit(1)


def _print(found: RunEstimates) -> None:
    from lda_client._cli._tables import plain_table, print_table

    table = plain_table("alpha", "rollouts", "hits", "rate", "interval")
    for each in found.by_alpha:
        rate = _percent(each.hits / each.rollouts)
        table.add_row(f"{each.alpha:g}", f"{each.rollouts:,}", f"{each.hits:,}", rate, _span(each.low, each.high))
    print_table(table)
    answers = plain_table("the unmodified model", "rate", "interval", "evidence")
    for answer in found.estimates:
        rate = "no answer" if answer.rate is None else _percent(answer.rate)
        span = "" if answer.low is None or answer.high is None else _span(answer.low, answer.high)
        answers.add_row(METHOD_NAMES[answer.method], rate, span, _evidence(answer))
    click.echo()
    print_table(answers)
    for answer in found.estimates:
        for refusal in answer.refusals:
            click.echo(f"{METHOD_NAMES[answer.method]}: no answer, since {refusal}.")
    if found.undecided:
        note(f"{found.undecided:,} rollouts without a verdict are left out.")
    if found.quality is not None:
        sensitivity, specificity = found.quality.sensitivity, found.quality.specificity
        note(f"Corrected for the judge: {sensitivity:.1%} of hits found, {specificity:.3%} of others left alone.")


def _evidence(answer: Estimate) -> str:
    facts = answer.diagnostics
    if answer.method == "pooled" and facts:
        tail = facts["tail_index"]
        worth = f"worth {facts['effective_hits']:.0f} plain hits, largest {facts['largest_share']:.0%}"
        return worth if math.isnan(tail) else f"{worth}, Pareto k {tail:.2f}"
    if answer.method == "path" and facts:
        fit = f"residual {facts['residual']:.1f}, largest miss {facts['largest_miss']:.1f}"
        return f"{facts['points']:.0f} alphas, {facts['slopes']:.0f} slopes, {fit}"
    return f"{answer.hits:,} of {answer.rollouts:,}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}%"


def _span(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"


@click.command(
    cls=LabCommand,
    short_help="Say how many plain rollouts a rate asks for.",
    epilog=examples("lda plan 1e-4", "lda plan 0.001 --error 0.2"),
)
@click.argument("rate", type=_SHARE)
@click.option("--chance", type=_SHARE, default=0.95, show_default=True, help="Of seeing it at least once.")
@click.option(
    "--error",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Standard error, as a share of the rate.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def plan(rate: float, chance: float, error: float, as_json: bool) -> None:
    """How many plain rollouts a behaviour of this RATE asks for.

    Amplification asks for fewer, how many fewer depends on the pair: draw a small survey and look at `lda estimate`.
    """
    from lda_client._cli._tables import print_values
    from lda_client.lab.estimators import rollouts_for_error, rollouts_to_see

    see, measure = rollouts_to_see(rate, chance), rollouts_for_error(rate, error)
    if as_json:
        click.echo(json.dumps({"rate": rate, "rollouts_to_see": see, "rollouts_to_measure": measure}))
        return
    print_values(
        {
            f"to see it once, with a chance of {chance:.0%}": f"{see:,} rollouts at alpha 0",
            f"to measure it, with an error of {error:.0%} of it": f"{measure:,} rollouts at alpha 0",
        }
    )


COMMANDS: tuple[click.Command, ...] = (estimate, plan)
