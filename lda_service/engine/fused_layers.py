"""Whole decoder layers in one native call, where a layer is of a known build and answers as transformers' own.

Most of a step of a small model is Python between its operations; this takes it out of the layers and leaves the model
around them to transformers. A layer is watched while the model runs a few positions, at the start and at the far end
of its context; only if its twin gives the same answers to the same inputs does it take the layer's place. Knows modules
and their common names; nothing of models' names, rows or sampling.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lda_service.engine import attention
from lda_service.engine.kv_cache import CacheView, Group, KVCache, PassInputs
from lda_service.engine.native import MAX_HEAD_DIM, AttentionShape, DecoderLayer, Norm, Product
from lda_service.engine.prepack import NativeGatedMLP, NativeLinear, NativeRMSNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lda_service.engine.native import Kernels

logger = logging.getLogger(__name__)

# Where the norms of a layer stand, by the names that transformers gives them.
ARRANGEMENTS = (
    {"input_layernorm": "before_attention", "post_attention_layernorm": "before_mlp"},
    {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_mlp"},
    {
        "input_layernorm": "before_attention",
        "post_attention_layernorm": "after_attention",
        "pre_feedforward_layernorm": "before_mlp",
        "post_feedforward_layernorm": "after_mlp",
    },
)
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
HEAD_NORMS = {"q_norm": "of_query", "k_norm": "of_key"}
PROBE_POSITIONS = 6
# What a layer may be given beside its input; whatever else holds tensors is another build.
KNOWN_INPUTS = ("position_embeddings", "position_ids", "kv")


class NativeDecoderLayer(nn.Module):
    """A decoder layer in one call, where a pass runs on the native kernels; else the layer as it was."""

    def __init__(self, kernels: Kernels, layer: nn.Module, fused: DecoderLayer, index: int) -> None:
        super().__init__()
        self.layer = layer
        self._index, self._fused, self._run = index, fused, kernels.decoder_layer
        self._cached_shapes = [(fused.attention.kv_heads, fused.attention.dim)] * 2

    def __getattr__(self, name: str) -> Any:
        """What modeling code asks of a layer beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """Shape (rows, queries, hidden); float32."""
        kv: CacheView | None = options.get("kv")
        if kv is None or kv.kernels is None:
            plain: Tensor = self.layer(hidden_states, *args, **options)
            return plain
        cos, sin = (_of_rows(x, hidden_states) for x in options["position_embeddings"])
        cache = kv.cache.of_shapes(self._index, self._cached_shapes, hidden_states)
        return self._run(self._fused, kv.inputs.layout, hidden_states.contiguous(), cos, sin, cache)


def _of_rows(angles: Tensor, x: Tensor) -> Tensor:
    """Angles of every row of x; models give one row where all have the same positions."""
    return angles.expand(len(x), -1, -1).contiguous()


@dataclass(slots=True)
class _Seen:
    """A layer's calls in the probe, and how it called attention."""

    inputs: list[Tensor | None] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    attentions: list[tuple[AttentionShape, bool]] = field(default_factory=list)


class _Listener:
    """The native kernels, noting how attention is called."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.calls: list[tuple[AttentionShape, bool]] = []

    def attend(self, layout: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        """See `Kernels.attend`."""
        settings = (options["window"], options["scale"], options["softcap"])
        shape = AttentionShape(query.shape[1], key.shape[1], query.shape[3], *settings)
        self.calls.append((shape, options["sinks"] is None))
        return self._kernels.attend(layout, query, key, *args, **options)


@torch.inference_mode()
def fuse_layers(model: PreTrainedModel, kernels: Kernels, cache_dtype: torch.dtype | None, context_tokens: int) -> int:
    """Replace the decoder layers that have a twin; returns how many. The model's products must be native already.

    Args:
        model: on the CPU.
        kernels: that run the twins.
        cache_dtype: of stored keys and values.
        context_tokens: positions the model reaches.
    """
    layers = {name: module for name, module in model.named_modules() if _looks_known(module)}
    if not layers or not getattr(model, "_supports_attention_backend", False):
        return 0
    own_attention = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        seen = _watch(model, layers, kernels, cache_dtype, context_tokens)
    except Exception as error:  # whatever a model may not like about being run this way; its start will say more
        logger.warning("%s could not be watched: %r", type(model).__name__, error)
        return 0
    finally:
        model.set_attn_implementation(own_attention)
    count = 0
    for name, layer in layers.items():
        twin = _twin(layer, seen[name], kernels, cache_dtype)
        if twin is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, twin)
            count += 1
    return count


def _looks_known(module: nn.Module) -> bool:
    return _arrangement(module) is not None and _products(module) is not None


def _arrangement(layer: nn.Module) -> dict[str, str] | None:
    """Where each of its norms stands; None if it is of another build."""
    children = dict(layer.named_children())
    norms = {name for name, child in children.items() if isinstance(child, NativeRMSNorm)}
    if set(children) - norms != {"self_attn", "mlp"} or any(True for _ in layer.parameters(recurse=False)):
        return None
    return next((a for a in ARRANGEMENTS if set(a) == norms), None)


def _products(layer: Any) -> dict[str, Product] | None:
    """Its products by their names in layer.h; None if it is of another build."""
    mlp, parts = layer.mlp, dict(layer.self_attn.named_children())
    projections = {name: part for name, part in parts.items() if isinstance(part, NativeLinear)}
    norms = {name for name, part in parts.items() if isinstance(part, NativeRMSNorm)}
    known = set(projections) == set(PROJECTIONS) and norms in (set(), set(HEAD_NORMS))
    if not known or len(parts) != len(projections) + len(norms) or not isinstance(mlp, NativeGatedMLP):
        return None
    named = {PROJECTIONS[name]: part.product for name, part in projections.items()}
    named |= dict(zip(("gate", "up", "down"), mlp.products, strict=True))
    fits = all(product.width == product.outputs for product in named.values())
    return named if fits else None


def _watch(
    model: PreTrainedModel,
    layers: dict[str, nn.Module],
    kernels: Kernels,
    cache_dtype: torch.dtype | None,
    context_tokens: int,
) -> dict[str, _Seen]:
    """Run positions of the start and of the far end, and note what each layer is given and gives."""
    seen = {name: _Seen() for name in layers}
    listener = _Listener(kernels)

    def note(name: str, args: Any, options: dict[str, Any], output: Any) -> None:
        calls, listener.calls = listener.calls, []
        one = seen[name]
        one.inputs.append(args[0] if len(args) == 1 else None)
        one.options.append(options)
        one.outputs.append(output)
        one.attentions += calls

    hooks = [
        layer.register_forward_hook(
            lambda _module, args, options, output, name=name: note(name, args, options, output),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        for first in (0, max(0, context_tokens - PROBE_POSITIONS)):
            inputs = _probe()
            view = CacheView(KVCache(PROBE_POSITIONS, cache_dtype), inputs, cast("Kernels", listener))
            # Only the cache believes that these are the first positions.
            model.base_model(input_ids=inputs.ids, position_ids=inputs.positions + first, use_cache=False, kv=view)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _probe() -> PassInputs:
    """One row of a few positions that nothing stands before."""
    positions = torch.arange(PROBE_POSITIONS)[None]
    row = torch.zeros(1, dtype=torch.int64)
    return PassInputs(positions, positions, positions, row, PROBE_POSITIONS, (Group(0, 1, 0),), is_prefill=True)


def _twin(layer: Any, seen: _Seen, kernels: Kernels, cache_dtype: torch.dtype | None) -> NativeDecoderLayer | None:
    """The layer's twin, if it gives the same answers."""
    shape = _attention_shape(seen)
    if shape is None or not all(_is_plain(options) for options in seen.options):
        return None
    fused = DecoderLayer(_products(layer) or {}, _norms(layer), shape)
    twin = NativeDecoderLayer(kernels, layer, fused, int(layer.self_attn.layer_idx))
    for x, options, wanted in zip(seen.inputs, seen.options, seen.outputs, strict=True):
        if not isinstance(wanted, Tensor) or x is None:
            return None
        view = CacheView(KVCache(PROBE_POSITIONS, cache_dtype), options["kv"].inputs, kernels)
        answer = twin(x, **{**options, "kv": view})
        if not torch.allclose(answer, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            return None
    return twin


def _norms(layer: Any) -> dict[str, Norm]:
    """Its norms by their names in layer.h."""
    own = layer.self_attn
    norms = {place: getattr(layer, name) for name, place in (_arrangement(layer) or {}).items()}
    norms |= {place: getattr(own, name) for name, place in HEAD_NORMS.items() if hasattr(own, name)}
    return {place: module.norm for place, module in norms.items()}


def _attention_shape(seen: _Seen) -> AttentionShape | None:
    """How the layer calls attention, if always in the one way that its twin knows."""
    if not seen.attentions or len(seen.attentions) != len(seen.inputs) or len(set(seen.attentions)) != 1:
        return None
    shape, has_no_sinks = seen.attentions[0]
    return shape if has_no_sinks and shape.dim <= MAX_HEAD_DIM else None


def _is_plain(options: dict[str, Any]) -> bool:
    angles = options.get("position_embeddings")
    if not isinstance(angles, tuple) or len(angles) != 2 or any(x.dtype != torch.float32 for x in angles):
        return False
    rest = [value for name, value in options.items() if name not in KNOWN_INPUTS]
    return not any(isinstance(value, (Tensor, tuple, list, dict)) for value in rest)
