"""What completions and scored texts show in a notebook: their tokens, tinted by how far the two models are apart.

Orange tokens are likelier under the after model, blue ones under the before model. The tints are translucent, so that
the text keeps the colour of the page, light or dark. Knows messages and results; nothing of calls.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lda_client._gather import Completion, Completions, ScoredText
    from lda_client.gen.lda.v1 import lda_service_pb2 as pb

AFTER_RGB, BEFORE_RGB = "235, 110, 20", "45, 125, 245"
# Nats at which a tint is full, and how opaque it is then: text stays readable on it.
FULL_TINT_NATS = 4.0
OPACITY_MAX = 0.55
_TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; line-height: 1.6"
_FAINT = "opacity: 0.45"
_MARKS = {" ": "·", "\n": "⏎\n", "\t": "→\t"}


def completion_html(completion: Completion) -> str:
    """One completion."""
    return _page([_completion(completion)], [completion.tokens])


def completions_html(completions: Completions) -> str:
    """Every completion, and the seed that repeats them."""
    seed = _note(f"seed {completions.started.seed}")
    return _page([seed, *map(_completion, completions)], [item.tokens for item in completions])


def scored_html(scored: ScoredText) -> str:
    """A scored text with its totals."""
    totals = f"log p after {scored.after_logprob:.3f}, before {scored.before_logprob:.3f}"
    return _page([_note(totals + _scores(scored.alpha_scores)), _tokens(scored.tokens)], [scored.tokens])


def _page(parts: Sequence[str], shown: Iterable[Sequence[pb.Token]]) -> str:
    legend = [_legend()] if any(map(has_diagnostics, shown)) else []
    return f"<div>{''.join([*parts, *legend])}</div>"


def _completion(completion: Completion) -> str:
    count = len(completion.tokens)
    size = f"{count} token{'' if count == 1 else 's'}"
    head = f"{completion.role_name.lower()} {completion.sequence_index}: {size}, {completion.reason_name}"
    body = _tokens(completion.tokens) if has_diagnostics(completion.tokens) else _block(escape(completion.text))
    return _note(head + _scores(completion.alpha_scores)) + body


def _scores(scores: Mapping[float, float]) -> str:
    return "".join(f", log q({alpha:g}) {logprob:.3f}" for alpha, logprob in scores.items())


def has_diagnostics(tokens: Iterable[pb.Token]) -> bool:
    """Whether the two models were compared at any of these tokens."""
    return any(token.HasField("diagnostics") for token in tokens)


def _tokens(tokens: Iterable[pb.Token]) -> str:
    return _block("<wbr>".join(map(_token, tokens)))


def _token(token: pb.Token) -> str:
    style = f"background: {tint(difference(token.diagnostics))}; border-radius: 3px"
    return f'<span style="{style}" title="{escape(_tooltip(token))}">{_visible(token.piece)}</span>'


def difference(diagnostics: pb.TokenDiagnostics) -> float | None:
    """Log p after minus log p before, in nats; None where one of them is missing."""
    if not (diagnostics.HasField("after_logprob") and diagnostics.HasField("before_logprob")):
        return None
    return diagnostics.after_logprob - diagnostics.before_logprob


def tint(nats: float | None) -> str:
    """The background of a token: from blue, likelier before, over none to orange, likelier after."""
    if not nats or nats != nats:
        return "transparent"
    opacity = OPACITY_MAX * min(abs(nats) / FULL_TINT_NATS, 1.0)
    return f"rgba({AFTER_RGB if nats > 0 else BEFORE_RGB}, {opacity:.2f})"


def _tooltip(token: pb.Token) -> str:
    found = token.diagnostics
    lines = [f"{piece_text(token.piece)}, id {token.id}"]
    for name in ("after", "before", "amplified"):
        place = f", rank {rank}" if (rank := getattr(found, f"{name}_rank")) else ""
        lines.append(f"log p {name} {_number(found, f'{name}_logprob')}{place}")
    if (nats := difference(found)) is not None:
        lines.append(f"after - before {nats:+.3f}")
    lines.append(f"KL {found.after_before_kl:.3f}, novel mass {found.novel_mass:.3f}")
    if found.HasField("critical_alpha"):
        lines.append(f"critical alpha {found.critical_alpha:.3f}: {piece_text(found.critical_piece)}")
    return "\n".join(lines)


def _number(message: Any, field: str) -> str:
    return f"{getattr(message, field):.3f}" if message.HasField(field) else "-"


def piece_text(piece: bytes) -> str:
    """A piece of a token in quotes, so that spaces and half characters show."""
    return repr(piece.decode(errors="backslashreplace")).replace("\\\\x", "\\x")


def _visible(piece: bytes) -> str:
    """A piece with its white space marked, and half characters and control characters in hexadecimal."""
    text = piece.decode(errors="backslashreplace")
    return re.sub(r"\\x[0-9a-f]{2}|[\x00-\x20\x7f]|[^\\\x00-\x20\x7f]+|\\", _shown, text)


def _shown(found: re.Match[str]) -> str:
    part = found[0]
    if part in _MARKS:
        return _faint(_MARKS[part])
    if len(part) == 1 and not part.isprintable():
        return _faint(f"\\x{ord(part):02x}")
    return _faint(part) if re.fullmatch(r"\\x[0-9a-f]{2}", part) else escape(part)


def _faint(text: str) -> str:
    return f'<span style="{_FAINT}">{escape(text)}</span>'


def _note(text: str) -> str:
    return f'<div style="font-size: 85%; opacity: 0.7">{escape(text)}</div>'


def _block(content: str) -> str:
    return f'<div style="{_TEXT}">{content}</div>'


def _legend() -> str:
    steps = (-FULL_TINT_NATS, -FULL_TINT_NATS / 2, 0.0, FULL_TINT_NATS / 2, FULL_TINT_NATS)
    boxes = (f'<span style="background: {tint(nats)}; padding: 0 0.5em">{nats:+g}</span>' for nats in steps)
    return f'<div style="font-size: 85%">log p after - log p before, in nats: {"".join(boxes)}</div>'
