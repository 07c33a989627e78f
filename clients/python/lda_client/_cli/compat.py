"""`lda compat`: whether the two tokenizers can be used as one pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lda_client._cli._common import Command, examples, print_json, with_client
from lda_client._cli._tables import MISSING, plain_table, print_table, print_values
from lda_client._html import piece_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lda_client import LdaClient, pb

EXAMPLES = examples("lda compat", "lda compat --json | jq .conflict_count", "lda compat && lda generate Hello")


@click.command(cls=Command, epilog=EXAMPLES, short_help="Report whether the two tokenizers can be used as one pair.")
@with_client
def compat(client: LdaClient, *, as_json: bool) -> None:
    """Report whether the two tokenizers can be used as one pair. Exits with 1 if they cannot."""
    report = client.tokenizer_compat()
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if not report.compatible:
        raise click.exceptions.Exit(1)


def _print_report(report: pb.TokenizerCompatResponse) -> None:
    table = plain_table("", "after", "before")
    table.add_row("vocabulary entries", str(report.after_vocab_size), str(report.before_vocab_size))
    table.add_row("ids only here", str(len(report.after_only_ids)), str(len(report.before_only_ids)))
    table.add_row("rows without entry", str(report.after_padded_row_count), str(report.before_padded_row_count))
    table.add_row("end of sequence", _ids(report.after_eos_ids), _ids(report.before_eos_ids))
    table.add_row("sha256", report.after_vocab_sha256[:16], report.before_vocab_sha256[:16])
    for item in report.special_token_differences:
        table.add_row(item.name, item.after_token or MISSING, item.before_token or MISSING)
    for conflict in report.conflicts:
        after = conflict.after_id if conflict.HasField("after_id") else MISSING
        before = conflict.before_id if conflict.HasField("before_id") else MISSING
        table.add_row(f"id of {piece_text(conflict.piece)}", str(after), str(before))
    print_table(table)
    print_values(
        {
            "compatible": _yes(report.compatible),
            "shared ids": report.shared_id_count,
            "conflicts": report.conflict_count,
            "same vocabulary": _yes(report.vocabularies_equal),
            "same chat template": _yes(report.chat_templates_equal),
            "verdict": report.verdict,
        }
    )


def _ids(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids)) or MISSING


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
