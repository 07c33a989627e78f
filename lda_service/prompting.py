"""Prompts to token ids, with the after model's tokenizer and chat template; both models read the same ids.

Knows Hugging Face tokenizers and Jinja's errors. Knows neither torch nor context lengths, nor which ids the two
vocabularies share.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lda_service.errors import (
    InvalidRequest,
    LdaError,
    ModelNotFound,
    ModelUnreadable,
    NoChatTemplate,
    PromptUnusable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATE_SENTENCE_CHARS_MAX = 200


class PromptRenderer:
    """Renders what a caller sends to the ids both models are fed.

    Args:
        tokenizer: the after model's Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, model_id: str) -> PromptRenderer:
        """Read the tokenizer of a local folder or of a repository.

        Raises:
            ModelNotFound: the id names nothing that can be reached.
            ModelUnreadable: the folder or repository has no tokenizer that can be read.
        """
        from transformers import AutoTokenizer  # seconds of import that only this method needs

        try:
            return cls(AutoTokenizer.from_pretrained(model_id, trust_remote_code=False))
        except Exception as error:
            raise _load_error(model_id, error) from error

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be rendered."""
        template = self._tokenizer.chat_template
        return "default" in template if isinstance(template, dict) else bool(template)

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of raw text, with a beginning-of-sequence id if the tokenizer puts one, but never two.

        Raises:
            PromptUnusable: the text has no tokens.
        """
        ids = self._without_final_eos(text, self._ids(text, add_special_tokens=True))
        return self._checked(ids, "prompt.text")

    def continuation(self, text: str) -> tuple[int, ...]:
        """Ids of text that follows a prompt: no special tokens are put around it.

        Raises:
            PromptUnusable: the text has no tokens.
        """
        return self._checked(self._ids(text, add_special_tokens=False), "continuation.text")

    def chat(self, messages: Sequence[tuple[str, str]], continue_final_message: bool = False) -> tuple[int, ...]:
        """Ids of a conversation under the after model's chat template.

        Args:
            messages: turns of (role, content), oldest first.
            continue_final_message: leave the last turn open instead of opening the assistant's.

        Raises:
            NoChatTemplate: the after model has none.
            InvalidRequest: the template refuses these turns.
            PromptUnusable: the last message is empty, or the conversation renders to no tokens.
        """
        if not self.has_chat_template:
            raise NoChatTemplate(
                "The after model has no chat template, so a conversation cannot be rendered: "
                "send raw text, or use a pair whose after model has a template.",
                field="prompt.chat",
            )
        if not messages:
            raise InvalidRequest("The conversation is empty: send at least one message.", field="prompt.chat.messages")
        if not messages[-1][1]:
            # A template would make tokens of it all the same, and a mistake of the caller would get an answer.
            raise PromptUnusable("The last message is empty: send at least one character of text.", field="prompt.chat")
        rendered = self._rendered(messages, continue_final_message)
        # The template writes the special tokens itself.
        return self._checked(self._ids(rendered, add_special_tokens=False), "prompt.chat")

    def prompt(self, prompt: str, raw: bool = False, system: str | None = None) -> tuple[int, ...]:
        """Ids of a plain prompt: one user turn if there is a chat template, else, or if `raw`, the text itself.

        Raises:
            InvalidRequest: a system message was given together with `raw`, or the template refuses it.
            NoChatTemplate: a system message was given, and the after model has no template.
            PromptUnusable: the prompt renders to no tokens.
        """
        if raw and system is not None:
            raise InvalidRequest("Raw text has no system message: drop `system` or drop `raw`.", field="system")
        if system is None and (raw or not self.has_chat_template):
            return self.text(prompt)
        turns = [] if system is None else [("system", system)]
        return self.chat([*turns, ("user", prompt)])

    def rendered(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation as the chat template writes it; for the exceptions see `chat`."""
        return self._rendered(messages, continue_final_message=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _rendered(self, messages: Sequence[tuple[str, str]], continue_final_message: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # a template is a program by somebody else and may raise anything
            raise _template_error(error, continue_final_message) from error
        return str(rendered)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise PromptUnusable("The prompt is not valid Unicode text: send it as UTF-8.", field="prompt")
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
        return list(encoded["input_ids"])

    def _without_final_eos(self, text: str, ids: list[int]) -> list[int]:
        """Some tokenizers close every text, which leaves nothing to continue; an id the text itself spells stays."""
        if len(ids) < 2 or ids[-1] != self._tokenizer.eos_token_id:
            return ids
        bare = self._ids(text, add_special_tokens=False)
        return ids if bare[-1:] == ids[-1:] else ids[:-1]

    def _checked(self, ids: list[int], field: str) -> tuple[int, ...]:
        """Text that spells the beginning-of-sequence token meets a tokenizer that adds it: keep one."""
        bos = self._tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not ids:
            raise PromptUnusable("The prompt renders to no tokens: send at least one character of text.", field=field)
        return tuple(ids)


def _template_error(error: Exception, continue_final_message: bool) -> InvalidRequest:
    """The template's own sentence if it chose one; transformers gives `raise_exception` the base class exactly."""
    if type(error) is TemplateError and error.message:
        sentence = textwrap.shorten(error.message, TEMPLATE_SENTENCE_CHARS_MAX, placeholder=" ...")
        return InvalidRequest(f"The chat template refuses this conversation: {sentence}", field="prompt.chat")
    if continue_final_message and isinstance(error, ValueError):
        return InvalidRequest(
            "The chat template drops or changes the last message, so it cannot be continued: "
            "send it without `continue_final_message`, or send raw text.",
            field="prompt.chat",
        )
    return InvalidRequest(
        "The chat template cannot render this conversation: check its roles and their order, or send raw text.",
        field="prompt.chat",
    )


def _load_error(model_id: str, error: Exception) -> LdaError:
    if isinstance(error, OSError) and not Path(model_id).exists():
        return ModelNotFound(
            f"No model {model_id!r} was found: name a local folder or a repository that can be reached."
        )
    return ModelUnreadable(
        f"The tokenizer of {model_id!r} cannot be read: it needs a readable tokenizer.json next to the weights."
    )
