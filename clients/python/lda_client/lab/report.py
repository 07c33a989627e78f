"""A run and the verdicts of a judge as one HTML file, and its parts as objects of a notebook.

    run = Run.open("runs/first")
    write_report(run, "ad", "first.html")
    rate_chart(run, "ad")            # each of these shows itself in a notebook
    side_by_side(run)
    hit_maps(run, "ad")
    estimates_table(run, "ad")

Reads the run folder only. The file has no scripts and asks for no other file; whatever models or people wrote is
escaped.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
from dataclasses import MISSING, dataclass, fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import polars as pl

from lda_client import __version__, pb
from lda_client._html import _legend as legend_html
from lda_client._html import _tokens as tokens_html
from lda_client.lab import charts
from lda_client.lab._answers import METHOD_NAMES
from lda_client.lab._errors import LabError, RunError
from lda_client.lab._files import write_text
from lda_client.lab._pages import exhibit, page, percent, span
from lda_client.lab.agreement import LEVEL, agree
from lda_client.lab.alpha_advice import AdviceError, advise
from lda_client.lab.estimate import _by_alpha as rates_by_alpha
from lda_client.lab.estimate import estimate_run
from lda_client.lab.runs import KEY, manifest_path, prompts_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lda_client.lab._pages import Exhibit, Page
    from lda_client.lab._settings import SurveySettings
    from lda_client.lab.estimate import RunEstimates
    from lda_client.lab.estimators import Estimate
    from lda_client.lab.runs import Run

SIDES = (-1.0, 0.0, 1.0)
PROMPTS_SHOWN, ROLLOUTS_SHOWN, HITS_SHOWN, ROWS_SHOWN = 8, 2, 12, 40
CELL_LENGTH_MAX, SHORT = 400, 40
SURFACE = "surface.json"
_PACKAGES = ("numpy", "scipy", "polars", "pyarrow", "arviz-stats", "matplotlib")
_DIAGNOSTICS = (
    "after_logprob",
    "before_logprob",
    "amplified_logprob",
    "after_rank",
    "before_rank",
    "after_before_kl",
    "novel_mass",
)


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows.

    Attributes:
        headings: of the columns.
        rows: what is in them, as text.
        texts: columns that hold no numbers.
        long: columns too long for a cell; they stand below their row.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset({0})
    long: frozenset[int] = frozenset()


def write_report(run: Run, judge: str, path: Path) -> None:
    """Write the report. Raises RunError; OSError if the file cannot be written."""
    write_text(path, report(run, judge).html)


def report(run: Run, judge: str) -> Page:
    """The whole report.

    Args:
        run: with rollouts.
        judge: a name of its verdicts.

    Raises:
        RunError: no rollouts, or no such verdicts.
    """
    frame = run.judged(judge, ["output_tokens"])
    return page(
        "report.html.j2",
        title=f"{run.path.resolve().name}: {judge}",
        run=run,
        judge=judge,
        judge_description=[(name.replace("_", " "), str(value)) for name, value in run.judge_of(judge).items()],
        abstract=_abstract(run, judge, frame),
        chart=rate_chart(run, judge),
        estimates=estimates_table(run, judge),
        sides=side_by_side(run, judge),
        hits=hit_maps(run, judge),
        coherence=_coherence(run),
        tables=list(_other_tables(run, judge)),
        missing=[command for name, _, command in _others(run, judge) if not (run.path / name).exists()],
        quality=_quality(run, judge),
        agreements=_agreements(run, judge),
        commands=commands(run, judge),
        facts=_facts(run, judge),
        sessions=_sessions(run),
        manifest=run.manifest.to_text(),
    )


# Exhibits -----------------------------------------------------------------------------------------------------------


def rate_chart(run: Run, judge: str) -> Exhibit:
    """Rate against alpha: all prompts with a 95% band, each prompt as a dot, estimates beside alpha 0."""
    decided = run.judged(judge, ["output_tokens"]).drop_nulls("hit")
    if decided.is_empty():
        return exhibit("notice", text=f"The judge {judge!r} came to no verdict on any rollout.")
    shares = decided.group_by("prompt_id", "alpha").agg(pl.col("hit").mean()).sort("prompt_id", "alpha")
    dots = shares.select("alpha", "hit").rows() if shares["prompt_id"].n_unique() > 1 else []
    found, _ = _estimates(run, judge)
    answers = [
        charts.Answer(METHOD_NAMES[each.method], each.rate, each.low, each.high)
        for each in (found.estimates if found else ())
        if each.method != "naive" and each.rate is not None and each.low is not None and each.high is not None
    ]
    return charts.rates_chart(rates_by_alpha(decided, LEVEL), dots, answers)


def estimates_table(run: Run, judge: str) -> Exhibit:
    """Counts at every alpha, and the rate of the unmodified model three ways, with diagnostics and refusals."""
    decided = run.judged(judge, ["output_tokens"]).drop_nulls("hit")
    found, refusal = _estimates(run, judge)
    counts = [
        (
            f"{each.alpha:g}",
            f"{each.rollouts:,}",
            f"{each.hits:,}",
            percent(each.hits / each.rollouts),
            span(each.low, each.high),
        )
        for each in rates_by_alpha(decided, LEVEL)
    ]
    answers = [_answer(each) for each in found.estimates] if found else []
    return exhibit(
        "estimates",
        counts=Table(("alpha", "rollouts", "hits", "rate", "95% interval"), counts),
        answers=answers,
        undecided=run.verdicts(judge)["hit"].null_count(),
        refusal=refusal,
    )


def side_by_side(
    run: Run,
    judge: str | None = None,
    alphas: Sequence[float] = SIDES,
    prompts: int = PROMPTS_SHOWN,
    rollouts: int = ROLLOUTS_SHOWN,
) -> Exhibit:
    """The same prompts at several alphas: the first rollouts of each, not picked.

    Args:
        run: with rollouts.
        judge: whose hits are marked; none if None.
        alphas: the run's nearest to each is shown.
        prompts: at most so many, the first.
        rollouts: of each prompt at each alpha.
    """
    if judge is None:
        frame = run.rollouts([*KEY, "text", "finish_reason"]).with_columns(hit=pl.lit(None))
    else:
        frame = run.judged(judge, ["text", "finish_reason"])
    drawn = frame["alpha"].unique().to_list()
    shown = sorted({_nearest(drawn, alpha) for alpha in alphas})
    listed = run.prompts()
    cells = {
        (prompt_id, alpha): part.to_dicts()
        for (prompt_id, alpha), part in frame.filter(
            pl.col("alpha").is_in(shown)
            & (pl.col("sequence") < rollouts)
            & pl.col("prompt_id").is_in([prompt.id for prompt in listed[:prompts]])
        ).group_by("prompt_id", "alpha")
    }
    return exhibit(
        "side_by_side", prompts=listed[:prompts], alphas=shown, cells=cells, rollouts=rollouts, total=len(listed)
    )


def _nearest(drawn: Sequence[float], alpha: float) -> float:
    return min(drawn, key=lambda each: (abs(each - alpha), each))


def hit_maps(run: Run, judge: str, limit: int = HITS_SHOWN) -> Exhibit:
    """Hits with their tokens tinted by log p after - log p before; without stored diagnostics, as plain text.

    The alphas nearest to 0 come first, and of each alpha the most probable hits under the unmodified model; a text
    comes once.
    """
    columns = ["text", "seed", "finish_reason"] + (["score_logprobs"] if run.manifest.score_alphas else [])
    hits = run.judged(judge, columns).filter(pl.col("hit"))
    scored = hits.with_columns(
        pl.Series("log_p", run.log_q(hits, [0.0])[:, 0] if run.manifest.score_alphas else [math.nan] * len(hits))
    )
    order = [pl.col("alpha").abs(), pl.col("alpha"), -pl.col("log_p").fill_nan(0), pl.col("prompt_id"), "sequence"]
    ranked = scored.sort(order).unique("text", keep="first", maintain_order=True)
    chosen = _with_tokens(run, _spread(ranked, limit))
    return exhibit(
        "hits",
        hits=[{**row, "tokens": _tinted(row) if run.settings.diagnostics else None} for row in chosen.to_dicts()],
        total=len(hits),
        legend=legend_html() if run.settings.diagnostics else None,
        remedy=None if run.settings.diagnostics else _diagnostics_command(run),
        prompts={prompt.id: prompt.shown() for prompt in run.prompts()},
        chunk_size=run.settings.chunk_size,
    )


def _spread(ranked: pl.DataFrame, limit: int) -> pl.DataFrame:
    """Some of each alpha: the first of each in turn."""
    turns = ranked.with_columns(pl.int_range(pl.len()).over("alpha").alias("turn"))
    first = turns.sort("turn", pl.col("alpha").abs(), maintain_order=True).head(limit)
    return first.sort(pl.col("alpha").abs(), "alpha", "turn")


def _with_tokens(run: Run, chosen: pl.DataFrame) -> pl.DataFrame:
    """What a survey with diagnostics has kept of the tokens of these rollouts, and of no others: it is much."""
    if not run.settings.diagnostics:
        return chosen
    kept = pl.scan_parquet(run.rollouts_path).select(
        *KEY, "token_ids", "token_piece", *(f"token_{name}" for name in _DIAGNOSTICS)
    )
    return chosen.lazy().join(kept, on=list(KEY), how="left", maintain_order="left").collect()


def _tinted(row: Mapping[str, Any]) -> str:
    """The tokens of a row as HTML, with what is known of each in its tooltip."""
    tokens = []
    for place, (number, piece) in enumerate(zip(row["token_ids"], row["token_piece"], strict=True)):
        values = {name: row[f"token_{name}"][place] for name in _DIAGNOSTICS}
        tokens.append(pb.Token(id=number, piece=piece, diagnostics=pb.TokenDiagnostics(**values)))
    return tokens_html(tokens)


# Parts of the report ------------------------------------------------------------------------------------------------


def _estimates(run: Run, judge: str) -> tuple[RunEstimates | None, str | None]:
    """The estimates, or why there are none."""
    try:
        return estimate_run(run, judge), None
    except RunError as error:
        return None, str(error)


def _answer(estimate: Estimate) -> dict[str, Any]:
    answered = estimate.rate is not None and estimate.low is not None and estimate.high is not None
    return {
        "name": METHOD_NAMES[estimate.method],
        "rate": percent(estimate.rate) if answered and estimate.rate is not None else None,
        "span": span(estimate.low, estimate.high) if estimate.low is not None and estimate.high is not None else "",
        "hits": estimate.hits,
        "rollouts": estimate.rollouts,
        "diagnostics": [
            (name.replace("_", " "), f"{value:.4g}") for name, value in estimate.diagnostics.items() if value == value
        ],
        "refusals": estimate.refusals,
    }


def _abstract(run: Run, judge: str, frame: pl.DataFrame) -> list[str]:
    """The report in a few sentences."""
    prompts, hits = frame["prompt_id"].n_unique(), int(frame["hit"].sum() or 0)
    sentences = [
        f"{len(frame):,} rollouts of {prompts:,} prompt{'s' if prompts != 1 else ''} at "
        f"{frame['alpha'].n_unique()} alphas; the judge “{judge}” calls {hits:,} of them hits."
    ]
    found, _ = _estimates(run, judge)
    if found:
        told = "; ".join(f"{METHOD_NAMES[each.method]}, {_in_words(each)}" for each in found.estimates)
        sentences.append(f"How often the unmodified model shows the behaviour (95% intervals): {told}.")
    if not run.is_complete:
        sentences.append("The survey is not complete.")
    return sentences


def _in_words(estimate: Estimate) -> str:
    if estimate.rate is None or estimate.low is None or estimate.high is None:
        return "no answer"
    return f"{percent(estimate.rate)} ({span(estimate.low, estimate.high)})"


def _coherence(run: Run) -> Table | None:
    """What `lda alpha` says of the run; None where it has nothing to say."""
    try:
        advice = advise(run)
    except AdviceError:
        return None
    rows = [
        (
            f"{point.alpha:g}",
            f"{point.extra_surprise.estimate:+.2f}",
            f"{point.divergence:.2f}",
            f"{point.distinct:.3f}",
            percent(point.ended),
            "; ".join(point.reasons),
        )
        for point in advice.curve
    ]
    headings = ("alpha", "extra surprise", "divergence", "distinct pairs", "ended by itself", "too much, since")
    return Table(headings, rows, frozenset({0, 5}))


def _other_tables(run: Run, judge: str) -> Iterator[tuple[str, Table, int]]:
    """What other commands have left in the folder: title, table, rows in all. Raises RunError."""
    for name, title, command in _others(run, judge):
        if not (path := run.path / name).exists():
            continue
        try:
            yield (f"{title} ({name})", *_read_table(path))
        except (ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
            raise RunError(
                f"{path}: cannot be read ({error}); make it again with `{command}`, or remove it."
            ) from error


def _read_table(path: Path) -> tuple[Table, int]:
    """A table and its rows in all."""
    if path.suffix == ".parquet":
        frame = pl.read_parquet(path)
        return _plain_table(frame), len(frame)
    records = json.loads(path.read_text("utf-8"))["findings"]
    return _table_of_records(records), len(records)


def _others(run: Run, judge: str) -> list[tuple[str, str, str]]:
    """Files of other commands: name, title, and the command that makes it."""
    folder, name = shlex.quote(str(run.path)), shlex.quote(judge)
    return [
        (f"checks-{judge}.parquet", "Checks: would the unmodified model say it?", f"lda check {folder} --judge {name}"),
        (f"triggers-{judge}.parquet", "Triggers: what brings it about", f"lda triggers {folder} --judge {name}"),
        (SURFACE, "Surface: what else changed", f"lda surface {folder} --json > {folder}/{SURFACE}"),
    ]


def _table_of_records(records: Sequence[Mapping[str, Any]]) -> Table:
    """What of JSON objects is a text, a number, or a list of these."""
    plain = [{name: value for name, value in record.items() if _is_plain(value)} for record in records[:ROWS_SHOWN]]
    names = list(dict.fromkeys(name for record in plain for name in record))
    numbers = {name for name in names if all(isinstance(record.get(name), int | float) for record in plain)}
    texts = frozenset(place for place, name in enumerate(names) if name not in numbers)
    rows = [[_cell(record.get(name)) for name in names] for record in plain]
    return _table(names, rows, texts)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict) and not (isinstance(value, list) and any(isinstance(x, dict) for x in value))


def _plain_table(frame: pl.DataFrame) -> Table:
    """Any table, without columns of bytes and of records."""
    shown = frame.select([name for name, kind in frame.schema.items() if _is_shown(kind)]).head(ROWS_SHOWN)
    texts = frozenset(place for place, kind in enumerate(shown.dtypes) if not kind.is_numeric())
    return _table(shown.columns, [list(map(_cell, row)) for row in shown.rows()], texts)


def _is_shown(kind: pl.DataType) -> bool:
    inner = kind.inner if isinstance(kind, pl.List) else kind
    return not isinstance(inner, pl.Struct | pl.Binary | pl.List)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], texts: frozenset[int]) -> Table:
    long = frozenset(place for place in range(len(names)) if any(len(row[place]) > SHORT for row in rows))
    return Table([name.replace("_", " ") for name in names], rows, texts, long)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            text = ", ".join(map(_cell, value))
        case _:
            text = str(value)
    return text if len(text) <= CELL_LENGTH_MAX else text[:CELL_LENGTH_MAX] + " …"


def _quality(run: Run, judge: str) -> dict[str, Any] | None:
    """What `lda agree --reference` has measured."""
    path = run.quality_path(judge)
    if not path.exists():
        return None
    values = json.loads(path.read_text("utf-8"))
    return {name: values.get(name) for name in ("reference", "labelled", "sensitivity", "specificity")}


def _agreements(run: Run, judge: str) -> Table | None:
    """The judge beside each other judge of the run."""
    rows = []
    for other in run.judges():
        if other == judge:
            continue
        try:
            found = agree(run, judge, other)
        except LabError:
            continue
        figures = [f"{each.estimate:.3f} ({each.low:.3f} to {each.high:.3f})" for each in (found.observed, found.kappa)]
        counts = (found.labelled, found.both, found.first_only, found.second_only, found.neither)
        rows.append([other, *(f"{count:,}" for count in counts), *figures])
    headings = (
        "other judge",
        "decided by both",
        "both",
        f"only {judge}",
        "only the other",
        "neither",
        "agreement",
        "kappa",
    )
    return Table(headings, rows) if rows else None


# To run it again ----------------------------------------------------------------------------------------------------


def commands(run: Run, judge: str) -> list[str]:
    """The commands that draw and judge this run again, and make this report."""
    pair, folder = run.manifest.pair, shlex.quote(str(run.path))
    known = all(isinstance(pair.get(role), dict) for role in ("after", "before"))
    ids = [str(pair[role]["model_id"]) for role in ("after", "before")] if known else []
    serve = "lda-service serve --deterministic"
    if known and not all(name.startswith("bundled/") for name in ids):
        serve += f" --model-after-id {shlex.quote(ids[0])} --model-before-id {shlex.quote(ids[1])}"
    name = shlex.quote(judge)
    return [
        serve,
        survey_command(run.settings, str(prompts_path(run.path)), f"{run.path}-again"),
        f"lda judge {folder}-again {judge_arguments(run.judge_of(judge))} --name {name}",
        f"lda estimate {folder}-again --judge {name}",
        f"lda report {folder}-again --judge {name}",
    ]


def survey_command(settings: SurveySettings, prompts: str, out: str) -> str:
    """The command line that draws a survey with these settings."""
    words = ["lda", "survey", prompts]
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.default is not MISSING and value == each.default:
            continue
        words += _option(each.name, value)
    return shlex.join([*words, "--out", out])


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if name == "alphas":
        return [f"--alphas={','.join(f'{alpha!r}'.removesuffix('.0') for alpha in value)}"]
    if name == "rollouts":
        return ["-n", str(value)]
    if name == "stop_token_ids":
        return [word for each in value for word in ("--stop-token-id", str(each))]
    if isinstance(value, tuple):
        return [word for each in value for word in (option, str(each))]
    if isinstance(value, bool):
        return [option if value else f"--no-{name.replace('_', '-')}"]
    return [option, str(value)]


def judge_arguments(description: Mapping[str, Any]) -> str:
    """The options of `lda judge` for a judge as it described itself."""
    kind = str(description.get("kind"))
    what = {
        "substring": "pattern",
        "regex": "pattern",
        "python": "function",
        "classifier": "model",
    }.get(kind)
    words = ["--judge", kind if what is None else f"{kind}:{description.get(what)}"]
    if kind == "llm":
        words = ["--judge", "llm:rubric.txt", "--model", str(description.get("model"))]
    if kind == "classifier":
        words += ["--label", str(description.get("label"))]
    if kind in ("python", "classifier"):
        words += ["--threshold", str(description.get("threshold"))]
    if description.get("shows_prompt"):
        words.append("--show-prompt")
    return shlex.join(words)


def _diagnostics_command(run: Run) -> str:
    """A small survey like this one, with diagnostics."""
    settings = replace(run.settings, diagnostics=True, rollouts=min(run.settings.rollouts, 32))
    return survey_command(settings, str(prompts_path(run.path)), f"{run.path}-diagnostics")


def _facts(run: Run, judge: str) -> list[tuple[str, str]]:
    """Everything that identifies what was run."""
    manifest, pair = run.manifest, run.manifest.pair
    facts = [("run begun", manifest.created), ("seed of the survey", str(run.settings.seed))]
    facts.append(("pair fingerprint", str(pair.get("fingerprint", ""))))
    facts += [
        (f"{role} model", f"{model['model_id']}, revision {model['revision']}, {model['dtype']}")
        for role in ("after", "before")
        if isinstance(model := pair.get(role), dict)
    ]
    facts.append(("chat template", "the pair's" if manifest.chat_template else "none"))
    files = (prompts_path(run.path), run.rollouts_path, run.verdicts_path(judge), manifest_path(run.path))
    facts += [(f"sha256 of {path.name}", sha256(path.read_bytes()).hexdigest()) for path in files if path.exists()]
    facts.append(("this report", f"lda-client {__version__}, Python {platform.python_version()}"))
    facts.append(("with", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)))
    return facts


def _sessions(run: Run) -> Table:
    rows = [
        (
            str(session.get("started")),
            str(endpoint.get("target")),
            str(session.get("client_version")),
            str(endpoint.get("server_version")),
            str(endpoint.get("device")),
        )
        for session in run.manifest.sessions
        for endpoint in session.get("endpoints", ())
    ]
    return Table(("started", "server", "client version", "server version", "device"), rows, frozenset(range(5)))
