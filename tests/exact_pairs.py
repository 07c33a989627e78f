"""Pairs of models so small that every sequence can be listed, and every probability is known.

First-order Markov chains over V tokens, L steps: logits are tables. The after model has learned to say `0 1 0`; its
rate at alpha 0 is set by a common drop of those logits in both models, found by root search.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from lda_client.lab.estimators import Rollouts
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp


class ExactPair:
    """A pair with a behaviour of a given rate.

    Args:
        rate: of the behaviour in the after model.
        seed: of the tables.
        tokens: V.
        steps: L.
        gain: how much post-training raised the behaviour's logits; below 0, how much it lowered them, as safety
            training would: the behaviour is common in the before model then.
        noise: standard deviation of what else it changed.
    """

    def __init__(self, rate, seed=0, tokens=6, steps=6, gain=5.0, noise=0.3):
        rng = np.random.default_rng(seed)
        self._start = tokens
        self._known = {}  # log_q by alpha
        self.sequences = np.array(list(product(range(tokens), repeat=steps)), np.int16)
        windows = np.stack([self.sequences[:, i : i + 3] for i in range(steps - 2)])
        self.hits = (windows == [0, 1, 0]).all(axis=2).any(axis=0)
        base, other = rng.normal(0, 1, (tokens + 1, tokens)), rng.normal(0, noise, (tokens + 1, tokens))
        path = np.zeros((tokens + 1, tokens))
        path[:, 0], path[0, 1], path[1, 0] = 1, 1, 1
        raised = gain * (0.3 * path + 0.05 * path * (np.arange(tokens + 1) < 2)[:, None]) + other

        def excess(drop):
            before = base - drop * path
            return logsumexp(self._log_q(before + raised, before, 0.0)[self.hits]) - np.log(rate)

        self._before = base - brentq(excess, -8, 20) * path
        self._after = self._before + raised

    def log_q(self, alpha):
        """Log-probability of every sequence at an alpha."""
        if alpha not in self._known:
            self._known[alpha] = self._log_q(self._after, self._before, alpha)
        return self._known[alpha]

    def rate(self, alpha=0.0):
        """Exact rate of the behaviour."""
        return float(np.exp(logsumexp(self.log_q(alpha)[self.hits])))

    def draw(self, counts, rng):
        """Rollouts, `counts[alpha]` at each alpha."""
        alphas = np.array(list(counts))
        log_q = np.stack([self.log_q(alpha) for alpha in alphas], axis=1)
        cumulative = np.exp(log_q).cumsum(axis=0)
        ends = [np.sort(rng.random(n)) * cumulative[-1, k] for k, n in enumerate(counts.values())]
        rows = np.concatenate([np.searchsorted(cumulative[:, k], each) for k, each in enumerate(ends)])
        drawn_at = np.repeat(np.arange(len(alphas)), list(counts.values()))
        return Rollouts.of(alphas, drawn_at, self.hits[rows], log_q[rows], self.log_q(0.0)[rows])

    def _log_q(self, after, before, alpha):
        table = log_softmax(after + alpha * (after - before), axis=1)
        total = table[self._start][self.sequences[:, 0]].copy()
        for step in range(1, self.sequences.shape[1]):
            total += table[self.sequences[:, step - 1], self.sequences[:, step]]
        return total
