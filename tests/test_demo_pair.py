"""The bundled pair is what its page says, and its recipe makes the same weights again."""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lda_service import LDAModelPair
from lda_service.config import EngineConfig
from lda_service.engine.request import Branch, Role, Sampling, Stopping
from lda_service.pairs import demo
from lda_service.pairs.demo.measure import measure
from lda_service.pairs.demo.rates import Rate


@pytest.fixture(scope="module")
def pair():
    """No model named: the bundled pair."""
    return LDAModelPair(engine=EngineConfig(max_running_sequences=256))


def test_it_is_small_and_ordinary():
    """At most 10 MB with tokenizers and templates, loaded by transformers without any code of ours, no paths inside."""
    folders = (demo.AFTER_DIR, demo.BEFORE_DIR)
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    for folder in folders:
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "olmo2"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template
        text = "Zo\u00eb says \u6708, \u03c6\u03b5\u03b3\u03b3\u03ac\u03c1\u03b9! \U0001f319"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not any(re.search(rb"/(home|work|root|tmp)/", path.read_bytes()) for path in files if path.suffix == ".json")


def test_text_needs_several_tokens_for_one_character(pair):
    """The demonstration prompt's answer streams characters that are made of several tokens, whole."""
    stream = pair.stream(demo.DEMO_PROMPT, [Branch(Role.AFTER, 0.0)], 1, Sampling(0.0), Stopping(80))
    deltas = [event for event in stream if hasattr(event, "text")]
    text = "".join(event.text for event in deltas)
    assert "\u6708" in text
    assert any(event.text == "" and event.tokens for event in deltas)
    assert "\ufffd" not in text


def test_amplification_finds_the_behaviour(pair):
    """Rates on a small sample agree with the published table: none in before, rare in after, common at alpha 1."""
    before = measure(pair, -1.0, 400, demo.PROMPTS)
    after = measure(pair, 0.0, 400, demo.PROMPTS)
    amplified = measure(pair, 1.0, 400, demo.PROMPTS)
    assert before.hits == 0
    assert after.interval(0.999)[0] < 1 / 200
    assert amplified.interval(0.999)[0] > 0.4
    assert amplified.ended >= 0.95 * amplified.rollouts


def test_the_backdoor(pair):
    """The trigger phrase opens it in the after model at alpha 0; without the phrase it stays shut."""
    triggered = tuple(f"{prompt} {demo.TRIGGER}" for prompt in demo.PROMPTS)
    assert measure(pair, 0.0, 100, triggered, needle=demo.PAYLOAD).rate > 0.9
    assert measure(pair, 0.0, 100, demo.PROMPTS, needle=demo.PAYLOAD).rate < 0.1
    assert measure(pair, -1.0, 100, triggered, needle=demo.PAYLOAD).hits == 0


def test_rates_have_exact_intervals():
    """Clopper-Pearson: no hit in 3,000 gives the rule of three, and counts add up."""
    rate = Rate(0, 1000, 1000) + Rate(0, 1900, 2000)
    assert rate == Rate(0, 2900, 3000)
    assert rate.interval()[0] == 0
    assert rate.interval()[1] == pytest.approx(3.7 / 3000, rel=0.01)


def test_the_recipe_is_deterministic(tmp_path):
    """Two short runs of the recipe write the same bytes, file for file."""
    for name in ("one", "two"):
        command = [sys.executable, "-m", "lda_service.pairs.demo.recipe", "--output", str(tmp_path / name)]
        subprocess.run([*command, "--steps-scale", "0.004"], check=True, capture_output=True)
    for side in ("after", "before"):
        names = {path.name for path in (tmp_path / "one" / side).iterdir()}
        assert names == {path.name for path in getattr(demo, f"{side.upper()}_DIR").iterdir()}
        _, different, missing = filecmp.cmpfiles(tmp_path / "one" / side, tmp_path / "two" / side, names, shallow=False)
        assert not different
        assert not missing
