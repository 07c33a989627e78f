"""Small tokenizers of each kind the service meets, trained or spelled out in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MIXED_SCRIPTS = (
    "The quick brown fox jumps over the lazy dog, then stops.",
    "Größe, naïveté, façade: où est la bibliothèque?",
    "Съешь же ещё этих мягких французских булок.",
    "日本語の文章と漢字、そして中文的句子。",
    "مرحبا بالعالم والسلام عليكم",
    "emoji 👩‍👩‍👧 and 🇫🇷 and 🎉🎉 stay whole\n\n\ttabs",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    texts: Iterable[str] = MIXED_SCRIPTS,
    vocab_size: int = 400,
    special: tuple[str, ...] = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"),
    added: tuple[str, ...] = (),
    chat_template: str | None = None,
    adds_bos: bool = False,
    adds_eos: bool = False,
) -> Any:
    """GPT-2's kind: any bytes can be spelled; `special` tokens come first, `added` ones last."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if adds_bos or adds_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=("<|bos|> " if adds_bos else "") + "$A" + (" <|eos|>" if adds_eos else ""),
            special_tokens=[(token, backend.token_to_id(token)) for token in ("<|bos|>", "<|eos|>")],
        )
    return _wrapped(backend, special, added, chat_template)


def sentencepiece_like(texts: Iterable[str] = MIXED_SCRIPTS, added: tuple[str, ...] = ()) -> Any:
    """Llama 2's and Gemma's kind: `▁` for a space, and an entry for each byte where nothing else fits."""
    special = ("<unk>", "<s>", "</s>")
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Training has to mark the byte entries special to reserve their ids; real vocabularies do not.
    model = models.BPE(vocab=backend.get_vocab(), merges=[], unk_token="<unk>", byte_fallback=True)
    rebuilt = Tokenizer(model)
    rebuilt.pre_tokenizer, rebuilt.decoder = backend.pre_tokenizer, backend.decoder
    return _wrapped(rebuilt, special, added, None)


def spelled_out(
    entries: dict[str, int],
    special: tuple[str, ...] = (),
    added: tuple[str, ...] = (),
    chat_template: str | None = None,
    **roles: str,
) -> Any:
    """A vocabulary given entry by entry, for questions about ids alone; `roles` are such as `eos_token="</s>"`."""
    backend = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    return _wrapped(backend, special, added, chat_template, **roles)


def _wrapped(
    backend: Tokenizer, special: tuple[str, ...], added: tuple[str, ...], chat_template: str | None, **roles: str
) -> Any:
    known = {"<|bos|>": "bos_token", "<|eos|>": "eos_token", "<s>": "bos_token", "</s>": "eos_token"}
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    named = {known[token]: token for token in special if token in known}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **(named | roles))
    tokenizer.chat_template = chat_template
    return tokenizer
