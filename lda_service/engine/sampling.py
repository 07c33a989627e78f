"""Drawing tokens: amplify, filter, add counter-based Gumbel noise. Knows tensors; nothing of models or requests.

Filters are thresholds on the scaled logits, found among the largest candidates; the vocabulary is not sorted. A draw
is argmax(logits / T + g) with Gumbel noise g hashed from (seed, sequence, position, token): the law is the softmax
exactly, and a draw depends on nothing else in the batch. Rows with the same seed share their noise at every alpha.
`Sampler.law` writes out the distribution that `Sampler.draw` draws from, for callers that compare two of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lda_service.engine.amplify import amplify

if TYPE_CHECKING:
    from lda_service.engine.native import Kernels

CANDIDATES = 256
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class RowSampling(NamedTuple):
    """Sampling settings of a batch, each of shape (rows,). Temperature 0 is greedy."""

    alpha: Tensor  # float32
    temperature: Tensor  # float32
    top_k: Tensor  # int64, 0 keeps all
    top_p: Tensor  # float32, 1 keeps all
    min_p: Tensor  # float32, 0 keeps all
    plausibility: Tensor  # float32, 0 keeps all
    keys: Tensor  # int64, from `sequence_key`
    positions: Tensor  # int64, absolute position of the token to draw


class Drawn(NamedTuple):
    """Drawn ids (int64) and their log-probability under the filtered distribution (NaN for greedy rows).

    `sound`: whether the row's logits were finite; if not, its token means nothing.
    """

    tokens: Tensor
    logprobs: Tensor
    sound: Tensor


class Sampler:
    """Amplifies and draws, for a whole batch at once; on the native kernels where there are any.

    Args:
        vocabulary: width of the logits.
        forbidden: ids that may never be drawn: bool, shape (vocabulary,).
        kernels: the native kernels; None: torch's operators.
    """

    def __init__(self, vocabulary: int, forbidden: Tensor, kernels: Kernels | None = None) -> None:
        self.kernels = kernels
        self._mask = torch.zeros(vocabulary, device=forbidden.device).masked_fill_(forbidden, -torch.inf)
        self._has_forbidden = bool(forbidden.any())
        self._token_noise = _mix_tensor(torch.arange(vocabulary)) if kernels else None

    def draw(self, after: Tensor, before: Tensor, rows: RowSampling) -> Drawn:
        """One token for each row, from `after + alpha * (after - before)`.

        Args:
            after: float32 logits, shape (rows, vocabulary); -inf rules an id out.
            before: likewise.
            rows: settings, one entry per row.
        """
        if self.kernels is not None:
            assert self._token_noise is not None
            floats = (rows.alpha, rows.temperature, rows.top_p, rows.min_p, rows.plausibility)
            integers = (rows.top_k, rows.keys, rows.positions)
            mask = self._mask if self._has_forbidden else None
            return Drawn(*self.kernels.sample(after, before, mask, floats, integers, self._token_noise))
        amplified = self._amplify(self.forbid(after), self.forbid(before), rows)
        sound = amplified.amax(1).isfinite()
        return Drawn(*sample(amplified, rows), sound)

    def law(self, after: Tensor, before: Tensor, rows: RowSampling) -> Tensor:
        """The probabilities that `draw` draws with, after all filters; one-hot for greedy rows.

        Returns:
            float64, shape (rows, vocabulary); NaN throughout in rows whose logits are not finite.
        """
        amplified = self._amplify(self.forbid(after), self.forbid(before), rows)
        sound = amplified.amax(1, keepdim=True).isfinite()
        return torch.where(sound, filtered_law(amplified, rows), torch.nan)

    def _amplify(self, after: Tensor, before: Tensor, rows: RowSampling) -> Tensor:
        amplified = amplify(after, before, rows.alpha)
        if bool((rows.plausibility > 0).any()):
            amplified = mask_implausible(amplified, after, rows.plausibility)
        return amplified

    def draw_capturable(
        self, after: Tensor, before: Tensor, rows: RowSampling, candidates: int
    ) -> tuple[Drawn, Tensor]:
        """`draw` on torch's operators without a look at any value, so that a CUDA graph can be made of it.

        Args:
            after: see `draw`.
            before: see `draw`.
            rows: see `draw`.
            candidates: how many of the largest logits the filters look at; 0 if no row has a filter.

        Returns:
            what `draw` returns, and whether the candidates were enough: bool, shape (rows,). Where they were not, the
            token means nothing, and the row must be drawn by `draw`.
        """
        after, before = self.forbid(after), self.forbid(before)
        amplified = amplify(after, before, rows.alpha, capturable=True)
        amplified = mask_implausible(amplified, after, rows.plausibility)
        tokens, logprobs, enough = sample_capturable(amplified, rows, candidates)
        return Drawn(tokens, logprobs, amplified.amax(1).isfinite()), enough

    def forbid(self, logits: Tensor) -> Tensor:
        """Rule out the ids that may never be drawn."""
        return logits + self._mask if self._has_forbidden else logits


def sequence_key(seed: int, sequence_index: int) -> int:
    """The noise key of one sequence, a signed 64-bit integer."""
    return _signed(_mix(_mix(seed & _MASK) + (sequence_index + 1) * _GOLDEN))


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    z &= _MASK
    return z - (1 << 64) if z >> 63 else z


def _mix_tensor(z: Tensor) -> Tensor:
    """`_mix` on int64 tensors: multiplication wraps, shifts are made logical by masks."""
    z = z + _signed(_GOLDEN)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def gumbel_noise(keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise for each (sequence, position, token).

    Args:
        keys: int64, shape (rows,).
        positions: int64, shape (rows,).
        tokens: int64, shape (rows, n) or (1, n).

    Returns:
        float32, shape (rows, n). Uniforms have 53 bits, so that tails are right down to 1e-16.
    """
    uniform = ((_bits(keys, positions, tokens) >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_().float()


def uniform_noise(keys: Tensor, positions: Tensor, tag: int) -> Tensor:
    """One uniform number for each (sequence, position), strictly between 0 and 1: float64, shape (rows,).

    `tag` says what it is for. It is negative, so that the noise of no token is used again.
    """
    assert tag < 0
    bits = _bits(keys, positions, torch.full((1, 1), tag, device=keys.device))[:, 0]
    return ((bits >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)


def _bits(keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """64 hashed bits for each (sequence, position, token): int64, shape (rows, n)."""
    at = _mix_tensor(keys + positions * _signed(_GOLDEN))
    return _mix_tensor(at[:, None] ^ _mix_tensor(tokens))


def mask_implausible(amplified: Tensor, after: Tensor, plausibility: Tensor) -> Tensor:
    """Contrastive decoding's mask: keep ids with p_after >= plausibility * max p_after (Li et al., 2022).

    Args:
        amplified: logits, shape (rows, vocabulary).
        after: logits of the after model, same shape.
        plausibility: float32, shape (rows,); 0 keeps all.
    """
    floor = after.amax(1, keepdim=True) + plausibility.log()[:, None]
    return amplified.masked_fill(after < floor, -torch.inf)


def sample(logits: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw one token for each row; returns ids and log-probabilities.

    Args:
        logits: float32, shape (rows, vocabulary); at least one finite entry in each row, no NaN.
        rows: settings, one entry per row.
    """
    tokens = logits.argmax(1)
    logprobs = torch.full((len(logits),), torch.nan, device=logits.device)
    warm = rows.temperature > 0
    filtered = warm & _is_filtered(rows)
    for chosen, draw in ((filtered, _draw_filtered), (warm & ~filtered, _draw_all)):
        at = chosen.nonzero()[:, 0]
        if len(at):
            part = RowSampling(*(setting[at] for setting in rows))
            # Relative to the largest, so that no temperature, however small, makes inf - inf of them.
            relative = logits[at] - logits[at].amax(1, keepdim=True)
            tokens[at], logprobs[at] = draw(relative / part.temperature[:, None], part)
    return tokens, logprobs


def sample_capturable(logits: Tensor, rows: RowSampling, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """`sample` in fixed shapes: every way to draw is computed for every row, and each row takes its own.

    Args:
        logits: see `sample`.
        rows: see `sample`.
        candidates: see `Sampler.draw_capturable`.

    Returns:
        ids, log-probabilities, and whether the candidates were enough: bool, shape (rows,).
    """
    warm = rows.temperature > 0
    filtered = warm & _is_filtered(rows)
    relative = logits - logits.amax(1, keepdim=True)
    scaled = relative / torch.where(warm, rows.temperature, 1.0)[:, None]
    tokens, logprobs = _draw_all(scaled, rows)
    enough = ~filtered
    if candidates:
        values, ids = scaled.topk(candidates, dim=1)
        threshold = _threshold(values, scaled, rows)
        settled = (values[:, -1] < threshold[:, 0]) & (rows.top_k <= candidates)
        enough = torch.ones_like(settled) if candidates == scaled.shape[1] else enough | settled
        among = _draw_among(values.masked_fill(values < threshold, -torch.inf), ids, rows)
        tokens, logprobs = (
            torch.where(filtered, few, all_) for few, all_ in zip(among, (tokens, logprobs), strict=True)
        )
    return torch.where(warm, tokens, logits.argmax(1)), torch.where(warm, logprobs, torch.nan), enough


def filtered_law(logits: Tensor, rows: RowSampling) -> Tensor:
    """The probabilities that `sample` draws with: float64, shape (rows, vocabulary); one-hot for greedy rows."""
    warm = rows.temperature > 0
    scaled = (logits - logits.amax(1, keepdim=True)) / torch.where(warm, rows.temperature, 1.0)[:, None]
    at = (warm & _is_filtered(rows)).nonzero()[:, 0]
    if len(at):
        threshold = _candidates(scaled[at], RowSampling(*(setting[at] for setting in rows)))[2]
        scaled[at] = scaled[at].masked_fill(scaled[at] < threshold, -torch.inf)
    law = scaled.double().softmax(1)
    if not bool(warm.all()):
        law[~warm] = torch.nn.functional.one_hot(logits[~warm].argmax(1), logits.shape[1]).double()
    return law


def _is_filtered(rows: RowSampling) -> Tensor:
    return (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)


def _draw_all(scaled: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw from the whole softmax."""
    every = torch.arange(scaled.shape[1], device=scaled.device)[None]
    tokens = (scaled + gumbel_noise(rows.keys, rows.positions, every)).argmax(1)
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(1)


def _draw_filtered(scaled: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw among the candidates that pass top_k, then top_p, then min_p."""
    values, ids, threshold = _candidates(scaled, rows)
    return _draw_among(values.masked_fill(values < threshold, -torch.inf), ids, rows)


def _draw_among(values: Tensor, ids: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw from the softmax of `values`, which belong to `ids`."""
    best = (values + gumbel_noise(rows.keys, rows.positions, ids)).argmax(1, keepdim=True)
    return ids.gather(1, best)[:, 0], values.gather(1, best)[:, 0] - values.logsumexp(1)


def _candidates(scaled: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logits, as many as the filters need, their ids, and the smallest logit that passes.

    A threshold is certain once a candidate lies below it: then nothing outside the candidates can pass.
    """
    vocabulary = scaled.shape[1]
    width = min(vocabulary, max(CANDIDATES, int(rows.top_k.clamp(max=vocabulary).max()) + 1))
    while True:
        values, ids = scaled.topk(width, dim=1)
        threshold = _threshold(values, scaled, rows)
        if width == vocabulary or bool((values[:, -1:] < threshold).all()):
            return values, ids, threshold
        width = min(vocabulary, width * 8)


def _threshold(values: Tensor, scaled: Tensor, rows: RowSampling) -> Tensor:
    """The smallest logit that passes all filters, shape (rows, 1), given the largest `values` in falling order.

    Ties with the last token kept are kept. Where the candidates do not settle it, -inf.
    """
    width = values.shape[1]
    last = torch.where((rows.top_k > 0) & (rows.top_k <= width), rows.top_k, width) - 1
    by_count = values.gather(1, last[:, None])
    limited = (rows.top_k > 0)[:, None]
    by_count = torch.where(limited, by_count, -torch.inf)
    total = torch.where(
        limited[:, 0], values.masked_fill(values < by_count, -torch.inf).logsumexp(1), scaled.logsumexp(1)
    )
    mass = (values - total[:, None]).exp().cumsum(1)
    reached = mass >= rows.top_p[:, None]
    crossing = reached.int().argmax(1, keepdim=True)
    by_mass = torch.where(
        reached.any(1, keepdim=True) & (rows.top_p < 1)[:, None], values.gather(1, crossing), -torch.inf
    )
    by_ratio = values[:, :1] + rows.min_p.log()[:, None]
    return torch.maximum(torch.maximum(by_count, by_mass), by_ratio)
