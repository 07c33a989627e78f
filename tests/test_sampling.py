"""The sampler's law, against transformers' own warpers and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_models import save_model
from transformers import (
    AutoModelForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lda_service import LDAModelPair
from lda_service.config import EngineConfig
from lda_service.engine import native
from lda_service.engine.request import Branch, Role, Sampling, Stopping
from lda_service.engine.sampling import RowSampling, Sampler, gumbel_noise, sequence_key

DRAWS = 20_000
ALPHAS = (-0.5, 0.0, 2.0)
FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "plausibility": {"plausibility": 0.2},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "plausibility": 0.01},
}


def rows_of(count, seed=7, position=11, alpha=0.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, plausibility=0.0):
    """Settings of `count` sequences of one request."""
    full = lambda value, dtype: torch.full((count,), value, dtype=dtype)
    return RowSampling(
        full(alpha, torch.float32),
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        full(plausibility, torch.float32),
        torch.tensor([sequence_key(seed, i) for i in range(count)]),
        full(position, torch.int64),
    )


def draw(kernels, after, rows, before=None, forbidden=None):
    """Draw with one of the two implementations; without a before model the formula has nothing to amplify."""
    vocabulary = after.shape[1]
    forbidden = torch.zeros(vocabulary, dtype=torch.bool) if forbidden is None else forbidden
    return Sampler(vocabulary, forbidden, kernels).draw(after, after if before is None else before, rows)


def exact_law(after, before, alpha, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, plausibility=0.0):
    """The distribution by the book: numpy for the formula, transformers for the filters."""
    logits = after.double() + alpha * (after.double() - before.double())
    if plausibility:
        p = after.double().softmax(-1)
        logits = logits.masked_fill(p < plausibility * p.max(), -np.inf)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None]) if temperature != 1.0 else logits[None]
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        scores = warper(None, scores) if warper else scores
    return scores.softmax(-1)[0].numpy()


def chi_square_p(tokens, law):
    """p-value of the draws under the law; bins expected fewer than five times are pooled."""
    counts = np.bincount(tokens, minlength=len(law))
    assert counts[law == 0].sum() == 0, "a token was drawn that the filters drop"
    expected = law * len(tokens)
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    keep = wanted > 0
    return stats.chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue


@pytest.mark.parametrize(("alpha", "name"), list(itertools.product(ALPHAS, FILTERS)))
def test_draws_follow_the_exact_distribution(alpha, name, kernels):
    """20,000 draws fit the exact filtered distribution (chi-square; seeds are fixed)."""
    generator = torch.Generator().manual_seed(3)
    after, before = torch.randn(2, 400, generator=generator).mul(1.5)
    law = exact_law(after, before, alpha, **FILTERS[name])
    rows = rows_of(DRAWS, alpha=alpha, **FILTERS[name])
    drawn = draw(kernels, after.expand(DRAWS, -1), rows, before.expand(DRAWS, -1))
    assert chi_square_p(drawn.tokens.numpy(), law) > 1e-3
    logprobs = np.log(law[drawn.tokens.numpy()])
    np.testing.assert_allclose(drawn.logprobs.numpy(), logprobs, atol=2e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_engine_draws_from_that_law(alpha, tmp_path):
    """The same through the front door: 20,000 first tokens of a real pair against plain transformers' logits."""
    for seed, side in enumerate(("after", "before")):
        save_model(tmp_path / side, "llama", seed=seed, initializer_range=0.12)
    pair = LDAModelPair(
        str(tmp_path / "after"),
        str(tmp_path / "before"),
        device="cpu",
        engine=EngineConfig(max_running_sequences=1024),
    )
    prompt = list(b"Once upon a time")
    options = FILTERS["all"]
    tokens = []
    for seed in range(20):
        sampling, stopping = Sampling(**options, seed=seed), Stopping(1, ignore_eos=True)
        drawn = pair.rollouts(prompt, [Branch(Role.AMPLIFIED, alpha)], 1000, sampling, stopping)
        tokens += [completion.tokens[0].token_id for completion in drawn]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / side) for side in ("after", "before")]
    with torch.no_grad():
        after, before = (model(torch.tensor([prompt])).logits[0, -1, :260] for model in models)
    assert chi_square_p(np.array(tokens), exact_law(after, before, alpha, **options)) > 1e-3


def test_the_token_that_crosses_top_p_is_kept(kernels):
    """With p = (0.5, 0.48, 0.02) and top_p 0.95 both likely tokens stay and the third never comes."""
    logits = torch.tensor([0.5, 0.48, 0.02]).log().expand(2000, -1)
    assert set(draw(kernels, logits, rows_of(2000, top_p=0.95)).tokens.tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-4])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_tiny_temperatures_are_greedy(temperature, top_p, kernels):
    """No temperature is so small that logits overflow: the draw is the argmax."""
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 100
    drawn = draw(kernels, logits, rows_of(50, temperature=temperature, top_p=top_p))
    assert torch.equal(drawn.tokens, logits.argmax(1))
    assert torch.allclose(drawn.logprobs, torch.zeros(50))


def test_flat_distributions_need_no_sort_but_stay_exact(kernels):
    """A nucleus wider than the first candidates is found all the same: half of 5,000 nearly equal tokens."""
    logits = torch.linspace(0, 0.001, 5000).expand(200, -1)
    drawn = draw(kernels, logits, rows_of(200, top_p=0.5))
    assert drawn.tokens.min() >= 2490
    np.testing.assert_allclose(drawn.logprobs.numpy(), -np.log(2500), atol=0.01)


def test_ids_that_are_ruled_out_never_come(kernels):
    """Neither forbidden ids nor those at -inf in the after model are drawn, however large alpha makes them; a before
    model that alone rules an id out makes nothing infinite.
    """
    after, before = torch.zeros(400, 12), torch.zeros(400, 12)
    forbidden = torch.zeros(12, dtype=torch.bool)
    after[:, 3], forbidden[3] = 50.0, True
    after[:, 5] = -torch.inf
    before[:, 7] = -torch.inf
    drawn = draw(kernels, after, rows_of(400, alpha=20.0), before, forbidden)
    assert set(drawn.tokens.tolist()) == set(range(12)) - {3, 5}
    assert drawn.sound.all()
    np.testing.assert_allclose(drawn.logprobs.numpy(), -np.log(10), atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_reported(value, kernels):
    """A NaN or an infinite logit marks its own row and no other."""
    logits = torch.zeros(3, 40)
    logits[1, 17] = value
    assert draw(kernels, logits, rows_of(3)).sound.tolist() == [True, False, True]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_native_draws_equal_torch_draws(data):
    """Both implementations draw the same tokens from the same noise, at every setting (near ties apart)."""
    vocabulary, count = data.draw(st.sampled_from([5, 300, 1111])), 40
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    after, before = torch.randn(2, count, vocabulary, generator=generator) * data.draw(
        st.sampled_from([0.01, 1.0, 9.0])
    )
    rows = rows_of(
        count,
        alpha=data.draw(st.sampled_from([-1.0, 0.0, 0.7, 5.0])),
        temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])),
        top_k=data.draw(st.sampled_from([0, 1, 4, 200, 5000])),
        top_p=data.draw(st.sampled_from([0.05, 0.5, 0.95, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 1.0])),
        plausibility=data.draw(st.sampled_from([0.0, 0.1])),
    )
    ours, torchs = (draw(kernels, after, rows, before) for kernels in (native.load(), None))
    same = ours.tokens == torchs.tokens
    assert same.float().mean() >= 0.95
    torch.testing.assert_close(ours.logprobs[same], torchs.logprobs[same], atol=1e-3, rtol=1e-4, equal_nan=True)


def test_noise_is_standard_gumbel_and_independent_of_company():
    """Noise has the Gumbel law, and a (sequence, position, token) has the same noise in any batch and any order."""
    keys = torch.tensor([sequence_key(1, i) for i in range(200)])
    positions = torch.arange(200)
    tokens = torch.arange(500)[None]
    noise = gumbel_noise(keys, positions, tokens)
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    alone = gumbel_noise(keys[13:14], positions[13:14], torch.tensor([[400, 3]]))
    assert alone[0].tolist() == noise[13, [400, 3]].tolist()
    neighbours = noise[:, 1:].double().flatten(), noise[:, :-1].double().flatten()
    assert abs(np.corrcoef(*neighbours)[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[1:].flatten(), noise[:-1].flatten())[0, 1]) < 0.01


def test_the_same_seed_at_two_alphas_shares_its_noise(kernels):
    """Gumbel coupling: where the two distributions are near, mostly the same token is drawn."""
    generator = torch.Generator().manual_seed(0)
    after = torch.randn(1, 300, generator=generator).expand(500, -1)
    before = after + 0.05 * torch.randn(1, 300, generator=generator)
    low, high = (draw(kernels, after, rows_of(500, alpha=alpha), before).tokens for alpha in (0.0, 1.0))
    other = draw(kernels, after, rows_of(500, seed=8)).tokens
    assert (low == high).float().mean() > 0.9
    assert (low == other).float().mean() < 0.2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_does_not_see_its_neighbours(data, kernels):
    """Any row of any mixed batch draws what it draws alone, whatever the neighbours' settings."""
    vocabulary = data.draw(st.sampled_from([3, 40, 700]))
    count = data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(count, vocabulary, generator=generator) * data.draw(st.sampled_from([0.1, 1.0, 8.0]))

    def column(strategy, dtype):
        return torch.tensor(data.draw(st.lists(strategy, min_size=count, max_size=count)), dtype=dtype)

    rows = RowSampling(
        column(st.sampled_from([-1.0, 0.0, 3.0]), torch.float32),
        column(st.sampled_from([0.0, 0.3, 1.0, 2.0]), torch.float32),
        column(st.sampled_from([0, 1, 5, 1000]), torch.int64),
        column(st.sampled_from([0.1, 0.9, 1.0]), torch.float32),
        column(st.sampled_from([0.0, 0.2, 1.0]), torch.float32),
        column(st.sampled_from([0.0, 0.2]), torch.float32),
        column(st.integers(-(2**63), 2**63 - 1), torch.int64),
        column(st.integers(0, 10_000), torch.int64),
    )
    together = draw(kernels, logits, rows)
    for i in range(count):
        alone = draw(kernels, logits[i : i + 1], RowSampling(*(setting[i : i + 1] for setting in rows)))
        assert alone.tokens[0] == together.tokens[i]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i], equal_nan=True)
        if rows.temperature[i] == 0 or rows.top_k[i] == 1:
            assert together.tokens[i] == logits[i].argmax()


def test_sequence_keys_differ():
    """No two of 100,000 (seed, sequence) pairs share a key."""
    keys = {sequence_key(seed, index) for seed in range(100) for index in range(1000)}
    assert len(keys) == 100_000
