"""What a survey draws: its settings, the chunks they come to, and which of them an estimator can live with.

Pure: nothing of servers and files. A chunk is one call that draws several sequences of one prompt at one alpha. Its
seed is a function of the survey's seed, the prompt's id, the alpha and the chunk's index alone. So a chunk that is
drawn again, by whatever server of the same pair and after whatever interruption, is the same chunk. Seeds differ
between alphas on purpose: with one seed the server gives two alphas the same noise, and estimates that pool alphas need
rollouts that are independent.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from lda_client.lab._errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ALPHA_LIMIT = 100.0
SCORE_ALPHAS_MAX = 64
SEQUENCES_MAX = 1024
# Half the distance over which the slope of log q in alpha is taken.
SLOPE_STEP = 0.05

_UNSEEN = "cuts off the tail, where rare behaviour lives, and the scores are taken without it"
# Settings that estimators cannot live with: the value that does no harm, and what any other one does.
_HARMS: dict[str, tuple[float, str]] = {
    "top_p": (1.0, f"top_p below 1 {_UNSEEN}"),
    "top_k": (0, f"top_k {_UNSEEN}"),
    "min_p": (0.0, f"min_p {_UNSEEN}"),
    "plausibility": (0.0, "plausibility forbids other tokens at each alpha, and the scores are taken without it"),
    "min_new_tokens": (
        0,
        "min_new_tokens forbids an early end, so the rate would be that of a model that cannot end there",
    ),
    "ignore_eos": (
        False,
        "ignore_eos goes on after the end, so hits in text that no user sees would count, and every token after the "
        "end adds noise to the weights",
    ),
}
_GREEDY = "temperature 0 is greedy: there is one rollout for each prompt, and no rate"


class Chunk(NamedTuple):
    """One call: `sequences` rollouts of a prompt at an alpha, the first of which is the cell's `first`th.

    `number` is its place in the canonical order: by prompt, by alpha, by sequence.
    """

    number: int
    prompt: int
    alpha: float
    first: int
    sequences: int
    seed: int


@dataclass(frozen=True)
class SurveySettings:
    """What is drawn. Two surveys with equal settings, prompts and pair draw the same rollouts.

    Attributes:
        alphas: where rollouts are drawn; ascending.
        rollouts: for each prompt at each alpha.
        seed: of the whole survey.
        chunk_size: sequences drawn by one call.
        max_new_tokens: cap on new tokens; a rollout that reaches it is an outcome like any other.
        temperature: the rate is estimated for the after model at this temperature.
        top_p: see `refusals`; so for the next five.
        top_k: likewise.
        min_p: likewise.
        plausibility: likewise.
        min_new_tokens: likewise.
        ignore_eos: likewise.
        stop: strings that end a rollout.
        stop_token_ids: tokens that end one.
        raw: send string prompts without the chat template.
        system: a system turn for every prompt.
        diagnostics: keep a comparison of the two models for every token.
        estimate: score every rollout at every alpha, as estimators need it.
        slopes: score on both sides of every alpha too, for the slope of the log-rate.
    """

    alphas: tuple[float, ...]
    rollouts: int
    seed: int = 0
    chunk_size: int = 16
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    plausibility: float = 0.0
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    raw: bool = False
    system: str | None = None
    diagnostics: bool = False
    estimate: bool = True
    slopes: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(sorted(float(alpha) + 0.0 for alpha in self.alphas)))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_alphas()
        _require(self.rollouts >= 1, "rollouts: draw at least one.")
        _require(
            1 <= self.chunk_size <= SEQUENCES_MAX,
            f"chunk_size: one call draws between 1 and {SEQUENCES_MAX} sequences.",
        )
        _require(0 <= self.seed < 1 << 64, "seed: give a whole number of 64 bits.")
        greedy = self.temperature == 0
        _require(not greedy or self.rollouts == 1, "temperature: 0 is greedy and draws one rollout; set rollouts to 1.")
        self._check_scores()

    def _check_alphas(self) -> None:
        _require(bool(self.alphas), "alphas: give at least one.")
        for alpha in self.alphas:
            _require(abs(alpha) <= ALPHA_LIMIT, f"alphas: {alpha:g} is outside of -100 to 100.")
        _require(
            len({_on_wire(alpha) for alpha in self.alphas}) == len(self.alphas),
            "alphas: the same alpha is given twice (they travel as 32-bit numbers).",
        )

    def _check_scores(self) -> None:
        count = len(self.score_alphas)
        remedy = "give fewer alphas (21 always fit)" if self.slopes else "give fewer alphas"
        remedy += ", or leave the slopes out" if self.slopes else ""
        _require(
            count <= SCORE_ALPHAS_MAX,
            f"alphas: every rollout would be scored at {count} alphas (those of the survey, 0"
            f"{', and both sides of each for its slope' if self.slopes else ''}), and a server takes "
            f"{SCORE_ALPHAS_MAX}: {remedy}.",
        )

    @property
    def score_alphas(self) -> tuple[float, ...]:
        """Where every rollout is scored: the survey's alphas, 0, and alpha +- 0.05 for the slopes; ascending."""
        if not self.estimate:
            return ()
        wanted = [*self.alphas, 0.0]
        if self.slopes:
            wanted += [round(alpha + step, 9) for alpha in self.alphas for step in (-SLOPE_STEP, SLOPE_STEP)]
        within = {_on_wire(alpha): alpha for alpha in reversed(wanted) if abs(alpha) <= ALPHA_LIMIT}
        return tuple(sorted(within.values()))

    @property
    def refusals(self) -> list[str]:
        """Why no estimator can use what these settings draw; empty if it can."""
        harms = [harm for name, (harmless, harm) in _HARMS.items() if getattr(self, name) != harmless]
        return harms if self.temperature else [*harms, _GREEDY]

    def require_estimable(self) -> None:
        """Raise SettingsError if an estimate is wanted and these settings would break it."""
        if self.estimate and self.refusals:
            raise SettingsError(
                f"No rate could be estimated from this survey: {'; '.join(self.refusals)}. "
                "Leave these settings out, or draw without estimates (--no-estimate)."
            )

    def chunks_per_cell(self) -> int:
        """Calls for one prompt at one alpha."""
        return math.ceil(self.rollouts / self.chunk_size)

    def chunks(self, prompt_ids: Sequence[str]) -> Iterator[Chunk]:
        """Every chunk, in canonical order."""
        number = 0
        for prompt, prompt_id in enumerate(prompt_ids):
            for alpha in self.alphas:
                for index in range(self.chunks_per_cell()):
                    first = index * self.chunk_size
                    sequences = min(self.chunk_size, self.rollouts - first)
                    yield Chunk(number, prompt, alpha, first, sequences, self._seed_of(prompt_id, alpha, index))
                    number += 1

    def _seed_of(self, prompt_id: str, alpha: float, index: int) -> int:
        named = json.dumps([self.seed, prompt_id, alpha.hex(), index], ensure_ascii=True)
        return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "little")

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """As the manifest kept them."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def breadth_first(chunks: Iterable[Chunk]) -> list[Chunk]:
    """The order of drawing: all cells grow alike, so that a survey that stops early is an even one."""
    return sorted(chunks, key=lambda chunk: (chunk.first, chunk.number))


def _on_wire(alpha: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", alpha))[0])


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)
