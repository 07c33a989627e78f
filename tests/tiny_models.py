"""Small random checkpoints of many architectures, saved as ordinary Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
ARCHITECTURES: dict[str, dict] = {
    "llama": dict(SIZES),
    "olmo2": dict(SIZES),
    "qwen3": dict(SIZES, head_dim=8),
    "qwen2": dict(SIZES),
    "mistral": dict(SIZES, sliding_window=6),
    "gemma2": dict(SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": dict(SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "phi3": dict(SIZES, pad_token_id=0, sliding_window=9),
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "olmoe": dict(SIZES, num_experts=4, num_experts_per_tok=2),
    "mixtral": dict(SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
}
WITHOUT_SEAM: dict[str, dict] = {  # attention that cannot be replaced, or state besides keys and values
    "lfm2": dict(SIZES, layer_types=["conv", "full_attention"]),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": dict(
        SIZES,
        num_hidden_layers=3,
        lru_width=32,
        head_dim=8,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "zamba2": dict(
        SIZES,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=2,
        n_mamba_heads=4,
        mamba_headdim=16,
        chunk_size=4,
        num_mem_blocks=1,
    ),
    "bamba": dict(
        SIZES,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=4,
    ),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=128),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
}
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer(extra: tuple[str, ...] = (), template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one entry per byte, four special tokens and `extra` ones; 260 entries and more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[3])
    tokenizer.add_tokens([*SPECIAL, *extra], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def save_model(
    folder: Path,
    architecture: str = "llama",
    seed: int = 0,
    vocab_size: int = 288,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """Save a random model whose logits differ clearly between tokens; returns the folder."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    ids = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    settings = {
        **(ARCHITECTURES | WITHOUT_SEAM).get(architecture, {}),
        **ids,
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
        **changes,
    }
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
