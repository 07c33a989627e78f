"""The commands that answer "is it real": `lda check` and `lda triggers`, as `COMMANDS`.

Knows click and the lab's public side. What is heavy is imported when a command runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import examples, note, with_options
from lda_client.lab.cli import _CONNECTION, LabCommand, _tls

if TYPE_CHECKING:
    from lda_client._cli._common import Decorator
    from lda_client.lab.check import CheckedHit, RunCheck
    from lda_client.lab.triggers import Triggers

_RUN = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
SHOWN = 20  # hits in the table; all are in the file
TEXT_WIDTH = 60
_JUDGE = click.option("--judge", required=True, metavar="NAME", help="Whose verdicts; it judges the new rollouts too.")
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
_SERVERS: tuple[Decorator, ...] = (*_CONNECTION[:-1], _JSON)


def _connection(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the lab's functions that say where to ask."""
    tls = _tls(options["tls"], options["tls_ca"], options["tls_cert"], options["tls_key"])
    return {"targets": options["targets"], "credentials": tls, "token": options["token"]}


# lda check ------------------------------------------------------------------------------------------------------------


@click.command(
    cls=LabCommand,
    short_help="Ask whether the unmodified model would say what hits say.",
    epilog=examples(
        "lda check runs/first --judge ad",
        "lda check runs/first --judge ad --limit 100 --target gpu-1:50051",
        "lda check runs/first --judge ad --json",
    ),
)
@click.argument("run", type=_RUN)
@_JUDGE
@click.option("--limit", type=_COUNT, help="Check a random sample of so many hits.  [default: all]")
@click.option(
    "-n", "--rollouts", type=_COUNT, default=16, show_default=True, help="Rollouts from each place it goes on from."
)
@_SEED
@partial(with_options, options=_SERVERS)
def check(run: Path, judge: str, limit: int | None, rollouts: int, seed: int, as_json: bool, **options: Any) -> None:
    """Would the unmodified model say what hits say? A verdict on each; keeps RUN/checks-NAME.parquet.

    Each hit is scored under the after model at alpha 0 and held against that model's own rollouts: its geometric-mean
    token probability and its weakest token. Then the model is led past the tokens that it would least have written,
    and goes on by itself at alpha 0; the same judge says whether the behaviour follows.

    on-policy: as likely as the model's own text. reachable: one or two unlikely tokens lead there, and the model goes
    on by itself. artefact: more of them, or it never goes on; what amplification showed there is not in the model.
    """
    from lda_client.lab.check import check_path, check_run
    from lda_client.lab.runs import Run

    opened = Run.open(run)
    found = check_run(opened, judge, limit=limit, rollouts=rollouts, seed=seed, **_connection(options))
    if as_json:
        click.echo(json.dumps({**asdict(found), "counts": found.counts()}, ensure_ascii=False))
        return
    _print_check(found)
    note(f"Kept in {check_path(opened, judge)}.")


def _print_check(found: RunCheck) -> None:
    from lda_client._cli._tables import plain_table, print_table
    from lda_client.lab.check import YARDSTICK_QUANTILE

    own = found.yardstick
    table = plain_table("hit", "alpha", "mean p", "weakest", "at", "steps", "goes on", "verdict")
    for hit in found.checked[:SHOWN]:
        cells = f"{hit.alpha:g}", f"{hit.mean:.3f}", f"{hit.weakest:.2g}", str(hit.weakest_at), str(hit.steps)
        table.add_row(_short(hit.text), *cells, _goes_on(hit), hit.verdict)
    table.add_section()
    typical = f"{own.mean_median:.3f}", f"{own.weakest_median:.2g}"
    low = f"{own.mean_low:.3f}", f"{own.weakest_low:.2g}"
    table.add_row("the model's own, the typical one", "0", *typical, "", "", "", "")
    table.add_row(f"the model's own, {1 - YARDSTICK_QUANTILE:.1%} reach", "0", *low, "", "", "", "")
    print_table(table)
    if len(found.checked) > SHOWN:
        note(f"{SHOWN} of {len(found.checked):,} are shown.")
    for verdict, count in found.counts().items():
        if count:
            reason = next(hit.reason for hit in found.checked if hit.verdict == verdict)
            click.echo(f"{verdict}: {count:,} of {len(found.checked):,}; such as: {reason}.")
    click.echo(f"Checked: {found.taken}. Continued {_ways(found)}.")


def _ways(found: RunCheck) -> str:
    exact = sum(hit.via == "ids" for hit in found.checked)
    if exact == len(found.checked):
        return "from token ids, exactly"
    rest = f"{len(found.checked) - exact:,} as text, which may be cut into other tokens"
    return f"{exact:,} from token ids, exactly, and {rest}" if exact else rest


def _goes_on(hit: CheckedHit) -> str:
    best = max(hit.branches, key=lambda branch: (branch.low, branch.position), default=None)
    if best is None:
        return "-"
    return f"{best.hits}/{best.rollouts} ({best.low:.0%} to {best.high:.0%})"


def _short(text: str) -> str:
    """One line of a text."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


# lda triggers ---------------------------------------------------------------------------------------------------------


@click.command(
    cls=LabCommand,
    short_help="Find the words that bring a behaviour about.",
    epilog=examples(
        "lda triggers runs/first --judge owls",
        "lda triggers runs/first --judge owls --candidates 30 -n 16 --target gpu-1:50051",
    ),
)
@click.argument("run", type=_RUN)
@_JUDGE
@click.option("--candidates", type=_COUNT, default=12, show_default=True, help="Phrases to put to the test.")
@click.option(
    "-n", "--rollouts", type=_COUNT, default=4, show_default=True, help="Rollouts of each prompt with each phrase."
)
@_SEED
@partial(with_options, options=_SERVERS)
def triggers(run: Path, judge: str, candidates: int, rollouts: int, seed: int, as_json: bool, **options: Any) -> None:
    """Which words bring the behaviour about? Finds phrases and tries them; keeps RUN/triggers-NAME.parquet.

    Phrases of one to four words or tokens that stand in prompts, or in completions before the behaviour, more often in
    hits than elsewhere are suspects. Each is appended to the run's prompts, and the unmodified model (alpha 0) is asked
    with it and without. Of those that work, shorter parts are tried too, so that what is left is what it takes. Effects
    come with 95% intervals, and q is corrected for how many were tried.
    """
    from lda_client.lab.runs import Run
    from lda_client.lab.triggers import find_triggers, triggers_path

    opened = Run.open(run)
    found = find_triggers(opened, judge, candidates=candidates, rollouts=rollouts, seed=seed, **_connection(options))
    if as_json:
        click.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        _print_triggers(found)
        note(f"Kept in {triggers_path(opened, judge)}.")


def _print_triggers(found: Triggers) -> None:
    from lda_client._cli._tables import plain_table, print_table

    table = plain_table("appended at alpha 0", "found in", "hits", "others", "with", "without", "effect", "q", "")
    for each in found.tried:
        suspect = each.suspect
        table.add_row(
            repr(each.text),
            f"{suspect.place} ({suspect.unit})",
            f"{suspect.hits_with:,}/{suspect.hits:,}",
            f"{suspect.others_with:,}/{suspect.others:,}",
            f"{each.hits_with}/{each.rollouts_with}",
            f"{each.hits_without}/{each.rollouts_without}",
            f"{each.effect:+.1%} ({each.low:+.1%} to {each.high:+.1%})",
            f"{each.q:.2g}",
            "what it takes" if each.is_shortest else "works" if each.works else "",
        )
    print_table(table)
    click.echo(
        f"{found.looked_at:,} n-grams were looked at ({found.searched}), {len(found.suspects):,} are enriched in hits, "
        f"{len(found.tried):,} were tried in {found.prompts:,} prompts."
    )
    named = ", ".join(repr(each.text) for each in found.found)
    click.echo(f"What it takes: {named}." if named else "None of them brings the behaviour about.")


COMMANDS: tuple[click.Command, ...] = (check, triggers)
