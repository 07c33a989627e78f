"""The options of `lda generate` and `lda both`: each is the keyword argument of the same name.

Knows click only; unset options arrive as None and stay unset on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lda_client._cli._common import with_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from lda_client._cli._common import Decorator

_COUNT = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0, min_open=True)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter("give numbers with commas between them, such as 0,0.5,2.") from None


alpha_option = click.option("--alpha", type=float, help="Amplification: 0 is the after model, -1 the before model.")
score_alphas_option = click.option(
    "--score-alphas", callback=_numbers, metavar="A,B,...", help="Alphas at which the whole sequence is scored."
)

_OPTIONS: tuple[Decorator, ...] = (
    click.option("-n", "--num-sequences", type=click.IntRange(min=1), help="Sequences to draw (from each model)."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-p", type=float, help="Nucleus mass."),
    click.option("--top-k", type=_COUNT, help="Most likely tokens kept; 0 keeps all."),
    click.option("--min-p", type=float, help="Drop tokens less likely than this share of the most likely one."),
    click.option("--plausibility", type=float, help="Keep tokens with p_after >= this share of the largest p_after."),
    click.option("--seed", type=_COUNT, help="Base seed; the server draws one unless given."),
    click.option("--max-new-tokens", type=_COUNT, help="Cap on new tokens of a sequence."),
    click.option("--min-new-tokens", type=_COUNT, help="No end of sequence before this many new tokens."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after end-of-sequence tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="A string that ends a sequence; may be repeated."),
    click.option("--stop-token-id", "stop_token_ids", multiple=True, type=_COUNT, help="The same for a token id."),
    click.option("--time-budget", "time_budget_s", type=_SECONDS, metavar="SECONDS", help="Decode this long at most."),
    click.option("--diagnostics", is_flag=True, default=None, help="Compare the two models at every token."),
    click.option("--top-candidates", type=_COUNT, help="Alternatives per token, at most 50."),
    click.option("--max-tokens-per-event", type=_COUNT, help="Tokens put in one event."),
    click.option(
        "--max-event-delay", "max_event_delay_s", type=_SECONDS, metavar="SECONDS", help="Longest a token waits."
    ),
    score_alphas_option,
)


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how to draw, when to stop and what to send."""
    return with_options(command, _OPTIONS)
