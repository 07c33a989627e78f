"""A LoRA adapter applied to some rows of a pass: one copy of the weights serves the model with and without it.

Knows linear layers and the two low-rank matrices beside each; nothing of checkpoints, pairs or caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ALL = -1


@dataclass(slots=True)
class AdaptedRows:
    """Which tokens of the next pass the adapter acts on: the first `count`. `ALL` is all of them, 0 none.

    One object for all layers of a model; whoever runs a pass sets it first. Tokens count in the order in which a layer
    sees them, rows and positions flattened, so the layout of the batch does not matter.
    """

    count: int = ALL


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it: `inner(x)`, plus `B A x` for the adapted tokens.

    Args:
        inner: any module that maps (..., in) to a fresh (..., out).
        a: shape (rank, in), in the layer's type.
        b: shape (out, rank), likewise, the adapter's scale already in it.
        rows: shared by all layers of the model.
    """

    def __init__(self, inner: nn.Module, a: Tensor, b: Tensor, rows: AdaptedRows) -> None:
        super().__init__()
        self.inner = inner
        self.lora_a = nn.Parameter(a, requires_grad=False)
        self.lora_b = nn.Parameter(b, requires_grad=False)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for modeling code that looks at its type or device."""
        return self.inner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.inner.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in) to (..., out)."""
        out: Tensor = self.inner(x)
        count = self.rows.count
        if count == 0:
            return out
        adapted = x.reshape(-1, x.shape[-1])[: None if count == ALL else count]
        low = linear(adapted, self.lora_a)
        out.view(-1, out.shape[-1])[: len(adapted)].addmm_(low, self.lora_b.T)
        return out


def wrap(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> AdaptedRows:
    """Put a `LoraLinear` around each named layer. Returns what says which rows are adapted: all of them for now.

    Args:
        model: on its device.
        weights: for each path of a linear layer its A and B as `LoraLinear` takes them, of any type and device.

    Raises:
        LookupError: the model has no linear layer of a name and shape; the message says which. Nothing is wrapped then.
    """
    for path, (a, b) in weights.items():
        shape = linear_shape(model, path)
        if shape != (a.shape[1], b.shape[0]):
            raise LookupError(f"{path} maps {a.shape[1]} to {b.shape[0]} features in the adapter, {shape} in the model")
    rows = AdaptedRows()
    for path, pair in weights.items():
        parent, _, name = path.rpartition(".")
        inner = model.get_submodule(path)
        a, b = (x.to(inner.weight.device, inner.weight.dtype) for x in pair)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), name, LoraLinear(inner, a, b, rows))
    return rows


def linear_shape(model: nn.Module, path: str) -> tuple[int, int] | None:
    """Features in and out of the linear layer of that name; None if there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None
