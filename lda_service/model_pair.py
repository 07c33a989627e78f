"""`LDAModelPair`: the engine as a plain Python object, no server.

    pair = LDAModelPair(model_after_id="...", model_before_id="...")
    print(pair.generate_lda(prompt="Hello", alpha=1.0).completion)

Knows prompts and the engine; nothing of gRPC or processes. Calls from several threads take turns.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lda_service.config import EngineConfig, PairConfig, pair_ids
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Branch,
    Event,
    FinishReason,
    GenerationRequest,
    Output,
    Role,
    Sampling,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    Stopping,
    TokenRecord,
)
from lda_service.prompting import PromptRenderer

if TYPE_CHECKING:
    from lda_service.vocabulary import CompatibilityReport

Prompt = str | Sequence[int] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished rollout. `completion` never contains the prompt; `tokens_generated` counts the one that ended it."""

    completion: str
    tokens: tuple[TokenRecord, ...]
    tokens_generated: int
    finish_reason: FinishReason
    role: Role
    sequence_index: int
    seed: int
    alpha_scores: dict[float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """A teacher-forced continuation: its tokens with diagnostics, and log q_alpha of the whole for each alpha asked."""

    tokens: tuple[TokenRecord, ...]
    alpha_scores: dict[float, float]


class LDAModelPair:
    """Two models, loaded into this process.

    Args:
        model_after_id: the post-trained model, a hub id or a folder; may be a LoRA adapter over the before model.
            Neither model: the bundled pair.
        model_before_id: its reference.
        device: "auto", "cpu", "cuda", "cuda:N".
        dtype: "auto", "float32", "bfloat16", "float16".
        allow_incompatible: load a pair whose vocabularies differ, for the ids they share.
        quantize: "none", or "int8" for linear layers with rounded weights.
        engine: limits of the decoder.

    Raises:
        StartupError: a model cannot be loaded, or the pair cannot be amplified.
    """

    def __init__(
        self,
        model_after_id: str | None = None,
        model_before_id: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        allow_incompatible: bool = False,
        quantize: str = "none",
        engine: EngineConfig | None = None,
    ) -> None:
        after, before = pair_ids(model_after_id, model_before_id)
        pair = load_pair(PairConfig(after, before, device, dtype, allow_incompatible, quantize=quantize))
        self.info = pair.info
        self._quantization_error = pair.quantization_error
        self.renderer = PromptRenderer(pair.tokenizer)
        self._engine = Engine(pair, engine or EngineConfig())
        self._lock = threading.Lock()
        self._ids = itertools.count()

    @property
    def compatibility(self) -> CompatibilityReport:
        """How the two vocabularies compare."""
        return self.info.compatibility

    def quantization_error(self, alpha: float) -> float:
        """RMS error, in nats, that quantisation brings to the logits combined at this alpha, on a short mixed text."""
        return 0.0 if self._quantization_error is None else self._quantization_error.rms(alpha)

    def generate_lda(
        self,
        prompt: Prompt,
        alpha: float = 1.0,
        max_new_tokens: int = 80,
        temperature: float = 0.8,
        top_p: float = 0.95,
        *,
        raw: bool = False,
        system: str | None = None,
        sampling: Sampling | None = None,
        stopping: Stopping | None = None,
        output: Output | None = None,
        seed: int | None = None,
    ) -> Completion:
        """One rollout from `after + alpha * (after - before)`.

        Args:
            prompt: text (one user turn if the after model has a chat template), token ids, or (role, content) turns.
            alpha: 0 is the after model, -1 the before model.
            max_new_tokens: tokens at most.
            temperature: 0 is greedy.
            top_p: nucleus mass; 1 keeps all.
            raw: take a text prompt as it is, without the template.
            system: a system turn before the prompt.
            sampling: all sampling settings; replaces `temperature`, `top_p` and `seed`.
            stopping: all stopping settings; replaces `max_new_tokens`.
            output: what to report for each token.
            seed: of the noise; drawn and reported if None.

        Raises:
            RequestError: the prompt cannot be used or does not fit.
        """
        return self.rollouts(
            prompt,
            (Branch(Role.AMPLIFIED, alpha),),
            1,
            sampling or Sampling(temperature, top_p, seed=_seed(seed)),
            stopping or Stopping(max_new_tokens),
            output,
            raw=raw,
            system=system,
        )[0]

    def generate_both(
        self,
        prompt: Prompt,
        num_sequences: int = 1,
        sampling: Sampling | None = None,
        stopping: Stopping | None = None,
        *,
        raw: bool = False,
    ) -> list[Completion]:
        """Rollouts of each model on its own, on the same noise: after, before, after, ..."""
        branches = (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0))
        return self.rollouts(prompt, branches, num_sequences, sampling, stopping, raw=raw)

    def rollouts(
        self,
        prompt: Prompt,
        branches: Sequence[Branch],
        num_sequences: int = 1,
        sampling: Sampling | None = None,
        stopping: Stopping | None = None,
        output: Output | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> list[Completion]:
        """Many rollouts of one prompt at several alphas, in one batch; ordered by sequence, then branch."""
        sampling = sampling or Sampling(seed=_seed(None))
        output = output or Output()
        parts: dict[tuple[int, Role], tuple[list[str], list[TokenRecord]]] = {}
        finished: dict[tuple[int, Role], SequenceFinished] = {}
        for event in self.stream(prompt, branches, num_sequences, sampling, stopping, output, raw=raw, system=system):
            if isinstance(event, SequenceDelta):
                texts, tokens = parts.setdefault((event.sequence_index, event.role), ([], []))
                texts.append(event.text)
                tokens.extend(event.tokens)
            elif isinstance(event, SequenceFinished):
                finished[event.sequence_index, event.role] = event
        completions = []
        for index in range(num_sequences):
            for branch in branches:
                at = (index, branch.role)
                texts, tokens = parts.get(at, ([], []))
                completions.append(_completion("".join(texts), tokens, finished[at], sampling, output))
        return completions

    def stream(
        self,
        prompt: Prompt,
        branches: Sequence[Branch],
        num_sequences: int = 1,
        sampling: Sampling | None = None,
        stopping: Stopping | None = None,
        output: Output | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> Iterator[Event]:
        """The engine's events as they happen. Leaving early frees the rows."""
        request = GenerationRequest(
            f"local-{next(self._ids)}",
            self.render(prompt, raw=raw, system=system),
            tuple(branches),
            num_sequences,
            sampling or Sampling(seed=_seed(None)),
            stopping or Stopping(),
            output or Output(),
        )
        return self._run(request)

    def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int],
        alpha: float = 1.0,
        top_candidates: int = 0,
        score_alphas: Sequence[float] = (),
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> Score:
        """Teacher-force `continuation` after `prompt` through both models.

        Raises:
            RequestError: prompt or continuation cannot be used, or do not fit.
        """
        ids = self.renderer.continuation(continuation) if isinstance(continuation, str) else tuple(continuation)
        request = ScoreRequest(
            f"local-{next(self._ids)}",
            self.render(prompt, raw=raw, system=system),
            ids,
            alpha,
            top_candidates,
            tuple(score_alphas),
        )
        blocks = [event for event in self._run(request) if isinstance(event, ScoreBlock)]
        tokens = tuple(token for block in blocks for token in block.tokens)
        return Score(tokens, dict(zip(score_alphas, blocks[-1].alpha_scores, strict=True)))

    def render(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> tuple[int, ...]:
        """The ids of a prompt."""
        if isinstance(prompt, str):
            return self.renderer.prompt(prompt, raw=raw, system=system)
        if prompt and isinstance(prompt[0], int):
            return tuple(int(token) for token in prompt)  # type: ignore[arg-type]
        return self.renderer.chat(list(prompt))  # type: ignore[arg-type]

    def _run(self, request: GenerationRequest | ScoreRequest) -> Iterator[Event]:
        with self._lock:
            self._engine.submit(request)
            try:
                while self._engine.has_work:
                    yield from self._engine.step()
            finally:
                self._engine.cancel(request.request_id)


def _seed(seed: int | None) -> int:
    return secrets.randbits(63) if seed is None else seed


def _completion(
    text: str, tokens: list[TokenRecord], end: SequenceFinished, sampling: Sampling, output: Output
) -> Completion:
    return Completion(
        completion=text,
        tokens=tuple(tokens),
        tokens_generated=end.output_tokens,
        finish_reason=end.reason,
        role=end.role,
        sequence_index=end.sequence_index,
        seed=sampling.seed,
        alpha_scores=dict(zip(output.score_alphas, end.alpha_scores, strict=True)),
    )
