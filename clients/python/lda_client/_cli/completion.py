"""`lda completion`: what makes a shell complete the commands and options of `lda`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from lda_client._cli._common import Command, examples

EXAMPLES = examples(
    'eval "$(lda completion bash)"',
    'eval "$(lda completion zsh)"',
    "lda completion fish > ~/.config/fish/completions/lda.fish",
)


@click.command(cls=Command, epilog=EXAMPLES, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes `lda`; put its evaluation into the start-up file of the shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"This version of click knows no completion for {shell}: upgrade click.")
    click.echo(kind(click.get_current_context().find_root().command, {}, "lda", "_LDA_COMPLETE").source())
