"""Prompts to token ids."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import CHATML, byte_level

from lda_service.errors import InvalidRequest, ModelNotFound, ModelUnreadable, NoChatTemplate, PromptUnusable
from lda_service.prompting import TEMPLATE_SENTENCE_CHARS_MAX, PromptRenderer

WITH_BOS = "{{ bos_token }}" + CHATML


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that adds nothing, with a chat template."""
    return byte_level(chat_template=CHATML)


@pytest.fixture(scope="module")
def with_bos():
    """A tokenizer that puts a beginning-of-sequence id, and a template that writes one."""
    return byte_level(chat_template=WITH_BOS, adds_bos=True)


def refusing(sentence: str) -> PromptRenderer:
    """A template that refuses every conversation with this sentence."""
    return PromptRenderer(byte_level(chat_template="{{ raise_exception('" + sentence + "') }}"))


class TestText:
    def test_raw_text_is_encoded_as_it_is(self, tokenizer):
        """Raw text becomes its own tokens and nothing else, if the tokenizer adds nothing."""
        ids = PromptRenderer(tokenizer).text("The quick brown 狐")
        assert tokenizer.decode(ids) == "The quick brown 狐"

    def test_bos_as_the_tokenizer_wants_it(self, with_bos):
        """A tokenizer that puts a beginning-of-sequence id gets one."""
        assert with_bos.decode(PromptRenderer(with_bos).text("dog")) == "<|bos|>dog"

    def test_bos_is_never_doubled(self, with_bos):
        """Text that spells the beginning-of-sequence token itself still starts with one."""
        assert with_bos.decode(PromptRenderer(with_bos).text("<|bos|>dog")) == "<|bos|>dog"

    def test_eos_of_the_tokenizer_is_left_off(self):
        """A tokenizer that closes every text does not close a prompt: there would be nothing to continue."""
        tokenizer = byte_level(adds_bos=True, adds_eos=True)
        assert tokenizer.decode(PromptRenderer(tokenizer).text("dog")) == "<|bos|>dog"

    def test_eos_of_the_caller_stays(self, tokenizer):
        """An end-of-sequence token that the caller wrote is passed on."""
        assert PromptRenderer(tokenizer).text("dog<|eos|>")[-1] == tokenizer.eos_token_id

    def test_no_tokens(self, tokenizer):
        """Text without tokens is refused, and the field named."""
        with pytest.raises(PromptUnusable, match="at least one character") as caught:
            PromptRenderer(tokenizer).text("")
        assert caught.value.field == "prompt.text"

    def test_not_unicode(self, tokenizer):
        """A lone surrogate, as a badly decoded command line holds, is refused by a sentence of ours."""
        with pytest.raises(PromptUnusable, match="UTF-8"):
            PromptRenderer(tokenizer).text("caf\udce9")


class TestChat:
    def test_opens_the_assistants_turn(self, tokenizer):
        """A conversation is rendered by the template and ends where the assistant begins to speak."""
        ids = PromptRenderer(tokenizer).chat([("system", "short"), ("user", "fox?")])
        assert tokenizer.decode(ids) == (
            "<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_template_tokens_are_special_ids(self, tokenizer):
        """The markers of the template become their own ids, not letters."""
        ids = PromptRenderer(tokenizer).chat([("user", "fox?")])
        assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")

    def test_continues_the_last_turn(self, tokenizer):
        """A prefilled answer stays open: nothing follows its last word."""
        ids = PromptRenderer(tokenizer).chat([("user", "fox?"), ("assistant", "The quick")], True)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nThe quick")

    def test_bos_is_never_doubled(self, with_bos):
        """A template that writes the beginning-of-sequence token meets a tokenizer that adds it: one remains."""
        ids = PromptRenderer(with_bos).chat([("user", "fox?")])
        assert with_bos.decode(ids).count("<|bos|>") == 1
        assert ids[0] == with_bos.bos_token_id

    def test_bos_doubled_by_the_template(self):
        """A template that writes the beginning-of-sequence token twice is corrected too."""
        tokenizer = byte_level(chat_template="{{ bos_token }}" + WITH_BOS)
        assert tokenizer.decode(PromptRenderer(tokenizer).chat([("user", "x")])).count("<|bos|>") == 1

    def test_no_template(self):
        """A chat without a template is refused, and both ways out are named."""
        renderer = PromptRenderer(byte_level())
        assert not renderer.has_chat_template
        with pytest.raises(NoChatTemplate, match="send raw text, or use a pair"):
            renderer.chat([("user", "fox?")])

    @pytest.mark.parametrize(("templates", "has_one"), [({"default": CHATML}, True), ({"rag": CHATML}, False)])
    def test_named_templates(self, templates, has_one):
        """Of several named templates the default one counts."""
        assert PromptRenderer(byte_level(chat_template=templates)).has_chat_template is has_one

    def test_no_messages(self, tokenizer):
        """An empty conversation is refused by its field."""
        with pytest.raises(InvalidRequest, match="at least one message") as caught:
            PromptRenderer(tokenizer).chat([])
        assert caught.value.field == "prompt.chat.messages"

    def test_the_templates_own_sentence(self):
        """What the template says through `raise_exception` reaches the caller, with the field."""
        with pytest.raises(InvalidRequest, match=r"refuses this conversation: System role not supported$") as caught:
            refusing("System role not supported").chat([("system", "x")])
        assert caught.value.field == "prompt.chat"

    def test_long_sentences_are_shortened(self):
        """A template's essay is cut."""
        with pytest.raises(InvalidRequest) as caught:
            refusing("no " * 1000).chat([("user", "x")])
        assert len(caught.value.message) < TEMPLATE_SENTENCE_CHARS_MAX + 60

    @pytest.mark.parametrize("template", ["{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{% if %}", "{{ 'a' + 1 }}"])
    def test_other_faults_of_a_template_stay_in_the_log(self, template):
        """Jinja's and Python's own errors are not shown; the remedy is."""
        with pytest.raises(InvalidRequest, match="send raw text") as caught:
            PromptRenderer(byte_level(chat_template=template)).chat([("user", "x")])
        assert str(caught.value.__cause__) not in caught.value.message

    def test_template_that_drops_the_last_message(self):
        """A turn that the template does not show cannot be continued, and the sentence says so."""
        template = "{% for message in messages[:-1] %}{{ message.content }}{% endfor %}"
        with pytest.raises(InvalidRequest, match="cannot be continued"):
            PromptRenderer(byte_level(chat_template=template)).chat([("user", "x"), ("assistant", "y")], True)

    def test_template_that_renders_nothing(self):
        """A conversation that renders to no tokens is refused by its field."""
        with pytest.raises(PromptUnusable) as caught:
            PromptRenderer(byte_level(chat_template="{% if false %}x{% endif %}")).chat([("user", "x")])
        assert caught.value.field == "prompt.chat"


class TestPrompt:
    def test_one_user_turn(self, tokenizer):
        """A plain prompt is one user turn where there is a template."""
        renderer = PromptRenderer(tokenizer)
        assert renderer.prompt("fox?") == renderer.chat([("user", "fox?")])

    def test_system_message(self, tokenizer):
        """A system message goes first."""
        renderer = PromptRenderer(tokenizer)
        assert renderer.prompt("fox?", system="short") == renderer.chat([("system", "short"), ("user", "fox?")])

    def test_raw(self, tokenizer):
        """Raw means no template, even where there is one."""
        renderer = PromptRenderer(tokenizer)
        assert renderer.prompt("fox?", raw=True) == renderer.text("fox?")

    def test_without_template(self):
        """Without a template the prompt is raw text."""
        renderer = PromptRenderer(byte_level())
        assert renderer.prompt("fox?") == renderer.text("fox?")

    def test_system_message_without_template(self):
        """A system message is never dropped in silence."""
        with pytest.raises(NoChatTemplate):
            PromptRenderer(byte_level()).prompt("fox?", system="short")

    def test_system_message_with_raw(self, tokenizer):
        """A system message and raw text exclude each other."""
        with pytest.raises(InvalidRequest, match="drop"):
            PromptRenderer(tokenizer).prompt("fox?", raw=True, system="short")


class TestLoad:
    def test_from_a_folder(self, tokenizer, tmp_path):
        """A saved tokenizer is read back with its template."""
        tokenizer.save_pretrained(tmp_path)
        renderer = PromptRenderer.load(str(tmp_path))
        assert renderer.prompt("fox?") == PromptRenderer(tokenizer).prompt("fox?")

    def test_nothing_there(self, tmp_path):
        """A path that does not exist is not found."""
        with pytest.raises(ModelNotFound, match="local folder"):
            PromptRenderer.load(str(tmp_path / "missing"))

    def test_folder_without_tokenizer(self, tmp_path):
        """A folder that holds no tokenizer is unreadable, and the missing file is named."""
        with pytest.raises(ModelUnreadable, match=r"tokenizer\.json"):
            PromptRenderer.load(str(tmp_path))
