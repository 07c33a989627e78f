"""How the models compute on a CPU: weights laid out once for the products of decoding, small operations fused.

Swaps modules of a loaded transformers model for ones that call the native kernels or oneDNN, and says what was chosen
and why. Knows modules; nothing of caches, rows or sampling. The modeling code stays transformers' own.
"""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from lda_service.engine import native
from lda_service.engine.native import Norm, Product

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from lda_service.engine.native import Kernels, PackedWeight

logger = logging.getLogger(__name__)

MEASURED_ROWS = (1, 8, 64)
MEASURED_BYTES = 64 << 20
REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class Backend:
    """What was chosen for a pair.

    Attributes:
        kernels: the native kernels, for attention and sampling; None: torch's operators.
        cache_dtype: of stored keys and values; None: that of the computation.
        summary: one sentence for the log: what runs, and why.
        invariant: what is computed for a row does not depend on the rows beside it.
    """

    kernels: Kernels | None
    cache_dtype: torch.dtype | None
    summary: str
    invariant: bool = False


class Float32Head(nn.Module):
    """An output layer that computes and answers in float32 whatever the type of the body.

    At alpha 20 the rounding of two bf16 outputs would be as large as the signal.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        weight, bias = head.weight, getattr(head, "bias", None)
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=False)  # type: ignore[operator]
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float32, shape (..., vocabulary)."""
        return linear(hidden.float(), self.weight, self.bias)


class NativeLinear(nn.Module):
    """A product with a packed weight: float32 activations and sums, whatever the type of the weight."""

    def __init__(self, kernels: Kernels, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = nn.Parameter(weight.data, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.outputs = weight.outputs
        self.product = Product(weight, self.bias)
        self._linear = kernels.linear

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix again, for modeling code that looks at it: a copy at every look."""
        return self.packed.transpose(1, 2).flatten(0, 1)[: self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., outputs), float32."""
        return self._linear(x, self.product)


class NativeGatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` in one call."""

    def __init__(self, kernels: Kernels, gate: NativeLinear, up: NativeLinear, down: NativeLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.products = gate.product, up.product, down.product
        self._gated_mlp = kernels.gated_mlp

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., outputs of down), float32."""
        return self._gated_mlp(x, *self.products)


class NativeRMSNorm(nn.Module):
    """Root-mean-square normalisation in one call; `offset` 1 where the model scales by 1 + weight."""

    def __init__(self, kernels: Kernels, norm: nn.Module, offset: float, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)  # type: ignore[operator]
        self.norm = Norm(self.weight.data, offset, eps)
        self._rms_norm = kernels.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Shape of x, float32."""
        return self._rms_norm(x, self.norm)


class WideningEmbedding(nn.Module):
    """A table that stays in its own type and answers in float32."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight, self.padding_idx = table.weight, table.padding_idx
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Shape (..., dim), float32."""
        return embedding(ids, self.weight).float()


class OneDnnLinear(nn.Module):
    """A product with a weight laid out once for oneDNN, in the weight's own type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), max(MEASURED_ROWS))
        self.packed, self.bias = packed, bias

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., outputs)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


OURS = (NativeLinear, NativeGatedMLP, NativeRMSNorm, WideningEmbedding, OneDnnLinear, Float32Head)


def choose_backend(models: Sequence[PreTrainedModel], *, use_native: bool = True) -> Backend:
    """How the models of a pair should compute.

    Args:
        models: on their device.
        use_native: False: on torch's operators.
    """
    if models[0].device.type != "cpu":
        return Backend(None, None, "torch's operators on " + str(models[0].device))
    if not use_native:
        return Backend(None, None, "torch's operators, because native kernels are switched off")
    try:
        kernels = native.load()
    except native.Unavailable as reason:
        return Backend(
            None,
            None,
            f"torch's operators, because {reason}; with few rows this takes two to four times as long as the native "
            "kernels: install a C compiler",
        )
    if any(model.dtype == torch.bfloat16 for model in models):
        return _choose_for_bf16(models[0], kernels)
    return Backend(kernels, None, "native kernels: packed weights, float32 sums", invariant=True)


def swap_heads(backend: Backend, models: Sequence[PreTrainedModel]) -> None:
    """Make logits leave the output layers in float32. Models that have one output layer keep one."""
    heads: dict[tuple[int, ...], nn.Module] = {}
    for model in dict.fromkeys(models):
        old: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if old is None or not _is_plain(old.weight):
            continue
        bias: Tensor | None = getattr(old, "bias", None)
        key = (old.weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        heads.setdefault(key, _float32_head(backend, old, bias))
        model.set_output_embeddings(heads[key])  # type: ignore[no-untyped-call]


def _float32_head(backend: Backend, old: Any, bias: Tensor | None) -> nn.Module:
    if backend.kernels is not None:
        return NativeLinear(backend.kernels, _pack(backend.kernels, old.weight, {}), bias)
    head: nn.Module = old if old.weight.dtype == torch.float32 else Float32Head(old)
    return head


def swap_bodies(backend: Backend, models: Sequence[PreTrainedModel]) -> None:
    """Replace the other modules by those of the backend. A weight that both models hold is packed once."""
    kernels = backend.kernels
    packed: dict[int, PackedWeight] = {}
    for model in dict.fromkeys(models):
        if kernels is not None and backend.invariant:
            _swap(model, lambda module: _native(kernels, module, packed))
            _swap(model, lambda module: _native_mlp(kernels, module))
            _widen_rest(model)
        elif kernels is not None:
            _swap(model, _one_dnn)


def has_bf16_products() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _choose_for_bf16(model: PreTrainedModel, kernels: Kernels) -> Backend:
    """Products in float32 with bfloat16 weights, or oneDNN's bfloat16 where the processor has that and is faster."""
    ours = "native kernels: bfloat16 weights and cache, float32 products and sums"
    if not has_bf16_products():
        summary = f"{ours}; this processor has no bfloat16 products"
        return Backend(kernels, torch.bfloat16, summary, invariant=True)
    weight = max((m.weight for m in model.modules() if type(m) is nn.Linear), key=Tensor.numel).detach()
    weight = weight[: MEASURED_BYTES // (2 * weight.shape[1])]
    native_s, one_dnn_s = _measure(kernels, weight)
    ratio = statistics.geometric_mean(a / b for a, b in zip(one_dnn_s, native_s, strict=True))
    measured = f"oneDNN's bfloat16 takes {ratio:.2f} times as long over {MEASURED_ROWS} rows"
    if ratio >= 1:
        return Backend(kernels, torch.bfloat16, f"{ours}; {measured}", invariant=True)
    return Backend(
        kernels, None, f"oneDNN with packed bfloat16 weights, native attention and output layers; {measured}"
    )


def _measure(kernels: Kernels, weight: Tensor) -> tuple[list[float], list[float]]:
    """Seconds of one product at each of `MEASURED_ROWS`: native, oneDNN."""
    product, one_dnn = Product(kernels.pack(weight), None), OneDnnLinear(weight, None)
    inputs = [torch.randn(rows, weight.shape[1]) for rows in MEASURED_ROWS]
    native_s = [_seconds(lambda x=x: kernels.linear(x, product)) for x in inputs]  # type: ignore[misc]
    one_dnn_s = [_seconds(lambda x=x: one_dnn(x.bfloat16())) for x in inputs]  # type: ignore[misc]
    return native_s, one_dnn_s


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _swap(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every descendant for which there is a replacement."""
    for name, child in list(module.named_children()):
        new = None if isinstance(child, OURS) else replacement(child)
        if new is not None:
            setattr(module, name, new)
        elif not isinstance(child, OURS):
            _swap(child, replacement)


def _pack(kernels: Kernels, weight: Tensor, packed: dict[int, PackedWeight]) -> PackedWeight:
    """The packed weight; one that stands in the same memory as an earlier one is that one."""
    at = weight.data_ptr()
    if at not in packed:
        wide = weight.detach() if weight.dtype == torch.bfloat16 else weight.detach().float()
        packed[at] = kernels.pack(wide)
    return packed[at]


def _native(kernels: Kernels, module: nn.Module, packed: dict[int, PackedWeight]) -> nn.Module | None:
    """The native twin of a module, or None."""
    if type(module) is nn.Linear and _is_plain(module.weight):
        return NativeLinear(kernels, _pack(kernels, module.weight, packed), module.bias)
    if type(module) is Conv1D and _is_plain(module.weight):
        return NativeLinear(kernels, _pack(kernels, module.weight.t(), packed), module.bias)
    if type(module) is nn.Embedding and module.weight.dtype == torch.bfloat16:
        return WideningEmbedding(module)
    return _native_norm(kernels, module)


def _native_norm(kernels: Kernels, module: nn.Module) -> nn.Module | None:
    """A twin of an RMS norm, if one gives the same answers: there are several kinds under similar names."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0))
    try:
        wanted = module(x.to(weight.dtype)).float()
    except Exception:  # a norm that takes more than its input is another kind
        return None
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    for offset in (0.0, 1.0):
        twin = NativeRMSNorm(kernels, module, offset, eps)
        if torch.allclose(twin(x), wanted, rtol=tolerance, atol=tolerance):
            return twin
    return None


def _native_mlp(kernels: Kernels, module: nn.Module) -> nn.Module | None:
    """A twin of a gated MLP of native products, if one gives the same answers."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, NativeLinear) for part in parts) or len(list(module.parameters(recurse=False))):
        return None
    gate, up, down = (part for part in parts if isinstance(part, NativeLinear))
    x = torch.randn(3, gate.product.depth, generator=torch.Generator().manual_seed(0))
    twin = NativeGatedMLP(kernels, gate, up, down)
    try:
        wanted = module(x)
    except Exception:  # it takes more than its input: another kind
        return None
    return twin if torch.allclose(twin(x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())) else None


def _one_dnn(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear and _is_plain(module.weight):
        return OneDnnLinear(module.weight, module.bias)
    return None


def _is_plain(weight: Tensor) -> bool:
    """Whether it is an ordinary matrix; a quantised one has a type of its own."""
    return type(weight.data) is Tensor and weight.is_floating_point()


def _widen_rest(model: nn.Module) -> None:
    """What was not swapped computes in float32 like the rest."""
    for module in model.modules():
        if isinstance(module, OURS):
            continue
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and _is_plain(tensor) and tensor.dtype in (torch.bfloat16, torch.float16):
                    tensor.data = tensor.data.float()
