"""The formula and the evidence around it, against plain double arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lda_service.engine.amplify import amplify, compare, critical_alpha, score

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


@given(LOGITS, LOGITS)
def test_alpha_0_is_the_after_model_and_alpha_minus_1_the_before_model(after, before):
    """Exactly, to the last bit."""
    a, b = tensor(after), tensor(before)
    assert torch.equal(amplify(a, b, torch.tensor([0.0])), a)
    assert torch.equal(amplify(a, b, torch.tensor([-1.0])), b)


@given(LOGITS, LOGITS, st.floats(-100, 100, width=32))
def test_the_formula(after, before, alpha):
    """after + alpha * (after - before), in float32, at every alpha."""
    wanted = np.float64(after) + np.float64(alpha) * (np.float64(after) - np.float64(before))
    got = amplify(tensor(after), tensor(before), torch.tensor([alpha]))[0].numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 1.0, 20.0])
def test_minus_infinity_never_becomes_nan(alpha):
    """Ruled out by after: stays out. By before alone: finite, counted as before's lowest. By both: out."""
    after, before = tensor([1.0, -torch.inf, 2.0, -torch.inf]), tensor([-torch.inf, 3.0, 1.0, -torch.inf])
    got = amplify(after, before, torch.tensor([alpha]))[0]
    assert not got.isnan().any()
    assert got[1] == got[3] == -torch.inf
    assert torch.isfinite(got[0])
    assert torch.isfinite(got[2])


def test_nothing_is_clamped():
    """At alpha 20 two winners above 100 keep their difference."""
    got = amplify(tensor([25.0, 25.5]), tensor([20.0, 20.0]), torch.tensor([20.0]))[0]
    assert got.tolist() == [125.0, 135.5]


@given(LOGITS, LOGITS)
def test_critical_alpha_is_where_the_top_token_flips(after, before):
    """Just below it the after model's top token still leads; just above it the named token does."""
    a, b = tensor(after).double(), tensor(before).double()
    alpha, token = (x.item() for x in critical_alpha(a, b))
    top = a.argmax().item()
    leader = lambda alpha: (a + alpha * (a - b))[0]
    if alpha == float("inf"):
        z = leader(1e6)
        assert z[top] >= z.max() - 1e-3 * abs(z.max())
    elif 1e-6 < alpha < 1e6:
        z = leader(alpha * 0.999)
        assert z[top] >= z.max() - 1e-6 * (1 + z.abs().max())
        z = leader(alpha * 1.001)
        assert z[token] > z[top]


def test_comparison_against_numpy():
    """Log-probabilities, ranks, KL and novel mass equal their definitions."""
    rng = np.random.default_rng(0)
    after, before, amplified = (np.log(rng.dirichlet(np.ones(300), 4)) for _ in range(3))
    tokens = rng.integers(0, 300, 4)
    got = compare(*(torch.tensor(x) for x in (after, before, amplified)), torch.tensor(tokens))
    at = np.arange(4), tokens
    for values, logprobs in zip(got[:3], (after, before, amplified), strict=True):
        np.testing.assert_allclose(values.numpy(), logprobs[at])
    for ranks, logprobs in zip(got[3:6], (after, before, amplified), strict=True):
        order = np.argsort(-logprobs, 1)
        np.testing.assert_array_equal(ranks.numpy(), [list(order[i]).index(tokens[i]) + 1 for i in range(4)])
    np.testing.assert_allclose(got.after_before_kl.numpy(), (np.exp(after) * (after - before)).sum(1))
    outside = np.argsort(-before, 1)[:, 100:]
    np.testing.assert_allclose(got.novel_mass.numpy(), np.take_along_axis(np.exp(amplified), outside, 1).sum(1))


def test_scores_are_log_probabilities_at_each_alpha():
    """log q_alpha equals the log-softmax of the formula at the request's temperature."""
    generator = torch.Generator().manual_seed(0)
    after, before = torch.randn(2, 3, 50, generator=generator)
    tokens, alphas, temperature = (
        torch.tensor([0, 7, 49]),
        torch.tensor([-1.0, 0.0, 2.5]),
        torch.tensor([1.0, 0.5, 2.0]),
    )
    got = score(after, before, tokens, alphas, temperature)
    for j, alpha in enumerate(alphas):
        z = (after + alpha * (after - before)).double() / temperature[:, None]
        wanted = z.log_softmax(-1)[range(3), tokens]
        torch.testing.assert_close(got[:, j], wanted, atol=1e-5, rtol=1e-5)
