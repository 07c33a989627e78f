"""`lda info`: the loaded pair, limits and defaults of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lda_client._cli._common import Command, examples, print_json, with_client
from lda_client._cli._tables import plain_table, print_table, print_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from lda_client import LdaClient, pb

EXAMPLES = examples("lda info", "lda info --json | jq .pair_fingerprint", "LDA_TARGET=gpu-host:50051 lda info")


@click.command(cls=Command, epilog=EXAMPLES, short_help="Describe the loaded pair, the limits and the defaults.")
@with_client
def info(client: LdaClient, *, as_json: bool) -> None:
    """Describe the loaded pair, the limits in force and the defaults of unset options."""
    pair = client.model_pair()
    if as_json:
        print_json(pair)
        return
    _print_models(pair)
    print_values(
        {
            "device": pair.device,
            "chat template": "yes" if pair.has_chat_template else "no",
            "pair fingerprint": pair.pair_fingerprint,
            "server version": pair.server_version,
        }
        | {f"limit {name}": value for name, value in leaves(pair.limits)}
        | {f"default {name}": value for name, value in leaves(pair.defaults)}
    )


def _print_models(pair: pb.GetModelPairResponse) -> None:
    table = plain_table("", "after", "before")
    for field in pair.after.DESCRIPTOR.fields:
        values = [getattr(model, field.name) for model in (pair.after, pair.before)]
        table.add_row(field.name, *map(_text, values))
    print_table(table)


def leaves(message: Message, path: str = "") -> Iterator[tuple[str, str]]:
    """The set values of a message and of those inside it, each with its path."""
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.message_type is not None and field.message_type.full_name == "google.protobuf.Duration":
            yield name, f"{value.ToTimedelta().total_seconds():g} s"
        elif field.message_type is not None and not field.is_repeated:
            yield from leaves(value, f"{name}.")
        else:
            yield name, _text(value)


def _text(value: object) -> str:
    """Counts with separators, floats without the noise of 32 bits, the rest as it is."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
    return str(value)
