"""The command that answers "what": `lda surface`, as `COMMANDS`.

Knows click and the lab's public side. What is heavy is imported when the command runs.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import examples, note
from lda_client.lab._answers import without_nan
from lda_client.lab.cli import LabCommand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lda_client.lab.estimate import AlphaRate
    from lda_client.lab.estimators import Estimate
    from lda_client.lab.surface import Artefact, Example, Finding, Surface

METHODS = {"naive": "counted", "pooled": "weighted", "path": "extrapolated"}
AROUND = 90  # characters shown on either side of what was found
_RUN = click.Path(file_okay=False, path_type=Path)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, such as 0.5,1.") from None


@click.command(
    cls=LabCommand,
    short_help="Find what amplified rollouts say and plain ones do not.",
    epilog=examples(
        "lda surface runs/first",
        "lda surface runs/first --alpha 0.5,1 --top 5",
        "lda surface runs/first --against=-1,0",
        "lda surface runs/first --save found --finding 2",
    ),
)
@click.argument("run", type=_RUN)
@click.option("--alpha", "alphas", callback=_numbers, metavar="A,B,...", help="Look here.  [default: all above 0]")
@click.option(
    "--against",
    callback=_numbers,
    default="0",
    show_default=True,
    metavar="A,B,...",
    help="Compare with these; -1 is the model before its training, so that --alpha 0 --against=-1 shows what the "
    "training changed without any amplification.",
)
@click.option(
    "--fdr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of false findings that is allowed.",
)
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Findings to show.")
@click.option("--save", "name", metavar="NAME", help="Keep a finding as the verdicts of a judge of this name.")
@click.option(
    "--finding", "place", type=click.IntRange(min=1), default=1, show_default=True, help="Which one --save keeps."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def surface(
    run: Path,
    alphas: tuple[float, ...],
    against: tuple[float, ...],
    fdr: float,
    top: int,
    name: str | None,
    place: int,
    as_json: bool,
) -> None:
    """Find what the amplified rollouts of RUN say and ordinary ones do not, without being told what to look for.

    Phrases of one to five words (and characters, for symbols and for scripts without spaces) are counted, each rollout
    once, and amplified rollouts are compared with those of the same prompt at alpha 0. Phrases that come together are
    one finding. Findings are ranked by how many times as often they come, at least, and the share of false ones is kept
    below --fdr. Text that has come apart (loops, broken characters), as high alphas make it, is counted by itself.

    A finding is words, and words are no proof: read its examples, judge the run with the command that is shown, then
    ask `lda estimate` how often the unmodified model does it. Few findings: draw more, or at higher alphas.
    """
    from lda_client.lab.runs import Run
    from lda_client.lab.surface import save_finding, surface_run

    opened = Run.open(run)
    found = surface_run(opened, alphas, against, fdr, max(top, place if name else 1))
    saved = save_finding(opened, found, name, place) if name else None
    if as_json:
        click.echo(json.dumps(_as_json(run, found), ensure_ascii=False))
    else:
        _print(run, found)
    if name and saved:
        note(f"Kept {saved.phrase!r} as {name}; go on with `lda estimate {shlex.quote(str(run))} --judge {name}`.")


def judge_command(run: Path, finding: Finding, place: int) -> str:
    """The command that judges a run by a finding."""
    words = ["lda", "judge", str(run), "--judge", f"regex:{finding.regex}", "--name", f"finding-{place}"]
    return shlex.join(words)


def _as_json(run: Path, found: Surface) -> dict[str, Any]:
    values = asdict(found)
    for place, (finding, value) in enumerate(zip(found.findings, values["findings"], strict=True), 1):
        value["judge_command"] = judge_command(run, finding, place)
    plain: dict[str, Any] = without_nan(values)
    return plain


def _print(run: Path, found: Surface) -> None:
    click.echo(
        f"{found.amplified_rollouts:,} rollouts at alpha {_list(found.amplified)} against {found.ordinary_rollouts:,} "
        f"at {_list(found.ordinary)}: {found.phrases:,} phrases, {len(found.findings) + found.more:,} findings."
    )
    for place, finding in enumerate(found.findings, 1):
        _print_finding(run, finding, place)
    if found.more:
        click.echo(f"\n{found.more:,} more; --top shows them.")
    if not found.findings:
        click.echo("Nothing comes more often than chance explains. Draw more rollouts, or at higher alphas.")
    for artefact in found.artefacts:
        _print_artefact(artefact)


def _list(alphas: Sequence[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in alphas)


def _print_finding(run: Path, finding: Finding, place: int) -> None:
    click.echo()
    click.secho(f"{place}. {finding.phrase}", bold=True)
    click.echo(
        f"   {finding.ratio:,.3g} times as often, at least {finding.ratio_low:,.3g}; with {finding.prompts:,} "
        f"prompt{'' if finding.prompts == 1 else 's'}; q = {max(finding.q_value, 1e-99):.1g}"
    )
    _print_rates(finding.by_alpha)
    if finding.estimates:
        click.echo("   at alpha 0: " + "; ".join(map(_answer, finding.estimates)))
    if finding.others:
        click.echo("   also: " + " | ".join(finding.others))
    for example in finding.examples:
        click.echo(f"   {_where(example)}: {_marked(example)}")
    click.echo(f"   {judge_command(run, finding, place)}")


def _print_artefact(artefact: Artefact) -> None:
    click.echo()
    click.secho(f"Set apart: {artefact.kind}", bold=True)
    _print_rates(artefact.by_alpha)
    for example in artefact.examples:
        click.echo(f"   {_where(example)}: {_marked(example)}")


def _print_rates(by_alpha: Sequence[AlphaRate]) -> None:
    for each in by_alpha:
        rate = _percent(each.hits / each.rollouts)
        span = f"{_percent(each.low)} to {_percent(each.high)}"
        click.echo(f"   alpha {each.alpha:<6g}{each.hits:>8,} of {each.rollouts:<8,}{rate:>8}  ({span})")


def _answer(answer: Estimate) -> str:
    if answer.rate is None or answer.low is None or answer.high is None:
        return f"{METHODS[answer.method]}: no answer"
    return f"{METHODS[answer.method]} {_percent(answer.rate)} ({_percent(answer.low)} to {_percent(answer.high)})"


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}%"


def _where(example: Example) -> str:
    return click.style(f"{example.prompt_id} at {example.alpha:g}", dim=True)


def _marked(example: Example) -> str:
    """The completion around what was found, which stands between marks."""
    first, last = max(0, example.start - AROUND), min(len(example.text), example.end + AROUND)
    before, after = example.text[first : example.start], example.text[example.end : last]
    found = example.text[example.start : example.end]
    marked = click.style(f"»{found}«", bold=True) if found else ""
    text = ("…" if first else "") + before + marked + after + ("…" if last < len(example.text) else "")
    return " ".join(text.split())


COMMANDS: tuple[click.Command, ...] = (surface,)
