"""Tables for people: tokens, completions side by side, names and values. Knows rich; nothing of calls."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lda_client._html import difference, piece_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lda_client import Completion, pb

# Tables take the width they need, in a pipe and on a terminal: a line that wraps is better than a number cut short.
TABLE_WIDTH = 400
MISSING = "-"


def console(width: int | None = None) -> Console:
    """The console on stdout: plain text, no markup in what models wrote. None takes the width of the terminal."""
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    console(TABLE_WIDTH).print(table)


def plain_table(*headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold" if not index else "ellipsis")
    return table


def print_values(values: Mapping[str, object]) -> None:
    """Names and values, one pair per line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(Text(name), Text(str(value)))
    print_table(grid)


_COLUMNS: Mapping[str, Callable[[pb.TokenDiagnostics], str]] = {
    "log p\nafter": lambda d: number(d, "after_logprob"),
    "log p\nbefore": lambda d: number(d, "before_logprob"),
    "log p\namplified": lambda d: number(d, "amplified_logprob"),
    "after -\nbefore": lambda d: gap(d),
    "ranks\nin order": lambda d: "/".join(map(rank, (d.after_rank, d.before_rank, d.amplified_rank))),
    "\nKL": lambda d: f"{d.after_before_kl:.3f}",
    "novel\nmass": lambda d: f"{d.novel_mass:.3f}",
    "critical\nalpha": lambda d: number(d, "critical_alpha"),
    "critical\ntoken": lambda d: piece_text(d.critical_piece) if d.HasField("critical_token_id") else MISSING,
}


def token_table(tokens: Iterable[pb.Token]) -> Table:
    """One row per token: how likely it is under each model, and how far the models are apart there."""
    tokens = list(tokens)
    candidates = any(token.diagnostics.candidates for token in tokens)
    table = plain_table("\ntoken", *_COLUMNS, *(["\ncandidates"] if candidates else []))
    for token in tokens:
        cells = [show(token.diagnostics) for show in _COLUMNS.values()]
        extra = [_candidates(token.diagnostics)] if candidates else []
        table.add_row(Text(piece_text(token.piece)), *cells, *extra)
    return table


def _candidates(diagnostics: pb.TokenDiagnostics) -> Text:
    shown = (f"{piece_text(item.piece)} {number(item, 'amplified_logprob')}" for item in diagnostics.candidates)
    return Text("  ".join(shown))


def number(message: Any, field: str) -> str:
    """An optional number of a message, or a dash."""
    return f"{getattr(message, field):.3f}" if message.HasField(field) else MISSING


def gap(diagnostics: pb.TokenDiagnostics) -> str:
    """Log p after minus log p before, in nats; a dash where one of them is missing."""
    nats = difference(diagnostics)
    return MISSING if nats is None else f"{nats:+.3f}"


def rank(value: int) -> str:
    """A rank, which counts from one; a dash where there is none."""
    return str(value) if value else MISSING


def scores_text(scores: Mapping[float, float]) -> str:
    """Log-probabilities of a whole sequence by alpha."""
    return ", ".join(f"log q({alpha:g}) = {logprob:.3f}" for alpha, logprob in scores.items())


def summary(completion: Completion) -> str:
    """How a sequence ended, in one line."""
    ended = completion.reason_name
    if completion.matched_stop is not None:
        ended += f" {completion.matched_stop!r}"
    count = len(completion.tokens)
    parts = [f"{count} token{'' if count == 1 else 's'}", ended, scores_text(completion.alpha_scores)]
    return ", ".join(part for part in parts if part)


def side_by_side(rows: Sequence[tuple[str, str]], left: str, right: str) -> Table:
    """Texts in two columns of equal width."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, show_lines=len(rows) > 1)
    for heading in (left, right):
        table.add_column(heading, ratio=1, overflow="fold")
    for one, other in rows:
        table.add_row(Text(one), Text(other))
    return table
