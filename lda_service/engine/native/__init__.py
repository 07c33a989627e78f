"""Inner loops of decoding on a CPU, written in C and built at the first start by the machine's own compiler.

Knows the C functions beside this file and how to build them; nothing of models or requests. Without a compiler, or if
the built code answers wrongly, `load` says why and the engine runs on torch's operators.

All kernels compute in float32, and a row's result does not depend on how many rows stand beside it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

logger = logging.getLogger(__name__)

PANEL = 16
MAX_HEAD_DIM = 256
SHARED_ROWS = 4  # rows of a prompt from which turning its keys for all of them pays
SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_S = 120
NO_MEMORY = "no memory for a kernel's work space"


class Unavailable(Exception):
    """The kernels cannot be used here; the message says why."""


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
        self.argument = byref(
            _Weight(
                weight.data.data_ptr(),
                weight.data.dtype == torch.bfloat16,
                self.depth,
                self.outputs,
                None if bias is None else bias.data_ptr(),
            )
        )


class Kernels:
    """The built library. Tensors are on the CPU; what is read must be contiguous where it says so."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        weight = POINTER(_Weight)
        library.lda_linear.argtypes = (weight, c_void_p, c_long, c_void_p)
        library.lda_gated_mlp.argtypes = (weight, weight, weight, c_void_p, c_long, c_void_p)
        library.lda_pack.argtypes = (c_void_p, c_int, c_long, c_long, c_void_p)
        library.lda_pack.restype = None
        library.lda_rms_norm.argtypes = (c_void_p, c_long, c_long, c_void_p, c_float, c_float, c_void_p)
        library.lda_rms_norm.restype = None
        heads = POINTER(_Heads)
        library.lda_attend.argtypes = (POINTER(Layout), POINTER(_Shape), heads, heads, heads) + (c_void_p,) * 3
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

    def rms_norm(self, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension; float32."""
        x = _dense(x)
        out = torch.empty(x.shape)
        width = x.shape[-1]
        self._library.lda_rms_norm(
            x.data_ptr(), x.numel() // width, width, weight.data_ptr(), offset, eps, out.data_ptr()
        )
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
        shape = _Shape(
            heads,
            key.shape[1],
            dim,
            window or 0,
            scale,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            keys.dtype == torch.bfloat16,
        )
        failed = self._library.lda_attend(
            byref(layout),
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
    kernels = Kernels(ctypes.CDLL(str(_build())))
    _check(kernels)
    return kernels


def _build() -> Path:
    compiler = _compiler()
    target = _run([compiler, "-march=native", "-E", "-dM", "-x", "c", os.devnull])
    digest = hashlib.sha256(" ".join(FLAGS).encode() + target)
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    folder = _cache_folder()
    library = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, "kernels.so")
            _run([compiler, *FLAGS, "-o", str(built), str(SOURCES / "kernels.c"), "-lm"])
            built.replace(library)
    return library


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable("this machine has no C compiler (cc, gcc or clang)")


def _cache_folder() -> Path:
    """Where built code is kept for the next start."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (Path(base, "lda-service"), Path(tempfile.gettempdir(), f"lda-service-{os.getuid()}")):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable("no folder to keep the built code in can be written")


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error


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
