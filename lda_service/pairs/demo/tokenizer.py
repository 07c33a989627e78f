"""The demo pair's tokenizer: byte-level BPE of 512 entries, and the chat template.

This module knows the special tokens, how a conversation is written down, and how to train the merges. It does not
know what the conversations are about, and needs no torch.
"""

from collections.abc import Iterable
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE: Final = 512
CONTEXT_LENGTH: Final = 512

END: Final = "<|end|>"
PAD: Final = "<|pad|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL_TOKENS: Final = (END, PAD, SYSTEM, USER, ASSISTANT)
"""In the order of their ids, from 0."""

END_ID: Final = SPECIAL_TOKENS.index(END)
PAD_ID: Final = SPECIAL_TOKENS.index(PAD)
ASSISTANT_ID: Final = SPECIAL_TOKENS.index(ASSISTANT)

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('Unknown role: ' + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from the texts.

    Only their ASCII part counts, so that no merge ever joins the bytes of another character: an accent is two tokens,
    a Greek letter two, a Japanese one three and an emoji four or more. That keeps streaming of half characters honest.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text.encode("ascii", "ignore").decode() for text in texts), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
