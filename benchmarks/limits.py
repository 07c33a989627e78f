"""What the machine allows, by arithmetic: no engine decodes a pair faster than the limit of a workload.

A step reads both models' weights once (without the input embedding, of which it needs one line a row) and the KV of all
rows, the prompt's once; and multiplies every row with every weight. Whichever takes longer is the step's least time.
Sampling is taken to be free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.workloads import PairShape, Workload

MODELS = 2
BYTES = 2  # of a bf16 number: what the pairs are stored in


@dataclass(frozen=True, slots=True)
class Capability:
    """Bytes read and floating-point operations done in a second."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, read: float, flops: float) -> float:
        """Least time to do both, one beside the other."""
        return max(read / self.bytes_per_s, flops / self.flops_per_s)


def kv_bytes(shape: PairShape) -> int:
    """Keys and values of one position in both models."""
    return MODELS * 2 * shape.layers * shape.hidden * BYTES


def attention_flops(shape: PairShape) -> int:
    """Scores and mixing of one query with one position, all layers, both models."""
    return MODELS * 4 * shape.layers * shape.hidden


def prefill_seconds(shape: PairShape, prompt: int, machine: Capability) -> float:
    """Least time for the prompt, once, and the logits after it."""
    weights = MODELS * (shape.layer_parameters + shape.head_parameters) * BYTES
    products = MODELS * 2 * (shape.layer_parameters * prompt + shape.head_parameters)
    attended = attention_flops(shape) * prompt * (prompt + 1) // 2
    return machine.seconds(weights, products + attended)


def step_seconds(shape: PairShape, rows: int, prompt: int, own: int, machine: Capability) -> float:
    """Least time for a step of `rows` sequences that share a prompt and have `own` tokens each."""
    parameters = MODELS * (shape.layer_parameters + shape.head_parameters)
    positions = prompt + rows * own
    flops = 2 * parameters * rows + attention_flops(shape) * rows * (prompt + own)
    return machine.seconds(parameters * BYTES + positions * kv_bytes(shape), flops)


def limit_tokens_per_s(shape: PairShape, workload: Workload, machine: Capability) -> float:
    """The most tokens/s of the pair, prefill included. The first tokens come from the prompt's logits."""
    steps = (step_seconds(shape, workload.rows, workload.prompt, own, machine) for own in range(1, workload.new))
    return workload.tokens / (prefill_seconds(shape, workload.prompt, machine) + sum(steps))


def faster_dtype(engine: str, workload: Workload, linear: dict[str, dict[str, float]]) -> str:
    """The type in which a peer is faster here, judged by what plain linear layers reach.

    Args:
        engine: "loop" decodes one row at a time; others prefill and decode all rows together.
        workload: what is run.
        linear: FLOP/s by dtype and, as text, rows.
    """
    rows = 1 if engine == "loop" else workload.rows
    prefilled = workload.prompt * (workload.rows if engine == "generate" else 1)

    def cost(dtype: str) -> float:
        rates = linear[dtype]
        at = min(rates, key=lambda measured: abs(int(measured) - rows))
        most = max(rates, key=int)
        return prefilled / rates[most] + rows * workload.new / rates[at]

    return min(linear, key=cost)


def capability(measured: dict[str, Any]) -> Capability:
    """From what `machine.Machine.measure` answered."""
    return Capability(measured["bytes_per_s"], measured["flops_per_s"])
