"""Inner loops of decoding on a CPU, written in C and built at the first start by the machine's own compiler.

Knows the C functions beside this file and how to build them; nothing of models or requests. Without a compiler, or if
the built code answers wrongly, `load` says why and the engine runs on torch's operators.

All kernels compute in float32, and a row's result does not depend on how many rows stand beside it.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_float, c_int, c_long, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lda_service.engine.native.build import Unavailable as Unavailable
from lda_service.engine.native.build import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

PANEL = 16
MAX_HEAD_DIM = 256
SHARED_ROWS = 4  # rows of a prompt from which turning its keys for all of them pays
NO_MEMORY = "no memory for a kernel's work space"


class Layout(Structure):
    """`Layout` in attention.h."""

    _fields_ = (
        ("rows", c_long),
        ("queries", c_long),
        ("slot_map", c_void_p),
        ("context", c_long),
        ("row_index", c_void_p),
        ("positions", c_void_p),
        ("groups", c_long),
        ("group_start", c_void_p),
        ("group_prefix", c_void_p),
        ("prefix_as_tiles", c_int),
        ("own_as_tiles", c_int),
        ("stored", c_long),
    )

    @functools.cached_property
    def argument(self) -> Any:
        """A reference to it."""
        return byref(self)


class _Shape(Structure):
    _fields_ = (
        ("heads", c_long),
        ("kv_heads", c_long),
        ("dim", c_long),
        ("window", c_long),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("is_bf16", c_int),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("width", c_long), ("offset", c_float), ("eps", c_float))


class _Heads(Structure):
    _fields_ = (("data", c_void_p), ("row", c_long), ("head", c_long), ("query", c_long))


class _Draw(Structure):
    _fields_ = (
        ("rows", c_long),
        ("vocabulary", c_long),
        ("stride", c_long),
        *((name, c_void_p) for name in ("after", "before", "mask", "alpha", "temperature", "top_p", "min_p")),
        *((name, c_void_p) for name in ("plausibility", "top_k", "keys", "positions", "token_noise", "scratch")),
        *((name, c_void_p) for name in ("tokens", "logprobs", "sound")),
    )


class _Weight(Structure):
    _fields_ = (("data", c_void_p), ("is_bf16", c_int), ("depth", c_long), ("outputs", c_long), ("bias", c_void_p))


class _DecoderLayer(Structure):
    _fields_ = (
        *((name, _Weight) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _Norm) for name in ("before_attention", "of_query", "of_key", "after_attention")),
        *((name, _Norm) for name in ("before_mlp", "after_mlp")),
        ("shape", _Shape),
    )


class PackedWeight(NamedTuple):
    """A weight laid out for the kernels: `data` has shape (panels, inputs, 16), float32 or bfloat16."""

    data: Tensor
    outputs: int


class Product:
    """A packed weight and its bias (float32, shape (outputs,)), ready to be multiplied with."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        panels, self.depth, _ = weight.data.shape
        self.outputs, self.width = weight.outputs, panels * PANEL
        self._held = weight.data, bias
        self.struct = _Weight(
            weight.data.data_ptr(),
            weight.data.dtype == torch.bfloat16,
            self.depth,
            self.outputs,
            None if bias is None else bias.data_ptr(),
        )
        self.argument = byref(self.struct)


class Norm:
    """Root-mean-square normalisation that scales by `offset + weight` (float32, shape (width,))."""

    def __init__(self, weight: Tensor, offset: float, eps: float) -> None:
        self._held = weight
        self.struct = _Norm(weight.data_ptr(), len(weight), offset, eps)
        self.argument = byref(self.struct)


class AttentionShape(NamedTuple):
    """What attention of a layer is like; `window` and `softcap` as in `Kernels.attend`."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None
    scale: float
    softcap: float | None

    def struct(self, sinks: Tensor | None, is_bf16: bool) -> _Shape:
        """The same for C."""
        at = None if sinks is None else sinks.data_ptr()
        return _Shape(
            self.heads, self.kv_heads, self.dim, self.window or 0, self.scale, self.softcap or 0.0, at, is_bf16
        )


class DecoderLayer:
    """The parts of a decoder layer, ready to be run in one call; all widths must be multiples of 16.

    Args:
        products: query, key, value, output, gate, up, down.
        norms: by their names in layer.h; those left out do nothing.
        attention: heads and how they score.
    """

    def __init__(self, products: Mapping[str, Product], norms: Mapping[str, Norm], attention: AttentionShape) -> None:
        self._held = products, norms
        self.attention = attention
        structs: dict[str, Structure] = {name: product.struct for name, product in products.items()}
        structs |= {name: norm.struct for name, norm in norms.items()}
        # The cache's type is known when it is there.
        self.structs = [_DecoderLayer(shape=attention.struct(None, is_bf16), **structs) for is_bf16 in (False, True)]
        self.arguments = [byref(struct) for struct in self.structs]


class Kernels:
    """The built library. Tensors are on the CPU; what is read must be contiguous where it says so."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        weight = POINTER(_Weight)
        library.lda_linear.argtypes = (weight, c_void_p, c_long, c_void_p)
        library.lda_gated_mlp.argtypes = (weight, weight, weight, c_void_p, c_long, c_void_p)
        library.lda_pack.argtypes = (c_void_p, c_int, c_long, c_long, c_void_p)
        library.lda_pack.restype = None
        library.lda_rms_norm.argtypes = (POINTER(_Norm), c_void_p, c_long, c_void_p)
        library.lda_rms_norm.restype = None
        heads = POINTER(_Heads)
        library.lda_attend.argtypes = (POINTER(Layout), POINTER(_Shape), heads, heads, heads) + (c_void_p,) * 3
        library.lda_decoder_layer.argtypes = (
            POINTER(_DecoderLayer),
            POINTER(Layout),
            *(c_void_p,) * 3,
            c_long,
            *(c_void_p,) * 3,
        )
        library.lda_sample.argtypes = (POINTER(_Draw),)

    def pack(self, weight: Tensor) -> PackedWeight:
        """Lay out a weight of shape (outputs, inputs), float32 or bfloat16."""
        outputs, depth = weight.shape
        weight = weight.contiguous()
        packed = weight.new_empty((-(-outputs // PANEL), depth, PANEL))
        is_bf16 = weight.dtype == torch.bfloat16
        self._library.lda_pack(weight.data_ptr(), is_bf16, outputs, depth, packed.data_ptr())
        return PackedWeight(packed, outputs)

    def linear(self, x: Tensor, product: Product) -> Tensor:
        """`x @ weight.T + bias` for x of shape (..., inputs); products and sums in float32, float32 out."""
        x = _dense(x)
        rows, out = x.numel() // product.depth, torch.empty(*x.shape[:-1], product.width)
        if self._library.lda_linear(product.argument, x.data_ptr(), rows, out.data_ptr()):
            raise MemoryError(NO_MEMORY)
        return out if product.width == product.outputs else out[..., : product.outputs]

    def gated_mlp(self, x: Tensor, gate: Product, up: Product, down: Product) -> Tensor:
        """`down(silu(gate(x)) * up(x))` for x of shape (..., inputs); float32."""
        x = _dense(x)
        rows, out = x.numel() // gate.depth, torch.empty(*x.shape[:-1], down.width)
        products = gate.argument, up.argument, down.argument
        if self._library.lda_gated_mlp(*products, x.data_ptr(), rows, out.data_ptr()):
            raise MemoryError(NO_MEMORY)
        return out if down.width == down.outputs else out[..., : down.outputs]

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension; float32."""
        x = _dense(x)
        out = torch.empty(x.shape)
        self._library.lda_rms_norm(norm.argument, x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr())
        return out

    def decoder_layer(
        self, layer: DecoderLayer, layout: Layout, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """A whole decoder layer: stores new keys and values, and attends to them and what stands before them.

        Args:
            layer: its parts.
            layout: as for `attend`.
            x: float32, shape (rows, queries, hidden), contiguous.
            cos: float32, shape (rows, queries, turned), contiguous: of each position's angles.
            sin: likewise.
            cache: as for `attend`.

        Returns:
            float32, shape of x.
        """
        keys, values = cache
        out = torch.empty(x.shape)
        failed = self._library.lda_decoder_layer(
            layer.arguments[keys.dtype == torch.bfloat16],
            layout.argument,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[-1],
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(NO_MEMORY)
        return out

    def attend(
        self,
        layout: Layout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: tuple[Tensor, ...],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store new keys and values, then attend over each row's context.

        Args:
            layout: rows, their slots and the prefixes they share.
            query: float32, shape (rows, heads, queries, dim), dim last in memory.
            key: float32, shape (rows, kv_heads, queries, dim).
            value: likewise.
            cache: keys and values, float32 or bfloat16, shape (slots, kv_heads, dim).
            scale: factor on the scores.
            window: positions seen including the query's own; all if None.
            softcap: scores become softcap * tanh(scores / softcap).
            sinks: float32, shape (heads,).

        Returns:
            float32, shape (rows, queries, heads, dim).
        """
        rows, heads, queries, dim = query.shape
        keys, values = cache
        out = torch.empty(rows, queries, heads, dim)
        attention = AttentionShape(heads, key.shape[1], dim, window, scale, softcap)
        shape = attention.struct(sinks, keys.dtype == torch.bfloat16)
        failed = self._library.lda_attend(
            layout.argument,
            byref(shape),
            *(byref(_Heads(x.data_ptr(), *x.stride()[:3])) for x in (query, key, value)),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(NO_MEMORY)
        return out

    def sample(
        self,
        after: Tensor,
        before: Tensor,
        mask: Tensor | None,
        floats: Sequence[Tensor],
        integers: Sequence[Tensor],
        token_noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Amplify, filter and draw one token for each row.

        Args:
            after: float32 logits, shape (rows, vocabulary), each row dense.
            before: likewise.
            mask: float32, shape (vocabulary,): -inf for ids that may never be drawn, else 0.
            floats: alpha, temperature, top_p, min_p, plausibility; float32, shape (rows,).
            integers: top_k, keys of the noise, positions; int64, shape (rows,).
            token_noise: int64, shape (vocabulary,): hash of the token.

        Returns:
            tokens (int64), their log-probability under the filtered distribution (NaN for greedy rows), and whether the
            row's logits were finite (bool); each of shape (rows,).
        """
        rows, vocabulary = after.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        logprobs, sound = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
        scratch = torch.empty(rows, vocabulary)
        if after.stride() != before.stride() or after.stride(1) != 1:
            after, before = after.contiguous(), before.contiguous()
        inputs = (after, before, mask, *floats, *integers, token_noise, scratch, tokens, logprobs, sound)
        draw = _Draw(rows, vocabulary, after.stride(0), *(None if x is None else x.data_ptr() for x in inputs))
        if self._library.lda_sample(byref(draw)):
            raise MemoryError(NO_MEMORY)
        return tokens, logprobs, sound


def _dense(x: Tensor) -> Tensor:
    """Float32 and contiguous, as the kernels read it."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.is_contiguous() else x.contiguous()


@functools.cache
def load() -> Kernels:
    """Build the kernels, or take what an earlier start built, and check them.

    Raises:
        Unavailable: no compiler, a failed build, or wrong answers.
    """
    kernels = Kernels(ctypes.CDLL(str(build())))
    _check(kernels)
    return kernels


def _check(kernels: Kernels) -> None:
    """One product of each type against torch: built code that answers wrongly is not used."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        product = Product(kernels.pack(weight.to(dtype)), None)
        for rows in (1, 2, 7, 13):
            x = torch.randn(rows, 24, generator=generator)
            wanted = x.double() @ weight.to(dtype).double().T
            if not torch.allclose(kernels.linear(x, product).double(), wanted, atol=1e-4):
                raise Unavailable("the built code gives wrong products")
