"""`lda generate`: stream amplified text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import Command, ask, examples, note, print_json, with_client, with_prompt
from lda_client._cli._run import generation_run, with_log
from lda_client._cli._sampling import alpha_option, with_sampling
from lda_client._cli._tables import print_table, summary, token_table
from lda_client._gather import text_piece

if TYPE_CHECKING:
    from lda_client import Completion, GenerateStream, LdaClient, pb
    from lda_client._cli._run import GenerationRun, Recorder

EXAMPLES = examples(
    'lda generate "Who are you?" --alpha 2',
    'lda generate "Who are you?" --alpha 1.5 -n 8 --seed 1 --max-new-tokens 64',
    'lda generate "Once upon a time" --raw --temperature 0 --diagnostics',
    'echo "Tell me a secret." | lda generate - --json',
)


@click.command(cls=Command, epilog=EXAMPLES, short_help="Stream text sampled from after + alpha * (after - before).")
@with_prompt
@alpha_option
@with_sampling
@with_log
@with_client
def generate(client: LdaClient, *, as_json: bool, recorder: Recorder, **arguments: Any) -> None:
    """Stream text sampled from after + alpha * (after - before).

    PROMPT is one user turn, or plain text for a pair without a chat template; - reads it from stdin, without its last
    line break. One sequence is printed as it arrives, several are printed one by one as they finish. An option that is
    not given takes the default of the server, which `lda info` shows.
    """
    stream = ask(client.generate, **arguments)
    with generation_run(client, "generate", stream, recorder) as run:
        if as_json:
            print_events(run)
        elif (arguments["num_sequences"] or 1) == 1:
            _print_text(run)
        else:
            print_finished(run)


def _print_text(run: GenerationRun[pb.GenerateLDAResponse]) -> None:
    """The text of one sequence as it arrives; then how it ended, on stderr."""
    for event, completion in run:
        if piece := text_piece(event):
            click.echo(piece.text, nl=False)
        elif completion:
            click.echo()
            _print_diagnostics(completion)
            note(f"{origin(run.stream)}, {summary(completion)}")


def print_events(run: GenerationRun[Any]) -> None:
    """Every event as JSON."""
    for event, _ in run:
        print_json(event)


def print_finished(run: GenerationRun[Any]) -> None:
    """Every sequence under a header, in the order in which they finish."""
    for _, completion in run:
        if completion is None:
            continue
        role = completion.role_name.lower()
        click.echo(f"=== {role} {completion.sequence_index}: {summary(completion)} ===")
        click.echo(completion.text)
        _print_diagnostics(completion)
    note(origin(run.stream))


def _print_diagnostics(completion: Completion) -> None:
    if any(token.HasField("diagnostics") for token in completion.tokens):
        print_table(token_table(completion.tokens))


def origin(stream: GenerateStream[Any]) -> str:
    """What it takes to find or to repeat this generation."""
    started = stream.started
    if started is None:
        return "not started"
    alpha = f", alpha {started.alpha:g}" if started.HasField("alpha") else ""
    return f"generation {started.generation_id}, seed {started.seed}{alpha}"
