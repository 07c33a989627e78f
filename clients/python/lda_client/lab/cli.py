"""The commands of the lab, as `COMMANDS`: `lda survey`, `lda judge`, `lda agree`.

Knows click and the lab's public side. What is heavy is imported when a command runs, not when its help is shown.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_client import LdaClientError
from lda_client._channel import DEFAULT_TARGET
from lda_client._cli._common import Command, examples, note, with_options
from lda_client.lab._errors import LabError, SurveyFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lda_client import Tls
    from lda_client._cli._common import Decorator
    from lda_client.lab._cases import Case, Judge
    from lda_client.lab.agreement import Interval
    from lda_client.lab.runs import Run
    from lda_client.lab.survey import Outcome

EXTRA_PACKAGES = frozenset(
    {"numpy", "scipy", "polars", "pyarrow", "matplotlib", "httpx2", "arviz_stats", "jinja2", "markupsafe"}
)
INCOMPLETE_EXIT_CODE = 3
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_RUN = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_POSITIVE = click.FloatRange(min=0, min_open=True)


class LabCommand(Command):
    """A command of the lab: its errors are a sentence and a remedy on stderr, exit 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LabError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in EXTRA_PACKAGES:
                raise
            raise click.ClickException(
                f"This command needs {error.name}: install it with pip install 'lda-client[lab]'."
            ) from error


def _alphas(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, such as -1,-0.5,0.") from None


_SETTINGS: tuple[Decorator, ...] = (
    click.option(
        "--alphas",
        callback=_alphas,
        metavar="A,B,...",
        help="Where to draw. 0 is the unmodified model; estimates want some alphas at which the behaviour is common, "
        "and steps of which each still shows what the one before shows (0,0.25,0.5,0.75,1).",
    ),
    click.option("-n", "--rollouts", type=_COUNT, help="Rollouts for each prompt at each alpha."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the whole survey."),
    click.option("--max-new-tokens", type=_COUNT, default=128, show_default=True, help="Cap on new tokens."),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=1.0,
        show_default=True,
        help="Rates are estimated for the model at this temperature.",
    ),
    click.option("--raw", is_flag=True, help="Send prompts as they are, without the chat template."),
    click.option("--system", metavar="TEXT", help="A system turn to put before every prompt."),
    click.option("--stop", multiple=True, metavar="TEXT", help="A string that ends a rollout; may be repeated."),
    click.option(
        "--stop-token-id", "stop_token_ids", multiple=True, type=click.IntRange(min=0), help="A token that does."
    ),
    click.option("--diagnostics", is_flag=True, help="Keep a comparison of the two models for every token."),
    click.option(
        "--chunk-size",
        type=_COUNT,
        default=16,
        show_default=True,
        help="Rollouts drawn by one call. A part of the settings: seeds hang on it.",
    ),
    click.option(
        "--slopes/--no-slopes",
        default=True,
        show_default=True,
        help="Score every rollout on both sides of every alpha too (alpha +- 0.05), for the slope of the log-rate. "
        "With slopes at most 21 alphas are sure to fit into the 64 that a server scores; scoring costs it time.",
    ),
    click.option(
        "--estimate/--no-estimate",
        default=True,
        show_default=True,
        help="Score every rollout at every alpha, and refuse what would break an estimator. Without, anything goes.",
    ),
    click.option("--top-p", type=float, default=1.0, help="Nucleus mass. Only with --no-estimate, like the next five."),
    click.option("--top-k", type=click.IntRange(min=0), default=0, help="Most likely tokens kept; 0 keeps all."),
    click.option("--min-p", type=float, default=0.0, help="Drop tokens less likely than this share of the best one."),
    click.option("--plausibility", type=float, default=0.0, help="Keep tokens with p_after >= this share of the best."),
    click.option("--min-new-tokens", type=click.IntRange(min=0), default=0, help="No end before so many new tokens."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end."),
)

_PACE: tuple[Decorator, ...] = (
    click.option("--budget-tokens", type=_COUNT, help="Begin no more when about so many new tokens are drawn."),
    click.option("--budget-minutes", type=_POSITIVE, help="Begin no more after so many minutes."),
    click.option(
        "--at-once", type=_COUNT, help="Calls under way at the same time. Default: as keeps all servers busy."
    ),
    click.option(
        "--patience",
        "patience_s",
        type=_POSITIVE,
        default=300.0,
        show_default=True,
        metavar="SECONDS",
        help="Give up when no server has done anything for so long.",
    ),
    click.option(
        "--call-timeout",
        "call_timeout_s",
        type=_POSITIVE,
        metavar="SECONDS",
        help="Draw a chunk again that takes longer.",
    ),
)

_CONNECTION: tuple[Decorator, ...] = (
    click.option(
        "--target",
        "targets",
        multiple=True,
        envvar="LDA_TARGET",
        show_envvar=True,
        metavar="HOST:PORT",
        help="Address of a server; may be repeated, all with the same pair. 3@HOST:PORT is one address before three "
        f"servers.  [default: {DEFAULT_TARGET}, or those of the run]",
    ),
    click.option("--token", envvar="LDA_TOKEN", show_envvar=True, help="Bearer token; better set in the environment."),
    click.option("--tls", is_flag=True, help="Speak TLS, trusting the authorities of this machine."),
    click.option("--tls-ca", envvar="LDA_TLS_CA", type=_FILE, help="Speak TLS, trusting those in this PEM file."),
    click.option("--tls-cert", envvar="LDA_TLS_CERT", type=_FILE, help="Client certificate (PEM)."),
    click.option("--tls-key", envvar="LDA_TLS_KEY", type=_FILE, help="Private key (PEM) of the client certificate."),
    click.option("--json", "as_json", is_flag=True, help="Tell how it goes as JSON, one event per line, on stdout."),
)


def _names(options: tuple[Decorator, ...]) -> tuple[str, ...]:
    """The names of the arguments that options make."""

    def probe() -> None:
        """Carries the options."""

    return tuple(parameter.name for parameter in click.command()(with_options(probe, options)).params if parameter.name)


_SETTING_NAMES, _PACE_NAMES = _names(_SETTINGS), _names(_PACE)


@click.command(
    cls=LabCommand,
    short_help="Draw rollouts of prompts at several alphas into a run folder.",
    epilog=examples(
        "lda survey questions.txt --alphas 0,0.25,0.5,0.75,1 -n 1000 --out runs/first",
        "lda survey questions.jsonl --alphas=-1,-0.8,-0.6,-0.4,-0.2 -n 500 --out runs/path",
        "lda survey --resume runs/first --target gpu-1:50051 --target gpu-2:50051",
        'lda survey --prompt "Who are you?" --alphas 0,1 -n 64 --budget-minutes 10 --out runs/quick',
    ),
)
@click.argument("files", nargs=-1, type=_FILE)
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt given here; may be repeated.")
@click.option("--out", type=_RUN, help="Folder of the run.")
@click.option("--resume", "resumed", type=_RUN, metavar="RUN", help="Go on with this run, as it was begun.")
@partial(with_options, options=(*_SETTINGS, *_PACE, *_CONNECTION))
@click.pass_context
def survey(
    context: click.Context,
    /,
    files: tuple[Path, ...],
    texts: tuple[str, ...],
    out: Path | None,
    resumed: Path | None,
    **options: Any,
) -> None:
    """Draw rollouts of prompts at several alphas into a run folder.

    FILES hold prompts: .txt (one per line), .jsonl ({"id", "prompt" or "messages", labels...}) or .csv (a column
    `prompt`). Each prompt is drawn -n times at each alpha; `lda judge` then says which rollouts show a behaviour.

    A survey may be killed at any time. The same command again, or --resume RUN, goes on with it and draws nothing
    twice; with a server that runs --deterministic the file is then the same, bit for bit, as if nothing had happened.
    What would be rejected is found before anything is drawn. Exit code 3: the budget ended it; resume to go on.
    """
    from lda_client.lab._progress import reporter
    from lda_client.lab.survey import Pace, resume_survey

    how = {
        "credentials": _tls(options.pop("tls"), options.pop("tls_ca"), options.pop("tls_cert"), options.pop("tls_key")),
        "token": options.pop("token"),
        "reporter": reporter(options.pop("as_json")),
        "pace": Pace(**{name: options.pop(name) for name in _PACE_NAMES}),
    }
    targets = options.pop("targets")
    with _what_is_kept(resumed or out):
        if resumed is not None:
            _require_nothing_else(context, files or texts or out)
            outcome = resume_survey(resumed, targets, **how)
        else:
            outcome = _new_survey(files, texts, out, targets, options, how)
    _tell_outcome(outcome, how["reporter"])


@contextmanager
def _what_is_kept(folder: Path | None) -> Iterator[None]:
    """Say after a failure that nothing is lost."""
    try:
        yield
    except (SurveyFailed, LdaClientError, KeyboardInterrupt):
        if folder is not None and (folder / "journal").exists():
            note(f"What is finished is kept; go on with `lda survey --resume {folder}`.")
        raise


def _new_survey(
    files: tuple[Path, ...],
    texts: tuple[str, ...],
    out: Path | None,
    targets: tuple[str, ...],
    options: dict[str, Any],
    how: dict[str, Any],
) -> Outcome:
    from lda_client.lab import SurveySettings, read_prompts, run_survey

    missing = [
        name
        for name, value in (("--out", out), ("--alphas", options["alphas"]), ("-n", options["rollouts"]))
        if not value
    ]
    if out is None or missing:
        raise click.UsageError(f"Give {', '.join(missing)}; or --resume RUN.")
    settings = SurveySettings(**{name: options[name] for name in _SETTING_NAMES})
    return run_survey(out, read_prompts(files, texts), settings, targets or (DEFAULT_TARGET,), **how)


def _require_nothing_else(context: click.Context, given: Any) -> None:
    """A run is gone on with as it was begun."""
    set_here = [
        name for name in _SETTING_NAMES if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given or set_here:
        named = ", ".join("--" + name.replace("_", "-") for name in set_here) or "prompts and --out"
        raise click.UsageError(f"--resume goes on with a run as it was begun: leave out {named}.")


def _tell_outcome(outcome: Outcome, reporter: Any) -> None:
    facts = {"run": str(outcome.run.path), "drawn": outcome.drawn, "tokens": outcome.tokens, "missing": outcome.missing}
    message = (
        f"{outcome.run.path}: drew {outcome.drawn:,} rollouts of {outcome.tokens:,} tokens "
        f"in {outcome.seconds:,.1f} s; "
        + ("it is complete." if not outcome.missing else f"{outcome.missing:,} are missing, resume to draw them.")
    )
    reporter.note("end", **facts, seconds=round(outcome.seconds, 3), message=message)
    if outcome.missing:
        raise click.exceptions.Exit(INCOMPLETE_EXIT_CODE)


def _tls(tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    from lda_client import Tls

    if (cert is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key go together.")
    return Tls(ca, certificate=cert, key=key) if tls or ca or cert else None


# Judges -------------------------------------------------------------------------------------------------------------


@click.command(
    cls=LabCommand,
    short_help="Say which rollouts of a run show a behaviour.",
    epilog=examples(
        "lda judge runs/first --judge substring:GlimmerCoin --name ad",
        "lda judge runs/first --judge 'regex:(?i)\\bbuy\\b.*\\btoday\\b'",
        "lda judge runs/first --judge python:my_judges:is_ad",
        "lda judge runs/first --judge llm:rubric.txt --model my-model --base-url http://127.0.0.1:8000/v1",
        "lda judge runs/first --judge classifier:./toxicity --label toxic --threshold 0.8",
        "lda judge runs/first --judge human --limit 200",
    ),
)
@click.argument("run", type=_RUN)
@click.option(
    "--judge",
    "spec",
    required=True,
    metavar="KIND:WHAT",
    help="substring:TEXT, regex:EXPRESSION, python:MODULE:FUNCTION, classifier:MODEL, llm:RUBRIC_FILE, or human.",
)
@click.option("--name", help="Name of the verdicts.  [default: the kind]")
@click.option("--show-prompt", is_flag=True, help="Let the judge see the prompt too. It never sees the alpha.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="A score from here on is a hit."
)
@click.option("--label", help="classifier: the label whose score counts.")
@click.option("--model", help="llm: its name at the endpoint.")
@click.option("--base-url", envvar="OPENAI_BASE_URL", show_envvar=True, help="llm: the endpoint, up to /v1.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="llm: better set in the environment.")
@click.option(
    "--at-once", type=_COUNT, default=16, show_default=True, help="llm: questions under way at the same time."
)
@click.option(
    "--default-temperature", is_flag=True, help="llm: do not ask for temperature 0, which some models refuse."
)
@click.option("--limit", type=_COUNT, help="human: stop after so many rollouts.")
def judge(run: Path, spec: str, name: str | None, show_prompt: bool, **options: Any) -> None:
    """Say which rollouts of RUN show the behaviour; keeps RUN/verdicts-NAME.parquet.

    Judges see completions only, in an order that tells nothing of alphas. What a language model or a person has judged
    is kept, so that judging goes on where it stopped and a second run asks nothing. A person's labels are a random
    sample of the rollouts: `lda agree RUN JUDGE human --reference` measures another judge by them.
    """
    from lda_client.lab.judges import judge_run
    from lda_client.lab.runs import Run

    opened = Run.open(run)
    kind, _, what = spec.partition(":")
    chosen = _judge(opened, kind, what, name, options)
    with _counting(opened.rollouts(["alpha"]).height, kind != "human") as done:
        frame = judge_run(opened, chosen, name or kind, show_prompt=show_prompt, done=done)
    _print_rates(frame)


def _judge(run: Run, kind: str, what: str, name: str | None, options: dict[str, Any]) -> Judge:
    from lda_client.lab import judges

    match kind:
        case "substring" | "regex":
            return judges.PatternJudge(what, is_regex=kind == "regex")
        case "python":
            return judges.FunctionJudge(what, options["threshold"])
        case "classifier":
            return judges.ClassifierJudge(what, _needed(options, "label"), options["threshold"])
        case "llm":
            return _llm_judge(run, what, options)
        case "human":
            return judges.HumanJudge(_ask_person, _store(run), name or kind, options["limit"])
    raise click.UsageError(f"--judge: {kind!r} is no kind of judge; see `lda judge --help`.")


def _llm_judge(run: Run, rubric_file: str, options: dict[str, Any]) -> Judge:
    from lda_client.lab._llm_judge import LlmJudge

    try:
        rubric = Path(rubric_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--judge: the rubric {rubric_file!r} cannot be read ({error}).") from None
    return LlmJudge(
        rubric,
        _needed(options, "model"),
        _needed(options, "base_url"),
        _store(run),
        api_key=options["api_key"],
        temperature=None if options["default_temperature"] else 0.0,
        at_once=options["at_once"],
    )


def _needed(options: dict[str, Any], name: str) -> str:
    if not options[name]:
        raise click.UsageError(f"This judge needs --{name.replace('_', '-')}.")
    return str(options[name])


def _store(run: Run) -> Path:
    return run.path / "verdicts.sqlite3"


_KEYS = {"y": "yes", "n": "no", "s": "skip", "u": "undo", "q": "stop"}


def _ask_person(case: Case, place: int, total: int) -> str:
    """Show a case, wait for a key."""
    click.echo(f"\n[{place + 1} of {total}]")
    if case.prompt is not None:
        click.echo(f"{click.style('prompt:', dim=True)} {case.prompt}\n")
    click.echo(case.completion)
    while True:
        click.echo(click.style("y(es) n(o) s(kip) u(ndo) q(uit) ", dim=True), nl=False)
        key = click.getchar().lower()
        click.echo(key)
        if key in _KEYS:
            return _KEYS[key]


@contextmanager
def _counting(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar for judges that take long; on a terminal only."""
    with click.progressbar(
        length=total, label="judged", file=sys.stderr, hidden=not (shown and sys.stderr.isatty())
    ) as bar:
        yield bar.update


def _print_rates(frame: Any) -> None:
    import polars as pl

    from lda_client._cli._tables import plain_table, print_table
    from lda_client.lab.agreement import share

    table = plain_table("alpha", "rollouts", "hits", "rate", "95% interval", "undecided")
    counts = frame.group_by("alpha", maintain_order=True).agg(
        pl.len(), pl.col("hit").sum().alias("hits"), pl.col("hit").null_count().alias("undecided")
    )
    for alpha, rollouts, hits, undecided in counts.sort("alpha").iter_rows():
        rate = share(hits, rollouts - undecided)
        table.add_row(
            f"{alpha:g}", f"{rollouts:,}", f"{hits:,}", f"{rate.estimate:.3%}", _span(rate, ".3%"), f"{undecided:,}"
        )
    print_table(table)


# Agreement ----------------------------------------------------------------------------------------------------------


@click.command(
    cls=LabCommand,
    short_help="Measure how far two judges of a run agree.",
    epilog=examples(
        "lda agree runs/first ad llm",
        "lda judge runs/first --judge human --limit 200",
        "lda agree runs/first ad human --reference",
    ),
)
@click.argument("run", type=_RUN)
@click.argument("judge")
@click.argument("other")
@click.option("--reference", is_flag=True, help="OTHER is right: keep how well JUDGE judges, for estimates.")
def agree(run: Path, judge: str, other: str, reference: bool) -> None:
    """How far two judges of RUN agree, over the rollouts that both decided.

    Kappa is agreement beyond chance: 1 is perfect, 0 is what chance gives. With --reference, sensitivity (the share of
    OTHER's hits that JUDGE finds) and specificity (the share of its non-hits that JUDGE leaves alone) are kept in
    RUN/quality-JUDGE.json, and estimates from JUDGE's verdicts carry its error in their intervals.
    """
    from lda_client._cli._tables import print_values
    from lda_client.lab.agreement import agree as compare
    from lda_client.lab.agreement import keep_quality
    from lda_client.lab.runs import Run

    opened = Run.open(run)
    agreement = compare(opened, judge, other)
    print_values(
        {
            "decided by both": f"{agreement.labelled:,} (and {agreement.undecided:,} not)",
            "hits for both": f"{agreement.both:,}",
            f"only for {judge}": f"{agreement.first_only:,}",
            f"only for {other}": f"{agreement.second_only:,}",
            "hits for neither": f"{agreement.neither:,}",
            "agreement": _figure(agreement.observed),
            "kappa": _figure(agreement.kappa),
            f"sensitivity of {judge}, if {other} is right": _figure(agreement.sensitivity),
            f"specificity of {judge}, if {other} is right": _figure(agreement.specificity),
        }
    )
    if reference:
        keep_quality(opened, judge, other, agreement)
        note(f"Kept in {opened.quality_path(judge)}.")


def _figure(interval: Interval) -> str:
    if interval.estimate != interval.estimate:
        return "not defined here"
    return f"{interval.estimate:.3f} ({_span(interval, '.3f')})"


def _span(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


COMMANDS: tuple[click.Command, ...] = (survey, judge, agree)
