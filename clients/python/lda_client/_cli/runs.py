"""`lda runs`: what was asked and answered before, from the log on this machine."""

from __future__ import annotations

import json
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from lda_client import DEFAULT_TARGET
from lda_client._cli._common import Command, examples, json_option, note, print_object
from lda_client._cli._log import LogUnusable, RunLog, default_path
from lda_client._cli._tables import MISSING, plain_table, print_table, print_values, scores_text
from lda_client._cli.both import both
from lda_client._cli.generate import generate
from lda_client._cli.score import score

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COMMANDS: Mapping[str, click.Command] = {"generate": generate, "both": both, "score": score}
PROMPT_SHOWN_CHARS = 40
EXAMPLES = examples("lda runs list", "lda runs show 12", "lda runs export > runs.jsonl", 'rm "$(lda runs path)"*')


@click.group(epilog=EXAMPLES, short_help="List, show and export the runs remembered on this machine.")
def runs() -> None:
    """List, show and export the runs remembered on this machine.

    Every `lda generate`, `lda both` and `lda score` is kept with its prompt and its texts in a file that only you can
    read; --no-log or LDA_NO_LOG=1 leaves a run out, LDA_RUNS_DB names another file.
    """


@runs.command("list", cls=Command, epilog=examples("lda runs list", "lda runs list --limit 100 --json"))
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@json_option
def list_runs(limit: int, as_json: bool) -> None:
    """List the latest runs, the newest first."""
    table = plain_table("id", "began (UTC)", "verb", "alpha", "seed", "ended", "prompt")
    with _log() as log:
        for run in log.runs(limit, newest_first=True) if log else ():
            if as_json:
                print_object(run)
            else:
                table.add_row(*_row(run))
    if not as_json:
        print_table(table)


def _row(run: Mapping[str, Any]) -> list[str | Text]:
    began = run["began_at"][:19].replace("T", " ")
    alpha = MISSING if run["alpha"] is None else f"{run['alpha']:g}"
    prompt = _prompt_text(run["request"]["prompt"])
    shown = prompt if len(prompt) <= PROMPT_SHOWN_CHARS else prompt[: PROMPT_SHOWN_CHARS - 3] + "..."
    return [str(run["id"]), began, run["verb"], alpha, run["seed"] or MISSING, run["ended"] or MISSING, Text(shown)]


def _prompt_text(prompt: Mapping[str, Any]) -> str:
    """A prompt on one line, of a conversation its last turn."""
    if "tokens" in prompt:
        return f"{len(prompt['tokens']['ids'])} token ids"
    text = prompt["text"] if "text" in prompt else prompt["chat"]["messages"][-1].get("content", "")
    return " ".join(text.split())


@runs.command(cls=Command, epilog=examples("lda runs show 12", "lda runs show 12 --json"))
@click.argument("run_id", metavar="ID", type=int)
@json_option
def show(run_id: int, as_json: bool) -> None:
    """Print the texts of a run, and the command that repeats it with its seed."""
    with _log() as log:
        run = log.run(run_id) if log else None
    if run is None:
        raise click.ClickException(f"No run has the id {run_id}: `lda runs list` shows those there are.")
    if as_json:
        print_object(run)
    else:
        _print_run(run)


def _print_run(run: Mapping[str, Any]) -> None:
    shown = ("target", "generation_id", "pair_fingerprint", "seed", "alpha", "began_at", "ended_at", "ended", "error")
    print_values({name: run[name] for name in shown if run[name] is not None})
    for sequence in run["sequences"]:
        scores = scores_text({float(alpha): logprob for alpha, logprob in (sequence["alpha_scores"] or {}).items()})
        ended = ", ".join(filter(None, (sequence["reason"], scores)))
        click.echo(f"\n=== {sequence['role'].lower()} {sequence['sequence_index']}: {ended or 'not finished'} ===")
        click.echo(sequence["text"])
    click.echo(f"\nTo repeat it:\n{repeat_command(run)}")


@runs.command(cls=Command, epilog=examples("lda runs export > runs.jsonl", "lda runs export | jq .sequences[].text"))
@click.option("--format", "form", type=click.Choice(["jsonl"]), default="jsonl", help="One JSON object per line.")
def export(form: str) -> None:
    """Print every run with its texts and tokens, the oldest first."""
    with _log() as log:
        for run in log.runs() if log else ():
            print_object(log.with_sequences(run) if log else run)


@runs.command(cls=Command, epilog=examples("lda runs path", 'sqlite3 "$(lda runs path)" .schema'))
def path() -> None:
    """Print where the runs are kept, prompts and texts included."""
    click.echo(default_path())


@contextmanager
def _log() -> Iterator[RunLog | None]:
    """The log; None if nothing was ever remembered."""
    if not default_path().exists():
        note(f"No runs are remembered at {default_path()} yet.")
        yield None
        return
    try:
        log = RunLog(default_path())
        try:
            yield log
        finally:
            log.close()
    except LogUnusable as reason:
        raise click.ClickException(str(reason)) from reason


def repeat_command(run: Mapping[str, Any]) -> str:
    """The command that sends the same request again, with the seed and the alpha that were in force."""
    request = run["request"]
    values = _option_values(request) | {name: run[name] for name in ("seed", "alpha") if run[name] is not None}
    prompt, prompt_options = _prompt_arguments(request["prompt"])
    arguments = [prompt, request["continuation"]["text"]] if run["verb"] == "score" else [prompt]
    options = [*prompt_options, *_options(COMMANDS[run["verb"]], values)]
    if run["target"] != DEFAULT_TARGET:
        options.append(f"--target={run['target']}")
    if any(argument.startswith("-") for argument in arguments):
        arguments = ["--", *arguments]
    command = shlex.join(["lda", run["verb"], *options, *arguments])
    return f"printf %s - | {command}" if "-" in arguments else command


def _option_values(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request by the names of the options."""
    fields = {name: value for name, value in request.items() if name not in ("prompt", "continuation")}
    for group in ("sampling", "stopping", "output"):
        fields |= fields.pop(group, {})
    others = {"stop_strings": "stop", "time_budget": "time_budget_s", "max_event_delay": "max_event_delay_s"}
    return {others.get(name, name): value for name, value in fields.items()}


def _prompt_arguments(prompt: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The argument PROMPT, and the options that say how to read it."""
    if "text" in prompt:
        return prompt["text"], ["--raw"]
    if "tokens" in prompt:
        return json.dumps(prompt["tokens"]["ids"]), ["--prompt-json"]
    turns, continued = prompt["chat"]["messages"], prompt["chat"].get("continue_final_message", False)
    if [turn["role"] for turn in turns] == ["user"] and not continued:
        return turns[0].get("content", ""), []
    turns = [{"role": turn["role"], "content": turn.get("content", "")} for turn in turns]
    return json.dumps(turns, ensure_ascii=False), [
        "--prompt-json",
        *(["--continue-final-message"] if continued else []),
    ]


def _options(command: click.Command, values: Mapping[str, Any]) -> Iterator[str]:
    """The options of a command that have one of these values."""
    for option in command.params:
        value = values.get(option.name or "")
        if value is None or not isinstance(option, click.Option):
            continue
        name = max(option.opts, key=len)
        if option.is_flag:
            yield from [name] if value else []
        elif option.multiple:
            yield from (f"{name}={each}" for each in value)
        elif isinstance(value, list):
            yield f"{name}={','.join(map(str, value))}"
        elif option.name in ("time_budget_s", "max_event_delay_s"):
            yield f"{name}={value.removesuffix('s')}"
        else:
            yield f"{name}={value}"
