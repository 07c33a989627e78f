"""What completions and scored texts show in a notebook."""

import html
import re

import pytest
from lda_client import LdaClient
from lda_client._html import tint
from lda_client.testing import FakeServer, token


@pytest.fixture
def server():
    """A server that answers as it is told."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server):
    """A client of that server."""
    with LdaClient(server.target) as opened:
        yield opened


def text_of(markup):
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_tokens_are_tinted_by_the_difference(server, client):
    """Likelier after is orange, likelier before is blue, and equal is not tinted; a legend says so."""
    server.answer = [token("a", after=-1, before=-3), token("b", after=-3, before=-1), token("c")]
    shown = client.complete("Hi", raw=True)[0]._repr_html_()
    tints = re.findall(r'background: ([^;]+); border-radius: 3px" title="[^"]*">([abc])<', shown)
    assert tints == [("rgba(235, 110, 20, 0.28)", "a"), ("rgba(45, 125, 245, 0.28)", "b"), ("transparent", "c")]
    assert "log p after - log p before, in nats" in text_of(shown)


def test_tints_are_bounded():
    """However far the models are apart, text stays readable; what cannot be compared is not tinted."""
    assert tint(1000.0) == tint(float("inf")) == "rgba(235, 110, 20, 0.55)"
    assert tint(-1000.0) == "rgba(45, 125, 245, 0.55)"
    assert tint(None) == tint(float("nan")) == tint(0.0) == "transparent"


def test_markup_of_a_model_is_text(server, client):
    """Nothing that a model writes is markup, in the text and in the tooltip."""
    evil = '<img src=x onerror="alert(1)">&'
    for answer in (evil, [token(evil)]):
        server.answer = answer
        for result in (client.complete("Hi", raw=True), client.score("a", "b", raw=True).gather()):
            shown = result._repr_html_()
            assert "<img" not in shown
            assert 'onerror="' not in shown
            assert text_of(shown).replace("·", " ").count(evil) == 1


def test_white_space_and_half_characters_show(server, client):
    """White space has marks; bytes that are no character, and control characters, are hexadecimal."""
    server.answer = [token(" a\n"), token("\t"), token(b"\xf0\x9f"), token("\x1b")]
    shown = text_of(client.complete("Hi", raw=True)[0]._repr_html_())
    assert "·a⏎\n→\t\\xf0\\x9f\\x1b" in shown


def test_the_tooltip_has_the_numbers(server, client):
    """Hovering over a token tells how likely it is under each model, and how far they are apart."""
    server.answer = [
        token("a", id=5, after=-1, before=-3, after_rank=1, before_rank=7, after_before_kl=0.25, critical_alpha=2)
    ]
    tooltip = re.search(r'title="([^"]*)"', client.score("Hi", "a", raw=True).gather()._repr_html_())[1]
    lines = html.unescape(tooltip).splitlines()
    assert lines[0] == "'a', id 5"
    assert lines[1:3] == ["log p after -1.000, rank 1", "log p before -3.000, rank 7"]
    assert "after - before +2.000" in lines
    assert "KL 0.250, novel mass 0.000" in lines
    assert "critical alpha 2.000: ''" in lines


def test_without_diagnostics_the_text_is_plain(server, client):
    """Without diagnostics there is nothing to tint and no legend; completions tell the seed and how each ended."""
    server.answer = "Hello <b>"
    shown = client.complete("Hi", raw=True, num_sequences=2)._repr_html_()
    assert "border-radius" not in shown
    assert "in nats" not in shown
    assert text_of(shown) == "seed 7amplified 0: 1 token, EOSHello <b>amplified 1: 1 token, EOSHello <b>"


def test_a_score_shows_its_totals(server, client):
    """Above the tokens of a scored text stand its log-probabilities."""
    server.answer = [token("a", before=-2), token("b", before=-2)]
    shown = client.score("Hi", "ab", raw=True, score_alphas=[0.5]).gather()._repr_html_()
    assert "log p after -2.000, before -4.000, log q(0.5) -2.000" in text_of(shown)
