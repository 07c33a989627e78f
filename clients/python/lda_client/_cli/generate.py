"""`lda generate`: stream amplified text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import Command, ask, examples, note, print_json, with_client, with_prompt
from lda_client._cli._sampling import alpha_option, with_sampling
from lda_client._cli._tables import print_table, summary, token_table
from lda_client._gather import GenerateReader, text_piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lda_client import Completion, GenerateStream, LdaClient, pb

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
@with_client
def generate(client: LdaClient, *, as_json: bool, **arguments: Any) -> None:
    """Stream text sampled from after + alpha * (after - before).

    PROMPT is one user turn, or plain text for a pair without a chat template; - reads it from stdin, without its last
    line break. One sequence is printed as it arrives, several are printed one by one as they finish. An option that is
    not given takes the default of the server, which `lda info` shows.
    """
    with ask(client.generate, **arguments) as stream:
        if as_json:
            for event in stream:
                print_json(event)
        elif (arguments["num_sequences"] or 1) == 1:
            _print_text(stream)
        else:
            print_finished(stream)


def _print_text(stream: GenerateStream[pb.GenerateLDAResponse]) -> None:
    """The text of one sequence as it arrives; then how it ended, on stderr."""
    reader = GenerateReader(1, stream.score_alphas)
    for event in stream:
        reader.add(event)
        if piece := text_piece(event):
            click.echo(piece.text, nl=False)
        elif event.HasField("finished"):
            completion = reader.completion(event.finished)
            click.echo()
            _print_diagnostics(completion)
            note(f"{origin(stream)}, {summary(completion)}")


def print_finished(stream: GenerateStream[Any]) -> None:
    """Every sequence under a header, in the order in which they finish."""
    for completion in finished(stream):
        role = completion.role_name.lower()
        click.echo(f"=== {role} {completion.sequence_index}: {summary(completion)} ===")
        click.echo(completion.text)
        _print_diagnostics(completion)
    note(origin(stream))


def finished(stream: GenerateStream[Any]) -> Iterator[Completion]:
    """The sequences of a stream, each as soon as it has finished."""
    reader = GenerateReader(1, stream.score_alphas)
    for event in stream:
        reader.add(event)
        if event.HasField("finished"):
            yield reader.completion(event.finished)


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
