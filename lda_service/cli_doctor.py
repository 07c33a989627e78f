"""`lda-service doctor`: what a pair needs, before anything is downloaded or bought."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lda_service.config import DTYPES
from lda_service.errors import LdaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lda_service.sizing import Load, Machine, ModelSize, Plan

_COUNT = click.IntRange(min=1)
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--plan", "planned", is_flag=True, help="Memory and the limits of speed on known machines.")
@click.option("--model-after-id", envvar="MODEL_AFTER_ID", help="Post-trained model: a hub id or a folder.")
@click.option("--model-before-id", envvar="MODEL_BEFORE_ID", help="Reference model: a hub id or a folder.")
@click.option("--adapter", "is_adapter", is_flag=True, help="The after model is a LoRA adapter over the before model.")
@click.option(
    "--dtype", default="auto", show_default=True, type=click.Choice(DTYPES), help="auto: the configuration's."
)
@click.option("--rows", type=_COUNT, default=64, show_default=True, help="Sequences decoded at once, of one prompt.")
@click.option("--prompt-tokens", type=_COUNT, default=256, show_default=True)
@click.option("--new-tokens", type=_COUNT, default=512, show_default=True, help="Of each sequence.")
@click.option("--devices", type=_COUNT, default=1, show_default=True, help="That share the pair evenly.")
@click.option("--memory-gib", type=_POSITIVE, help="Of a machine of your own; with --bandwidth-gb-s and --tflops.")
@click.option("--bandwidth-gb-s", type=_POSITIVE, help="Memory bandwidth of it.")
@click.option("--tflops", type=_POSITIVE, help="Products of it, in the type of the weights.")
def doctor(planned: bool, model_after_id: str | None, model_before_id: str | None, **options: Any) -> None:
    """Say what a pair needs. Reads two configurations; downloads no weights.

    The tokens/s are limits: what the machine's memory and products allow, which no engine passes.
    """
    if not planned:
        raise click.UsageError("Say what to look at: --plan.")
    if not (model_after_id and model_before_id):
        raise click.UsageError("Give --model-after-id and --model-before-id.")
    from lda_service.sizing import MACHINES, Load, measure, plan

    load = Load(options["rows"], options["prompt_tokens"], options["new_tokens"])
    try:
        after = measure(model_before_id if options["is_adapter"] else model_after_id, options["dtype"])
        before = measure(model_before_id, options["dtype"])
    except LdaError as error:
        click.echo(error.message, err=True)
        sys.exit(1)
    own = _own_machine(options["memory_gib"], options["bandwidth_gb_s"], options["tflops"])
    machines = (own,) if own else MACHINES
    plans = [
        plan((after, before), load, each, options["devices"], is_adapter=options["is_adapter"]) for each in machines
    ]
    _tell((after, before), load, plans)
    if options["devices"] > 1:
        click.echo("\nSeveral devices hold one pair through --backend vllm, both models whole (docs/vllm.md).")


def _own_machine(memory: float | None, bandwidth: float | None, tflops: float | None) -> Machine | None:
    from lda_service.sizing import GIB, Machine

    if memory is None and bandwidth is None and tflops is None:
        return None
    if memory is None or bandwidth is None or tflops is None:
        raise click.UsageError("--memory-gib, --bandwidth-gb-s and --tflops go together.")
    return Machine("yours", memory * GIB, bandwidth * 1e9, tflops * 1e12)


def _tell(pair: Sequence[ModelSize], load: Load, plans: Sequence[Plan]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    models = Table("model", box=None)
    for heading in ("parameters", "weights", "KV per token", "vocabulary", "context"):
        models.add_column(heading, justify="right")
    for role, model in zip(("after", "before"), pair, strict=True):
        context = f"{model.context_tokens:,}" if model.context_tokens else "?"
        figures = f"{model.parameters:,}", _bytes(model.weight_bytes), _bytes(model.token_bytes)
        models.add_row(f"{role}: {model.model_id}", *figures, f"{model.vocab_size:,}", context)
    console.print(models)
    machines = Table("machine", box=None)
    for heading in ("needs", "has", "fits", "rows that fit", "tokens/s, 1 row", "tokens/s, rows"):
        machines.add_column(heading, justify="right")
    for each in plans:
        name = each.machine.name if each.devices == 1 else f"{each.devices} x {each.machine.name}"
        has = _bytes(each.machine.memory_bytes * each.devices)
        limits = f"{each.one_row_tokens_per_s:,.0f}", f"{each.tokens_per_s:,.0f}"
        machines.add_row(
            name, _bytes(each.needed_bytes), has, "yes" if each.fits else "no", f"{each.max_rows:,}", *limits
        )
    console.print(
        f"\n{load.rows} rows of one prompt of {load.prompt_tokens:,} tokens, {load.new_tokens:,} new ones each:\n"
    )
    console.print(machines)
    console.print(
        "\nNeeded: weights, keys and values at full length (the prompt's once), logits. Tokens/s are limits of the"
        "\nmachine, not a forecast. Equal tensors of the two are stored once, which configurations do not tell."
    )


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"
