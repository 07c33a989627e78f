"""The pair as one vLLM model: two models of any architectures that vLLM knows, run on the same tokens.

The prefixes `after` and `before` give every attention layer a name of its own, hence a KV cache of its own; vLLM's
block table, prefix cache and scheduler serve both. Knows vLLM's model interface; of drawing only whom to ask.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from lda_service.vllm_engine.merging import merge_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Draw = Callable[[Tensor, Tensor], Tensor]

SIDES = ("after", "before")
logger = logging.getLogger(__name__)


class AmplifiedPairForCausalLM(nn.Module, SupportsPP):  # type: ignore[misc]
    """Both models. `forward` gives their hidden states side by side; `compute_logits` asks `draw` for the tokens.

    The engine's model path names the base of the tokenizer and of the first weights; which two models are meant
    stands in `hf_overrides`: `lda_after`, `lda_before`, and `lda_adapter` if the after model is an adapter over them.
    """

    after: Any  # vLLM models
    before: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.draw: Draw | None = None  # set by the rank, on the last pipeline stage
        names = {"after": self.config.lda_after, "before": self.config.lda_before}
        configs = {side: _config_of(vllm_config, names[side]) for side in SIDES}
        for side in SIDES:
            with set_model_tag(side):  # keeps the two compiled graphs apart
                model = initialize_model(vllm_config=configs[side], prefix=maybe_prefix(prefix, side))
            _answer_in_float32(model, side)
            setattr(self, side, model)
        self._split = configs["after"].model_config.get_hidden_size()
        self.secondary_weights = [
            DefaultModelLoader.Source(
                model_or_path=names["before"], revision=None, prefix="before.", fall_back_to_pt=False
            )
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Both models' weights, as their checkpoints name them; an adapter is added to the after model's."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._named(weights))
        return loaded

    def _named(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        merge = merge_adapter(self.config.lda_adapter)
        for name, tensor in weights:
            if name.startswith("before."):
                yield name, tensor
            else:
                yield f"after.{name}", merge(name, tensor)
        merge.finish()

    def embed_input_ids(self, input_ids: Tensor) -> Any:
        """Part of vLLM's interface; the models embed for themselves in `forward`."""
        return self.after.embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What one pipeline stage hands to the next, of both models."""
        return _join(
            {side: getattr(self, side).make_empty_intermediate_tensors(batch_size, dtype, device) for side in SIDES}
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor | IntermediateTensors:
        """Hidden states, shape (positions, after's width + before's), or what one pipeline stage passes on."""
        assert inputs_embeds is None, "two models have no embedding in common"
        hidden = {side: getattr(self, side)(input_ids, positions, _part(intermediate_tensors, side)) for side in SIDES}
        if isinstance(hidden["after"], IntermediateTensors):
            return _join(hidden)
        return torch.cat([hidden["after"], hidden["before"]], dim=-1)

    def both_logits(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both models' logits; None on tensor parallel ranks that do not gather them."""
        after, before = hidden_states[:, : self._split], hidden_states[:, self._split :]
        return self.after.compute_logits(after.contiguous()), self.before.compute_logits(before.contiguous())

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits that leave vLLM's sampler no choice: those of the tokens that `draw` drew."""
        assert self.draw is not None, "the pair runs only on this project's ranks, which know alpha and seeds"
        after, before = self.both_logits(hidden_states)
        if after is None or before is None:  # another rank gathers them
            return None
        return self.draw(after, before)


def _config_of(vllm_config: VllmConfig, model: str) -> VllmConfig:
    """The engine's configuration for one of the two models, with that model's own quantisation."""
    ours = vllm_config.model_config
    own = ModelConfig(
        model=model,
        tokenizer=ours.tokenizer,
        skip_tokenizer_init=True,
        dtype=ours.dtype,
        seed=ours.seed,
        max_model_len=ours.max_model_len,
        enforce_eager=ours.enforce_eager,
        quantization=ours.quantization if ours.hf_config.lda_online_quantization else None,
        hf_overrides={"head_dtype": "float32"},
    )
    return replace(vllm_config, model_config=own, quant_config=None)


def _answer_in_float32(model: nn.Module, side: str) -> None:
    """Amplification multiplies rounding, so output layers answer in float32; a quantised one cannot."""
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
    if all(isinstance(head.quant_method, plain) for head in heads):
        return
    logger.warning("the output layer of %s is quantised: its logits are rounded to the model's type", side)
    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.head_dtype = None


def _join(sides: dict[str, IntermediateTensors]) -> IntermediateTensors:
    """Both models' tensors under one roof, by prefixed names."""
    return IntermediateTensors(
        {f"{side}.{name}": tensor for side, part in sides.items() for name, tensor in part.tensors.items()}
    )


def _part(tensors: IntermediateTensors | None, side: str) -> IntermediateTensors | None:
    """The inverse of `_join` for one model."""
    if tensors is None:
        return None
    prefix = f"{side}."
    return IntermediateTensors(
        {name.removeprefix(prefix): t for name, t in tensors.tensors.items() if name.startswith(prefix)}
    )
