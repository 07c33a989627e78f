"""What every command shares: options for the connection, prompts, errors in one sentence, JSON lines.

Knows click and the client's public side; nothing of tables.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from google.protobuf.json_format import MessageToDict

import lda_client
from lda_client import DEFAULT_TARGET, LdaClient, LdaClientError, Timeout, Tls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.message import Message

    Decorator = Callable[[Callable[..., None]], Callable[..., None]]

ValueT = TypeVar("ValueT")

INTERRUPTED_EXIT_CODE = 130
LOOKUP_S = 30.0
_STDIN_READ = "lda_client.stdin_read"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object per line, in the contract's names."
)

_CONNECTION_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--target",
        envvar="LDA_TARGET",
        default=DEFAULT_TARGET,
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT",
        help="Address of the server.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Give up after this long. Without it, streams may take as long as they need.",
    ),
    json_option,
    click.option("--token", envvar="LDA_TOKEN", show_envvar=True, help="Bearer token; better set in the environment."),
    click.option("--tls", is_flag=True, help="Speak TLS, trusting the authorities of this machine."),
    click.option(
        "--tls-ca", envvar="LDA_TLS_CA", type=_FILE, help="Speak TLS, trusting the authorities in this PEM file."
    ),
    click.option(
        "--tls-cert",
        envvar="LDA_TLS_CERT",
        type=_FILE,
        help="Client certificate (PEM), for a server that asks for one.",
    ),
    click.option("--tls-key", envvar="LDA_TLS_KEY", type=_FILE, help="Private key (PEM) of the client certificate."),
)

_PROMPT_OPTIONS: tuple[Decorator, ...] = (
    click.option("--raw", is_flag=True, help="Send the prompt as it is, without the chat template."),
    click.option("--system", metavar="TEXT", help="A system turn to put before the prompt."),
    click.option("--prompt-json", is_flag=True, help="PROMPT is JSON: a list of {role, content}, or of token ids."),
    click.option(
        "--continue-final-message", is_flag=True, help="Continue the last turn of a --prompt-json conversation."
    ),
)


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the connection options, and a client as its first argument."""

    @functools.wraps(command)
    def run(
        *,
        target: str,
        timeout_s: float | None,
        token: str | None,
        tls: bool,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        **arguments: Any,
    ) -> None:
        timeout = ask(Timeout, total_s=timeout_s, lookup_s=timeout_s or LOOKUP_S)
        credentials = _credentials(tls, tls_ca, tls_cert, tls_key)
        with LdaClient(target, credentials=credentials, token=token, timeout=timeout) as client:
            command(client, **arguments)

    return with_options(run, _CONNECTION_OPTIONS)


def with_prompt(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument PROMPT and its options; they arrive as arguments of the client's verbs."""

    @functools.wraps(command)
    def run(*, prompt: str, prompt_json: bool, **arguments: Any) -> None:
        text = read_text(prompt)
        command(prompt=_parse(text) if prompt_json else text, **arguments)

    return click.argument("prompt")(with_options(run, _PROMPT_OPTIONS))


def with_options(command: Callable[..., None], options: Sequence[Decorator]) -> Callable[..., None]:
    """Add options, so that the help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def ask(verb: Callable[..., ValueT], **arguments: Any) -> ValueT:
    """Call a verb; arguments that fit no request are wrong usage."""
    try:
        return verb(**arguments)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def read_text(argument: str) -> str:
    """The argument itself; for `-` what stdin holds, without its last line break."""
    if argument != "-":
        return argument
    meta = click.get_current_context().meta
    if meta.get(_STDIN_READ):
        raise click.UsageError("Only one argument can be -, which stands for stdin.")
    meta[_STDIN_READ] = True
    return sys.stdin.read().removesuffix("\n")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise click.UsageError(f"--prompt-json: PROMPT is no JSON ({error}).") from None


def _credentials(tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    if (cert is None) != (key is None):
        raise click.UsageError("--tls-cert and --tls-key go together.")
    return Tls(ca, cert, key) if tls or ca or cert else None


class Command(click.Command):
    """A command whose errors are one sentence and its remedy on stderr. Exit 1, 2 for wrong usage, 130 for Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LdaClientError as error:
            raise click.ClickException(" ".join(filter(None, (str(error), _remedy(error))))) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE) from None


def _remedy(error: LdaClientError) -> str:
    """What to do about it, where the message of the server cannot know the options of this command."""
    match error:
        case lda_client.NoChatTemplate():
            return "Use --raw with a plain prompt."
        case lda_client.ContextExceeded() | lda_client.LimitExceeded():
            return "`lda info` shows the limits."
        case lda_client.TokenizersIncompatible():
            return "`lda compat` shows where they differ."
        case lda_client.AccessDenied():
            return "Set LDA_TOKEN, or give --tls-cert and --tls-key."
        case lda_client.DeadlineExceeded():
            return "Raise --timeout, or end early with the text so far by --time-budget."
        case lda_client.InternalServerError() if "request_id" in error.metadata:
            return f"Request id: {error.metadata['request_id']}."
    return "" if error.retry_after_s is None else f"Try again in {error.retry_after_s:g} s."


def print_json(message: Message) -> None:
    """One JSON object on one line; fields at their default are printed too, so that every line has the same shape."""
    print_object(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def print_object(fields: dict[str, Any]) -> None:
    """One JSON object on one line."""
    click.echo(json.dumps(fields, ensure_ascii=False))


def note(text: str) -> None:
    """A line beside the answer, on stderr."""
    click.echo(text, err=True)


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
