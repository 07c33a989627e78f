"""The commands of `lda`, one file each. Answers go to stdout, notes and errors to stderr."""

from __future__ import annotations

import click

from lda_client._cli.both import both
from lda_client._cli.compat import compat
from lda_client._cli.completion import completion
from lda_client._cli.generate import generate
from lda_client._cli.info import info
from lda_client._cli.runs import runs
from lda_client._cli.score import score
from lda_client._version import __version__
from lda_client.lab.cli import COMMANDS as LAB
from lda_client.lab.cli_check import COMMANDS as CHECKS
from lda_client.lab.cli_estimate import COMMANDS as ESTIMATES
from lda_client.lab.cli_report import COMMANDS as REPORTS
from lda_client.lab.cli_surface import COMMANDS as SURFACES

EXAMPLES = """\b
Examples:
  lda generate "Who are you?" --alpha 2
  lda both "Who are you?" --seed 1
  lda score "The capital of France is" " Paris" --raw
  lda compat
  lda info --target gpu-host:50051
  lda runs list
  lda completion bash
"""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lda")
def lda() -> None:
    """Ask an LDA server: text sampled from after + alpha * (after - before).

    Exit codes: 0 done, 1 the server is away or refused, 2 wrong usage, 3 a survey's budget ended it, 130 interrupted.
    """


ASKING = (generate, both, score, compat, info, runs, completion)
for command in (*ASKING, *LAB, *ESTIMATES, *CHECKS, *SURFACES, *REPORTS):
    lda.add_command(command)
