"""`lda score`: how likely a given text is under both models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lda_client._cli._common import Command, ask, examples, print_json, read_text, with_client, with_prompt
from lda_client._cli._run import score_run, with_log
from lda_client._cli._sampling import alpha_option, score_alphas_option
from lda_client._cli._tables import print_table, print_values, token_table

if TYPE_CHECKING:
    from lda_client import LdaClient, ScoredText
    from lda_client._cli._run import Recorder

EXAMPLES = examples(
    'lda score "The capital of France is" " Paris" --raw',
    'lda score "Who are you?" "I am an assistant." --alpha 2 --score-alphas=-1,0,1,2',
    'lda score "Who are you?" - --json < answer.txt',
)


@click.command(cls=Command, epilog=EXAMPLES, short_help="Score a given text under both models, token by token.")
@with_prompt
@click.argument("continuation")
@alpha_option
@click.option("--top-candidates", type=click.IntRange(min=0), help="Alternatives per token, at most 50.")
@score_alphas_option
@with_log
@with_client
def score(client: LdaClient, *, as_json: bool, recorder: Recorder, continuation: str, **arguments: Any) -> None:
    """Score CONTINUATION after PROMPT under both models, token by token.

    PROMPT is as in `lda generate`; CONTINUATION is plain text. One of the two may be -, to be read from stdin. Values
    are natural logarithms; the amplified ones are at --alpha.
    """
    stream = ask(client.score, continuation=read_text(continuation), **arguments)
    with score_run(client, stream, recorder) as run:
        for block in run:
            if as_json:
                print_json(block)
        if not as_json:
            _print_scores(run.result())


def _print_scores(scored: ScoredText) -> None:
    print_table(token_table(scored.tokens))
    totals = {
        "tokens": len(scored.tokens),
        "log p after": f"{scored.after_logprob:.3f}",
        "log p before": f"{scored.before_logprob:.3f}",
        "log p amplified": f"{scored.amplified_logprob:.3f}",
        "difference": f"{scored.after_logprob - scored.before_logprob:+.3f}",
    }
    print_values(totals | {f"log q({alpha:g})": f"{value:.3f}" for alpha, value in scored.alpha_scores.items()})
