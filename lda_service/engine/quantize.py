"""Linear layers in 8 bits, through torchao, and what that does to the combined logits.

Only weights are rounded: one scale for each output feature, products in the model's own type. Output layers stay as
they are. Amplification multiplies the error like everything else, so it is measured where it counts: in the combined
logits, at an alpha. Knows modules and logits; nothing of checkpoints or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lda_service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

CALIBRATION_TOKENS = 128
CALIBRATION_TEXT = (
    "The committee met on Tuesday to discuss the budget for the coming year. Several members asked why the costs of "
    "repairing the bridge had doubled since March, and whether the work could wait until spring.\n\n"
    "Q: What is the capital of Australia, and when was it founded?\nA: Canberra was founded in 1913.\n\n"
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n"
    "Ich weiß nicht, was soll es bedeuten, dass ich so traurig bin. 3.14159 * 2 = 6.28318."
)


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """How far quantisation moved the two models' logits: float32, shape (positions, shared ids) each."""

    after: Tensor
    before: Tensor

    def rms(self, alpha: float) -> float:
        """RMS error, in nats, of the logits combined at this alpha. A shift of a whole position changes no draw."""
        error = (1 + alpha) * self.after - alpha * self.before
        return float((error - error.mean(-1, keepdim=True)).square().mean().sqrt())


@torch.inference_mode()
def quantize(
    logits: Sequence[Callable[[], Tensor]], models: Sequence[nn.Module], output_layers: Sequence[Any]
) -> QuantizationError:
    """Quantise the models' linear layers in place, except the output layers.

    Args:
        logits: for after and before, how to get its logits on the calibration text, shape (positions, shared ids).
        models: after and before; may be one and the same.
        output_layers: modules to leave alone.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        message = "QUANTIZE=int8 needs torchao; install it with pip install 'lda-service[quantize]'."
        raise ConfigError(message) from error
    kept = {id(layer) for layer in output_layers}
    exact = [run() for run in logits]
    for model in {id(model): model for model in models}.values():
        quantize_(
            model,
            Int8WeightOnlyConfig(),
            filter_fn=lambda module, _: isinstance(module, nn.Linear) and id(module) not in kept,
        )
    return QuantizationError(*(run() - true for run, true in zip(logits, exact, strict=True)))
