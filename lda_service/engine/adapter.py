"""PEFT LoRA adapters on disk or on the hub: their configuration and weights, as far as this engine applies them.

What cannot be applied beside an untouched base model (DoRA, trained biases or embeddings, changed base weights) is
refused by name. Knows PEFT's file format; nothing of modules. PEFT itself is not needed: what is used of its format is
one table of names and one formula.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lda_service.errors import ConfigError, ModelUnreadable, ModelUnsupported

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
APPLIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
WITHOUT_EFFECT = {  # on a trained adapter whose weights name their layers
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
BASE_UNTOUCHED = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: for each layer's path its A (rank, in) and its B (out, rank), the scale already in B.

    `revision` is a digest of weights and configuration.
    """

    model_id: str
    base_id: str
    revision: str
    weights: dict[str, tuple[Tensor, Tensor]]


def find_config(model_id: str) -> Path | None:
    """The adapter configuration of a folder or hub repository; None if it is not an adapter."""
    try:
        path = find_adapter_config_file(model_id)
    except (OSError, ValueError):  # not the name of anything: whoever loads it as a model will say so
        return None
    return None if path is None else Path(path)


def read_adapter(model_id: str, config_path: Path) -> Adapter:
    """Read an adapter.

    Raises:
        ModelUnreadable: its files are missing or broken.
        ModelUnsupported: it is more than a LoRA beside the base model's linear layers.
    """
    try:
        config = json.loads(config_path.read_text())
        weights_path = Path(str(cached_file(model_id, WEIGHTS)))
        tensors = load_file(weights_path)
    except (OSError, ValueError, SafetensorError) as error:
        message = f"Adapter {model_id!r} cannot be read; it needs a sound adapter_config.json and {WEIGHTS}."
        raise ModelUnreadable(message) from error
    _refuse_more_than_lora(model_id, config)
    weights = {path: _scaled(path, config, *pair) for path, pair in _matrices(model_id, tensors).items()}
    digest = hashlib.sha256(config_path.read_bytes() + weights_path.read_bytes()).hexdigest()[:16]
    return Adapter(model_id, str(config.get("base_model_name_or_path")), digest, weights)


def brings_tokenizer(model_id: str) -> bool:
    """Whether a tokenizer was saved with the adapter."""
    try:
        found = cached_file(model_id, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return False
    return found is not None


def require_base(adapter: Adapter, before_id: str) -> None:
    """Check that the before model is the one that the adapter was trained on.

    Raises:
        ConfigError: it is another one.
    """
    names = (adapter.base_id, before_id)
    folders = [Path(name).resolve() for name in names if Path(name).is_dir()]
    if names[0] != names[1] and not (len(folders) == 2 and folders[0] == folders[1]):
        raise ConfigError(
            f"MODEL_AFTER_ID {adapter.model_id!r} is an adapter over {adapter.base_id!r}, but MODEL_BEFORE_ID is "
            f"{before_id!r}. Set MODEL_BEFORE_ID={adapter.base_id}; if the two are the same model under two names, "
            "write the one you use as base_model_name_or_path into adapter_config.json. To compare the adapted model "
            "with another one, merge the adapter first (PEFT's merge_and_unload) and give the folder of the result."
        )


def _refuse_more_than_lora(model_id: str, config: dict[str, Any]) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    extra = [f"{name}={value!r}" for name, value in config.items() if _has_effect(name, value)]
    if kind != "LORA":
        extra.insert(0, f"peft_type={kind!r}")
    if not any(start is value or (start == value and isinstance(start, str)) for value in BASE_UNTOUCHED):
        extra.append(f"init_lora_weights={start!r}")
    if extra:
        raise _unsupported(model_id, f"is more than a plain LoRA ({', '.join(extra)})")


def _has_effect(name: str, value: Any) -> bool:
    if name in APPLIED or name in WITHOUT_EFFECT or name == "init_lora_weights":
        return False
    return value != "none" if name == "bias" else bool(value)


def _matrices(model_id: str, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the path of their layer."""
    a, b = (
        {key.removeprefix(PREFIX).removesuffix(end): x for key, x in tensors.items() if key.endswith(end)}
        for end in (".lora_A.weight", ".lora_B.weight")
    )
    if not a or a.keys() != b.keys() or len(a) + len(b) != len(tensors):
        raise _unsupported(model_id, "holds other weights than pairs of lora_A and lora_B")
    return {path: (a[path], b[path]) for path in a}


def _scaled(path: str, config: dict[str, Any], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the scale into B: lora_alpha / rank, or / its square root for rank-stabilised adapters."""
    alpha, rank = config["lora_alpha"], len(a)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = own
            break
    return a, b.float() * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _unsupported(model_id: str, what: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"Adapter {model_id!r} {what}, which cannot be applied beside the base model; merge it first (PEFT's "
        "merge_and_unload) and give the folder of the merged model as MODEL_AFTER_ID."
    )
