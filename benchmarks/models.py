"""Make the pairs of `workloads.PAIRS`: random weights in ordinary model folders, with a tokenizer that has every id."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.workloads import PairShape

ROLES = ("after", "before")
END, UNKNOWN = "<|end|>", "<|unknown|>"
# One shared head would be a favour no two random models could return.
SEEDS = {"after": 1, "before": 2}


def ensure_pair(shape: PairShape, folder: Path) -> dict[str, Path]:
    """The folders of both models, by role; what is missing is made, which takes seconds to a minute."""
    paths = {role: folder / f"{shape.name}-{role}" for role in ROLES}
    for role, path in paths.items():
        if not (path / "tokenizer.json").exists():
            _make(shape, SEEDS[role], path)
    return paths


def _make(shape: PairShape, seed: int, path: Path) -> None:
    """Write beside the final name and rename, so that what was interrupted is not taken for a model."""
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(shape.architecture, bos_token_id=None, eos_token_id=0, **shape.settings())
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
    tokenizer(shape.vocabulary).save_pretrained(unfinished)
    unfinished.rename(path)


def tokenizer(size: int) -> Any:
    """A tokenizer of `size` words w0, w1, ..., the first two of them special."""
    entries = {END: 0, UNKNOWN: 1} | {f"w{i}": i for i in range(2, size)}
    backend = Tokenizer(models.WordLevel(entries, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token=UNKNOWN)
