"""What a pair needs and what a machine could do with it, by arithmetic, from two configurations alone.

Builds both models without weights (on torch's `meta` device), so parameters are counted, not guessed. Knows memory and
bandwidth; nothing of this project's speed: the tokens/s here are limits that no engine passes, and a good engine on a
CPU reaches 60 to 80% of them (README, "Speed").

A step reads both models' weights once, without the input embedding, and the keys and values of all rows, the prompt's
once; and multiplies every row with every weight. Whichever takes longer is the least time of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lda_service.engine.memory import token_bytes
from lda_service.errors import ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

# What allocators, activations and the runtime leave of a device's memory.
USABLE_SHARE = 0.9
LOGIT_COPIES = 3  # of after, before and the mixture, in float32


@dataclass(frozen=True, slots=True)
class ModelSize:
    """One model, counted.

    Attributes:
        model_id: as given.
        parameters: all of them, tied ones once.
        read_parameters: those that a decoding step reads: all but the input embedding, if it is not the output layer.
        weight_bytes: of all parameters.
        token_bytes: keys and values of one position.
        vocab_size: rows of the output layer.
        context_tokens: positions it was made for; None if its configuration does not say.
    """

    model_id: str
    parameters: int
    read_parameters: int
    weight_bytes: int
    token_bytes: int
    vocab_size: int
    context_tokens: int | None

    @property
    def read_bytes(self) -> float:
        """What a step reads of it."""
        return self.weight_bytes * self.read_parameters / self.parameters


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, as its maker describes it. Memory in bytes, rates per second; flops of bfloat16 products."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float


GIB = 2**30
# Published figures: memory, memory bandwidth, dense bfloat16 products.
MACHINES = (
    Machine("laptop CPU, 16 GiB", 16 * GIB, 60e9, 0.5e12),
    Machine("server CPU, 2 cores (measured)", 24 * GIB, 29.9e9, 0.157e12),
    Machine("L4", 24 * GIB, 300e9, 121e12),
    Machine("RTX 4090", 24 * GIB, 1008e9, 165e12),
    Machine("L40S", 48 * GIB, 864e9, 362e12),
    Machine("A100 80GB", 80 * GIB, 2039e9, 312e12),
    Machine("H100 SXM", 80 * GIB, 3350e9, 989e12),
    Machine("H200", 141 * GIB, 4800e9, 989e12),
    Machine("B200", 180 * GIB, 8000e9, 2250e12),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of it: rows of one prompt that each grow to `new_tokens`."""

    rows: int
    prompt_tokens: int
    new_tokens: int

    @property
    def positions(self) -> int:
        """Positions held at the end, the prompt's once."""
        return self.prompt_tokens + self.rows * self.new_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """What one machine would do with a pair and a load.

    Attributes:
        machine: which.
        devices: of it, weights and rows spread evenly.
        needed_bytes: weights, keys and values, logits.
        fits: whether that goes into the usable memory.
        max_rows: how many such rows would fit; 0 if the weights do not.
        one_row_tokens_per_s: limit for one sequence.
        tokens_per_s: limit for all rows; of `max_rows` if fewer fit.
    """

    machine: Machine
    devices: int
    needed_bytes: float
    fits: bool
    max_rows: int
    one_row_tokens_per_s: float
    tokens_per_s: float


def measure(model_id: str, dtype: str = "auto") -> ModelSize:
    """Count a model from its configuration: a hub id, or a folder with `config.json`.

    Args:
        model_id: hub id or folder.
        dtype: name of a torch type; `auto` takes the configuration's.

    Raises:
        ModelNotFound: there is no such configuration, or transformers has no causal model for it.
    """
    try:
        config = AutoConfig.from_pretrained(model_id)
        kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{model_id}: no causal language model can be made of it; give a hub id, or a folder with config.json "
            f"({_first_line(error)})."
        ) from error
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(
        model_id,
        parameters=total,
        read_parameters=total if embedding is head else total - embedding.numel(),
        weight_bytes=sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()),
        token_bytes=token_bytes(model, None),
        vocab_size=head.shape[0],
        context_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def plan(
    pair: Sequence[ModelSize], load: Load, machine: Machine, devices: int = 1, *, is_adapter: bool = False
) -> Plan:
    """What a machine would do with a pair.

    Args:
        pair: after and before.
        load: rows and lengths.
        machine: one device.
        devices: how many of it share the pair.
        is_adapter: the after model is a LoRA adapter over the before model: weights are held and read once.
    """
    held = pair[1:] if is_adapter else pair
    weights, read = sum(model.weight_bytes for model in held), sum(model.read_bytes for model in held)
    usable = machine.memory_bytes * USABLE_SHARE * devices
    per_position = sum(model.token_bytes for model in pair)
    per_row = load.new_tokens * per_position + _logit_bytes(pair)
    max_rows = max(0, math.floor((usable - weights - load.prompt_tokens * per_position) / per_row))
    rows = min(load.rows, max_rows)
    return Plan(
        machine,
        devices,
        needed_bytes=weights + load.positions * per_position + load.rows * _logit_bytes(pair),
        fits=max_rows >= load.rows,
        max_rows=max_rows,
        one_row_tokens_per_s=_limit(pair, read, load, 1, machine, devices) if max_rows else 0.0,
        tokens_per_s=_limit(pair, read, load, rows, machine, devices) if rows else 0.0,
    )


def _limit(pair: Sequence[ModelSize], read: float, load: Load, rows: int, machine: Machine, devices: int) -> float:
    """Tokens/s when rows are half grown."""
    positions = load.prompt_tokens + rows * load.new_tokens / 2
    moved = read + positions * sum(model.token_bytes for model in pair)
    flops = 2 * rows * sum(model.read_parameters for model in pair)
    return rows / max(moved / (machine.bytes_per_s * devices), flops / (machine.flops_per_s * devices))


def _logit_bytes(pair: Sequence[ModelSize]) -> int:
    return LOGIT_COPIES * 4 * max(model.vocab_size for model in pair)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
