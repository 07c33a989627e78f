"""A LoRA adapter added to weights as they are loaded. Knows checkpoints' names; nothing of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lda_service.engine import adapter
from lda_service.errors import ModelUnsupported

if TYPE_CHECKING:
    from torch import Tensor


class Merge:
    """Called with each weight of the base model: gives it with the adapter's change, B A, added in float32."""

    def __init__(self, lora: adapter.Adapter | None) -> None:
        self._lora = lora
        self._missing = set(lora.weights) if lora else set()

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The weight of that name in the after model."""
        path = name.removesuffix(".weight")
        if self._lora is None or path not in self._lora.weights:
            return tensor
        a, b = self._lora.weights[path]
        change = b.float() @ a.float()
        if change.shape != tensor.shape:
            change = change.T  # a layer that keeps its weight the other way round
        if change.shape != tensor.shape or not tensor.is_floating_point():
            raise self._unsupported(path)
        self._missing.discard(path)
        return (tensor.float() + change.to(tensor.device)).to(tensor.dtype)

    def finish(self) -> None:
        """Check that no part of the adapter was left out.

        Raises:
            ModelUnsupported: the base model has no weight for a part of it.
        """
        if self._missing:
            raise self._unsupported(min(self._missing))

    def _unsupported(self, path: str) -> ModelUnsupported:
        assert self._lora is not None
        return ModelUnsupported(
            f"Adapter {self._lora.model_id!r} changes {path}, which is no plain weight of {self._lora.base_id!r}; "
            "merge it first (PEFT's merge_and_unload) and give the folder of the merged model as MODEL_AFTER_ID."
        )


def merge_adapter(adapter_id: str | None) -> Merge:
    """What adds this adapter, or nothing if there is none."""
    config = adapter.find_config(adapter_id) if adapter_id else None
    return Merge(adapter.read_adapter(str(adapter_id), config) if config else None)
