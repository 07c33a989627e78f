"""`lda both`: the two models of the pair, each on its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.live import Live

from lda_client._cli._common import Command, ask, examples, note, with_client, with_prompt
from lda_client._cli._run import generation_run, with_log
from lda_client._cli._sampling import with_sampling
from lda_client._cli._tables import console, side_by_side
from lda_client._cli.generate import origin, print_events, print_finished
from lda_client._gather import text_piece
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from rich.table import Table

    from lda_client import LdaClient
    from lda_client._cli._run import GenerationRun, Recorder

EXAMPLES = examples(
    'lda both "Who are you?"',
    'lda both "Who are you?" -n 4 --seed 1 --max-new-tokens 64',
    'lda both "Who are you?" --json > both.jsonl',
)


@click.command(cls=Command, epilog=EXAMPLES, short_help="Stream text from each model on its own, side by side.")
@with_prompt
@with_sampling
@with_log
@with_client
def both(client: LdaClient, *, as_json: bool, recorder: Recorder, **arguments: Any) -> None:
    """Stream text from each model of the pair on its own, side by side.

    PROMPT is one user turn, or plain text for a pair without a chat template; - reads it from stdin, without its last
    line break. On a terminal the texts grow in two columns; with --diagnostics, and where stdout is no terminal, they
    are printed one by one as they finish.
    """
    stream = ask(client.generate_both, **arguments)
    with generation_run(client, "both", stream, recorder) as run:
        if as_json:
            print_events(run)
        elif _on_terminal() and not (arguments["diagnostics"] or arguments["top_candidates"]):
            print_columns(run)
        else:
            print_finished(run)


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def print_columns(run: GenerationRun[pb.GenerateBothResponse]) -> None:
    """The texts in two columns, while they grow and once more when they are whole."""
    texts: dict[tuple[int, int], str] = {}
    screen = console()
    with Live(console=screen, transient=True) as live:
        for event, _ in run:
            if piece := text_piece(event):
                key = piece.sequence_index, piece.role
                texts[key] = texts.get(key, "") + piece.text
                live.update(_columns(texts))
    screen.print(_columns(texts))
    note(origin(run.stream))


def _columns(texts: dict[tuple[int, int], str]) -> Table:
    indices = sorted({index for index, _ in texts})
    roles = (pb.MODEL_ROLE_AFTER, pb.MODEL_ROLE_BEFORE)
    rows = [(texts.get((index, roles[0]), ""), texts.get((index, roles[1]), "")) for index in indices]
    return side_by_side(rows, "after", "before")
