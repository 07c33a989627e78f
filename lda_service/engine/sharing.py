"""Equal tensors of two models, stored once.

Post-training often leaves parts of a model as they were (a frozen embedding, an output layer, all of it under an
adapter). Knows modules and their tensors; nothing of pairs, names of models or what the tensors are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 22
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def share_equal_tensors(keeper: nn.Module, other: nn.Module) -> int:
    """Replace `other`'s parameters and buffers by `keeper`'s of the same name wherever they are equal bit by bit.

    Returns:
        bytes that are no longer stored.
    """
    before = stored_bytes(keeper, other)
    kept = {(path, name): held[name] for path, held in _holders(keeper) for name in held}
    for path, held in _holders(other):
        for name, tensor in held.items():
            twin = kept.get((path, name))
            if tensor is not None and twin is not None and bit_equal(tensor, twin):
                held[name] = twin
    return before - stored_bytes(keeper, other)


def stored_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    storages = {}
    for module in modules:
        for _, held in _holders(module):
            for tensor in held.values():
                for part in [] if tensor is None else _parts(tensor):
                    storage = part.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape, type of element, device and bits; ends at the first difference."""
    if one is other:
        return True
    if type(one) is not type(other) or one.shape != other.shape:
        return False
    return all(_plain_equal(*pair) for pair in zip(_parts(one), _parts(other), strict=True))


def _plain_equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    bits = BITS.get(one.dtype.itemsize)
    if bits is not None:
        one, other = one.view(bits), other.view(bits)
    if one.ndim == 0 or one.numel() <= CHUNK_ELEMENTS:
        return torch.equal(one, other)
    rows = max(1, CHUNK_ELEMENTS * len(one) // one.numel())
    return all(torch.equal(*pair) for pair in zip(torch.split(one, rows), torch.split(other, rows), strict=True))


def _holders(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary of parameters or buffers in the module, with the path of its owner."""
    for path, child in module.named_modules():
        yield path, child._parameters
        yield path, child._buffers


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors a tensor consists of: a quantised one has several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
