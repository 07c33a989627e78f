"""`lda both`: the two models of the pair, each on its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live

from lda_client._cli._common import Command, ask, examples, note, print_json, with_client, with_prompt
from lda_client._cli._sampling import with_sampling
from lda_client._cli._tables import console, side_by_side
from lda_client._cli.generate import origin, print_finished
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from rich.table import Table

    from lda_client import GenerateStream, LdaClient

EXAMPLES = examples(
    'lda both "Who are you?"',
    'lda both "Who are you?" -n 4 --seed 1 --max-new-tokens 64',
    'lda both "Who are you?" --json > both.jsonl',
)


@click.command(cls=Command, epilog=EXAMPLES, short_help="Stream text from each model on its own, side by side.")
@with_prompt
@with_sampling
@with_client
def both(client: LdaClient, *, as_json: bool, **arguments: Any) -> None:
    """Stream text from each model of the pair on its own, side by side.

    PROMPT is one user turn, or plain text for a pair without a chat template; - reads it from stdin, without its last
    line break. On a terminal the texts grow in two columns; with --diagnostics, and where stdout is no terminal, they
    are printed one by one as they finish.
    """
    with ask(client.generate_both, **arguments) as stream:
        if as_json:
            for event in stream:
                print_json(event)
        elif sys.stdout.isatty() and not (arguments["diagnostics"] or arguments["top_candidates"]):
            print_columns(stream)
        else:
            print_finished(stream)


def print_columns(stream: GenerateStream[pb.GenerateBothResponse]) -> None:
    """The texts in two columns, while they grow and once more when they are whole."""
    texts: dict[tuple[int, int], str] = {}
    screen = console()
    with Live(console=screen, transient=True) as live:
        for index, role, text in stream.text():
            texts[index, role] = texts.get((index, role), "") + text
            live.update(_columns(texts))
    screen.print(_columns(texts))
    note(origin(stream))


def _columns(texts: dict[tuple[int, int], str]) -> Table:
    indices = sorted({index for index, _ in texts})
    roles = (pb.MODEL_ROLE_AFTER, pb.MODEL_ROLE_BEFORE)
    rows = [(texts.get((index, roles[0]), ""), texts.get((index, roles[1]), "")) for index in indices]
    return side_by_side(rows, "after", "before")
