"""Settings of a survey: seeds, chunks, where rollouts are scored, and what would break an estimator."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_harness import quick
from lda_client.lab import SettingsError, SurveySettings
from lda_client.lab._settings import breadth_first

ALPHAS = st.lists(st.integers(-400, 400), min_size=1, max_size=21, unique=True).map(lambda n: [x / 20 for x in n])


@given(alphas=ALPHAS)
def test_scores_cover_the_grid_zero_and_slopes(alphas):
    """21 alphas always fit into the 64 of a request; no two of them are the same number on the wire."""
    settings = SurveySettings(tuple(alphas), 1)
    scored = settings.score_alphas
    assert len(scored) <= 64
    assert len(set(np.float32(scored))) == len(scored)
    assert {*settings.alphas, 0.0} <= set(scored)
    for alpha in alphas:
        assert np.min(np.abs(np.array(scored) - (alpha + 0.05))) < 1e-6
        assert np.min(np.abs(np.array(scored) - (alpha - 0.05))) < 1e-6


def test_at_the_ends_slopes_are_taken_on_one_side():
    """No score is asked for outside of what the contract allows."""
    assert SurveySettings((-100, 100), 1).score_alphas == (-100.0, -99.95, 0.0, 99.95, 100.0)


def test_too_many_alphas_are_refused_with_the_way_out():
    """63 alphas fit without slopes, 22 may not with them, and the message says so."""
    assert len(SurveySettings(tuple(range(1, 64)), 1, slopes=False).score_alphas) == 64
    with pytest.raises(SettingsError, match=r"67 alphas.*takes 64.*leave the slopes out"):
        SurveySettings(tuple(range(1, 23)), 1)
    assert SurveySettings(tuple(range(100)), 1, estimate=False).score_alphas == ()


@given(rollouts=st.integers(1, 100), size=st.integers(1, 32))
def test_chunks_tile_every_cell(rollouts, size):
    """Each rollout of each cell is in one chunk; numbers follow the canonical order; seeds all differ."""
    settings = quick(rollouts=rollouts, chunk_size=size)
    chunks = list(settings.chunks(["a", "b"]))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.seed for chunk in chunks}) == len(chunks)
    cells = [(c.prompt, c.alpha, i) for c in chunks for i in range(c.first, c.first + c.sequences)]
    assert cells == [(prompt, alpha, i) for prompt in (0, 1) for alpha in settings.alphas for i in range(rollouts)]
    assert [c.first for c in breadth_first(chunks)] == sorted(c.first for c in chunks)


def test_a_seed_hangs_on_its_cell_alone():
    """Other prompts, other alphas and more rollouts leave a chunk's seed as it is; the survey's seed does not."""
    few = {(c.prompt, c.alpha, c.first): c.seed for c in quick().chunks(["a"])}
    many = {(c.prompt, c.alpha, c.first): c.seed for c in quick(rollouts=40, alphas=(-1, 0, 0.5)).chunks(["a", "b"])}
    assert few.items() <= many.items()
    other = {c.seed for c in quick(seed=1).chunks(["a"])}
    assert not other & set(few.values())
    assert few[0, 0.5, 4] == 5112713078637581375  # so that later versions resume what this one began


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"top_p": 0.95}, "top_p below 1"),
        ({"top_k": 50}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"plausibility": 0.1}, "plausibility"),
        ({"min_new_tokens": 5}, "cannot end"),
        ({"ignore_eos": True}, "no user sees"),
        ({"temperature": 0.0, "rollouts": 1}, "greedy"),
    ],
)
def test_what_breaks_an_estimator_is_refused(values, reason):
    """With its reason, and unless no estimate is wanted."""
    with pytest.raises(SettingsError, match=reason):
        quick(**values).require_estimable()
    quick(**values, estimate=False).require_estimable()


def test_what_an_estimator_can_live_with():
    """Another temperature, stops and a short cap change the question that is asked, not whether it has an answer."""
    quick(temperature=0.7, stop=("\n",), stop_token_ids=(3,), max_new_tokens=4).require_estimable()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"alphas": ()}, "at least one"),
        ({"alphas": (0, 101)}, "outside"),
        ({"alphas": (float("nan"),)}, "outside"),
        ({"alphas": (0.1, 0.1 + 1e-12)}, "twice"),
        ({"alphas": (0.0, -0.0)}, "twice"),
        ({"rollouts": 0}, "rollouts"),
        ({"chunk_size": 1025}, "chunk_size"),
        ({"seed": 1 << 64}, "seed"),
        ({"temperature": 0.0}, "greedy"),
    ],
)
def test_what_is_no_survey_is_refused(values, reason):
    """Before a server is asked."""
    with pytest.raises(SettingsError, match=reason):
        quick(**values)
