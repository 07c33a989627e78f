"""The commands that show and advise: `lda report`, `lda alpha` and `lda checkpoints`, as `COMMANDS`.

Knows click and the lab's public side. What is heavy is imported when a command runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import examples, note
from lda_client.lab._answers import without_nan
from lda_client.lab.cli import LabCommand

if TYPE_CHECKING:
    from lda_client.lab.agreement import Interval
    from lda_client.lab.alpha_advice import Advice
    from lda_client.lab.checkpoints import Timeline
    from lda_client.lab.runs import Run

_RUN = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.command(
    cls=LabCommand,
    short_help="Write a run as one page of HTML.",
    epilog=examples("lda report runs/first --judge ad", "lda report runs/first --judge ad --out first.html"),
)
@click.argument("run", type=_RUN)
@click.option("--judge", required=True, help="Whose verdicts; `lda judge` makes them.")
@click.option("--out", type=_FILE, help="The file to write.  [default: RUN/report-NAME.html]")
def report(run: Path, judge: str, out: Path | None) -> None:
    """Write what is known of RUN as one HTML file: to read, to print, to send.

    Rate against alpha, the same prompts at alpha -1, 0 and 1, the tokens of hits tinted by how much likelier training
    made them, the rate of the unmodified model with its diagnostics and refusals, what `lda check` and `lda surface`
    have left in RUN, the judge, and everything needed to run it again. The file has no scripts and loads nothing. Tints
    need a survey that was drawn with --diagnostics.
    """
    from lda_client.lab.report import write_report
    from lda_client.lab.runs import Run

    path = out or run / f"report-{judge}.html"
    try:
        write_report(Run.open(run), judge, path)
    except OSError as error:
        raise click.ClickException(f"{path}: cannot be written ({error.strerror}); give another --out.") from error
    click.echo(path)


@click.command(
    cls=LabCommand,
    short_help="Advise on alpha by surprise and coherence.",
    epilog=examples(
        "lda survey questions.txt --alphas 0,0.25,0.5,1,2,4 -n 32 --diagnostics --out runs/small",
        "lda alpha runs/small",
        "lda alpha runs/small --kl-budget 0.5 --coherence 0.9 --judge ad",
    ),
)
@click.argument("run", type=_RUN)
@click.option(
    "--kl-budget",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="NATS",
    help="Extra surprise allowed per token: mean log p of text at alpha 0 minus that of amplified text, with p the "
    "unmodified model.",
)
@click.option(
    "--coherence",
    type=_SHARE,
    default=0.7,
    show_default=True,
    help="The share of alpha 0's distinct pairs of tokens, and of its rollouts that end by themselves, that must be "
    "left.",
)
@click.option("--judge", help="Show this judge's rates beside the curve.")
@click.option("--level", type=_SHARE, default=0.95, show_default=True, help="Of the intervals.")
@_JSON
def alpha(run: Path, kl_budget: float, coherence: float, judge: str | None, level: float, as_json: bool) -> None:
    """Advise on alpha: the largest one at which text is still near to what the unmodified model says.

    RUN is a small survey with rollouts at alpha 0 and at some alphas above. An alpha is within a limit if its whole
    interval is (a bootstrap over rollouts); the advice is the largest one with no alpha below it that is not. `KL` is
    the mean KL(after || before) of a token, if RUN was drawn with --diagnostics. Exit code 1: no alpha is within.
    """
    from lda_client.lab.alpha_advice import advise
    from lda_client.lab.runs import Run

    opened = Run.open(run)
    advice = advise(opened, kl_budget, coherence, level)
    rates = _rates(opened, judge) if judge is not None else None
    if as_json:
        rows = [
            {**asdict(point), **_intervals(point)} | ({"rate": rates.get(point.alpha)} if rates is not None else {})
            for point in advice.curve
        ]
        click.echo(json.dumps(without_nan({**asdict(advice), "curve": rows})))
    else:
        _print_advice(advice, rates)
    if advice.alpha is None:
        raise click.exceptions.Exit(1)


def _intervals(point: Any) -> dict[str, Any]:
    return {name: getattr(point, name)._asdict() for name in ("extra_surprise", "coherence")}


def _rates(run: Run, judge: str) -> dict[float, float]:
    decided = run.judged(judge, ["output_tokens"]).drop_nulls("hit")
    return {float(value): float(rate) for value, rate in decided.group_by("alpha").agg(_mean_hit()).iter_rows()}


def _mean_hit() -> Any:
    import polars as pl

    return pl.col("hit").mean()


def _print_advice(advice: Advice, rates: dict[float, float] | None) -> None:
    from lda_client._cli._tables import plain_table, print_table

    has_kl = any(not math.isnan(point.kl_after_before) for point in advice.curve)
    headings = ["alpha", "rollouts", "surprise", "extra", "interval", "divergence", *(["KL"] if has_kl else [])]
    headings += ["distinct", "ended", "coherence", "interval", *(["rate"] if rates is not None else [])]
    table = plain_table(*headings)
    for point in advice.curve:
        row = [f"{point.alpha:g}", f"{point.rollouts:,}", f"{point.surprise:.2f}"]
        row += [*_figures(point.extra_surprise, "+.2f"), f"{point.divergence:.2f}"]
        row += [f"{point.kl_after_before:.2f}"] if has_kl else []
        row += [f"{point.distinct:.3f}", f"{point.ended:.1%}", *_figures(point.coherence, ".2f")]
        row += [f"{100 * rates.get(point.alpha, math.nan):.3g}%"] if rates is not None else []
        table.add_row(*row)
    print_table(table)
    for point in advice.curve:
        for reason in point.reasons:
            click.echo(f"alpha {point.alpha:g} is too much: {reason}.")
    if advice.budget_alpha is not None:
        click.echo(f"The budget of {advice.kl_budget:g} nats per token is spent near alpha {advice.budget_alpha:.2g}.")
    if advice.alpha is None:
        click.echo("No alpha above 0 is within both limits: draw at smaller ones, or more rollouts.")
    else:
        click.echo(f"Advice: alpha {advice.alpha:g}.")


def _figures(interval: Interval, form: str) -> list[str]:
    return [f"{interval.estimate:{form}}", f"{interval.low:{form}} to {interval.high:{form}}"]


def _labelled(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Labels and folders of NAME=RUN; a folder alone is its own label."""
    found: dict[str, Path] = {}
    for value in values:
        label, separator, folder = value.partition("=")
        if not separator:
            label, folder = Path(value).name, value
        if not label or not folder:
            raise click.BadParameter(f"{value!r} is no NAME=RUN.")
        if label in found:
            raise click.BadParameter(f"two runs are named {label!r}; give names, as in step-0={folder}.")
        found[label] = Path(folder)
    return found


@click.command(
    cls=LabCommand,
    short_help="Compare a behaviour over checkpoints and alphas.",
    epilog=examples(
        "lda checkpoints step-0=runs/0 step-500=runs/500 step-1000=runs/1000 --judge refusal",
        "lda checkpoints runs/0 runs/500 --judge refusal --judge ad --out timeline.html",
        "lda checkpoints runs/0 runs/500 --judge refusal --json",
    ),
)
@click.argument("runs", nargs=-1, required=True, callback=_labelled, metavar="[NAME=]RUN...")
@click.option("--judge", "judges", multiple=True, required=True, help="A behaviour; may be repeated.")
@click.option(
    "--false-alarms",
    type=_SHARE,
    default=0.05,
    show_default=True,
    help="The share of alarms that may be false (Benjamini and Hochberg).",
)
@click.option("--level", type=_SHARE, default=0.95, show_default=True, help="Of the intervals.")
@click.option("--out", type=_FILE, help="Write heat maps: .html with every cell, or .svg (one behaviour).")
@_JSON
def checkpoints(
    runs: dict[str, Path],
    judges: tuple[str, ...],
    false_alarms: float,
    level: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Follow behaviours over checkpoints: behaviour x checkpoint x alpha, one run for each checkpoint.

    Runs come in order of time; each was drawn from a pair of its own (one before model, many after models), with the
    same prompts and settings, and judged with the same command. A cell that departs from the first checkpoint at the
    same alpha is marked: Fisher's exact test, false alarms held down over all cells. Amplified alphas show a change
    before alpha 0 does.
    """
    from lda_client.lab.checkpoints import compare_checkpoints
    from lda_client.lab.runs import Run

    _check_out(out, judges)
    opened = {label: Run.open(folder) for label, folder in runs.items()}
    timeline = compare_checkpoints(opened, list(dict.fromkeys(judges)), false_alarms, level)
    if out is not None:
        _write(timeline, out)
    if as_json:
        cells = [{**asdict(cell), "rate": cell.rate} for cell in timeline.cells]
        click.echo(json.dumps(without_nan({**asdict(timeline), "cells": cells}), ensure_ascii=False))
    else:
        _print_timeline(timeline)


def _check_out(out: Path | None, judges: tuple[str, ...]) -> None:
    if out is None or out.suffix == ".html":
        return
    if out.suffix != ".svg":
        raise click.BadParameter("give a name that ends in .html or .svg.", param_hint="--out")
    if len(set(judges)) > 1:
        raise click.BadParameter("an .svg shows one behaviour; give an .html, or one --judge.", param_hint="--out")


def _write(timeline: Timeline, out: Path) -> None:
    from lda_client.lab._files import write_text
    from lda_client.lab.checkpoints import checkpoints_page, heat_map

    is_page = out.suffix == ".html"
    shown = checkpoints_page(timeline) if is_page else heat_map(timeline, timeline.behaviours[0])
    try:
        write_text(out, shown.html + "\n")
    except OSError as error:
        raise click.ClickException(f"{out}: cannot be written ({error.strerror}); give another --out.") from error
    note(f"Wrote {out}.")


def _print_timeline(timeline: Timeline) -> None:
    from rich.text import Text

    from lda_client._cli._tables import plain_table, print_table
    from lda_client.lab.charts import MARKS

    cells = {(cell.behaviour, cell.checkpoint, cell.alpha): cell for cell in timeline.cells}
    table = plain_table("behaviour", "checkpoint", *(f"alpha {value:g}" for value in timeline.alphas))
    for behaviour in timeline.behaviours:
        for checkpoint in timeline.checkpoints:
            row = [cells.get((behaviour, checkpoint, value)) for value in timeline.alphas]
            shown = ["" if each is None else f"{100 * each.rate:.3g}%{MARKS[each.alarm] or '  '}" for each in row]
            table.add_row(Text(behaviour), Text(checkpoint), *shown)
    print_table(table)
    first = timeline.checkpoints[0]
    for cell in timeline.alarms:
        click.echo(
            f"{cell.behaviour} at alpha {cell.alpha:g}: {cell.checkpoint} departs from {first}, {cell.alarm} to "
            f"{100 * cell.rate:.3g}% ({100 * cell.low:.3g}% to {100 * cell.high:.3g}%; q {cell.q:.2g})."
        )
    if not timeline.alarms:
        click.echo(f"No cell departs from {first}.")
    for each in timeline.notes:
        note(each)


COMMANDS: tuple[click.Command, ...] = (report, alpha, checkpoints)
