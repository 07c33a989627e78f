"""Static steps for running sequences: which bucket, what goes into its buffers, and one launch ahead of the host.

A launch draws one token for each of its sequences. As long as the same sequences go on, the next launch follows without
the host having seen the last one's tokens. A sequence that turns out to have ended is run once more, for nothing: that
writes within the pages it had, before whoever gets them next writes there, and what it drew is not accepted. What is
on its way when a request is cancelled or its time is up is not accepted either. Pages must be reserved for a
sequence's longest course when it starts: a step ahead writes where the host has not looked yet.

Determinism: a draw's noise hangs on the sequence and the position alone, so neither company nor the launch ahead
changes it. The last bits of the logits may hang on a step's shape. With `one_shape`, every step has the most rows, the
longest context and all candidates, whoever is there; paged attention always runs in one split. First tokens, and
tokens of rows that need evidence, are drawn in ordinary steps, which the engine then makes for one row at a time.

Knows sequences and buckets; nothing of text, events or endings.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lda_service.engine.cuda_graph import Graphs, HostCopy
from lda_service.engine.paged_attention import Kind, Lane, find_kernel
from lda_service.engine.sampling import CANDIDATES
from lda_service.engine.static_step import Bucket, StaticStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lda_service.config import EngineConfig
    from lda_service.engine.lockstep import PairRunner
    from lda_service.engine.paged_attention import PagedKernel
    from lda_service.engine.pair import Pair
    from lda_service.engine.request import Sampling
    from lda_service.engine.sampling import RowSampling, Sampler
    from lda_service.engine.scheduler import Job, Sequence

logger = logging.getLogger(__name__)
SMALLEST_CONTEXT = 256
CANDIDATE_GROWTH = 8
KEPT_STEPS = 32


class Outcome(NamedTuple):
    """What a launch drew for a sequence. `enough` False: not enough candidates, the token means nothing."""

    sequence: Sequence
    token: int
    logprob: float
    sound: bool
    enough: bool


@dataclass(slots=True)
class Part:
    """The sequences of a launch that need the same models."""

    sequences: list[Sequence]
    positions: list[int]  # of the tokens that are run
    run: CompiledStep
    results: HostCopy


@dataclass(slots=True)
class Launch:
    """A step on its way. `void`: sequences whose last token was drawn anew after this was launched."""

    parts: list[Part]
    void: set[Sequence] = field(default_factory=set)

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, in the order of their outcomes."""
        return [sequence for part in self.parts for sequence in part.sequences]


class CompiledStep(NamedTuple):
    """A static step, and what runs it."""

    step: StaticStep
    replay: Callable[[], None]


class StaticDecoder:
    """Launches static steps.

    Args:
        models: both runners; the last slot of their caches belongs to nobody.
        sampler: what draws.
        kernel: for attention; None: rows gather their context.
        one_shape: see above.
    """

    def __init__(
        self, models: PairRunner, sampler: Sampler, kernel: PagedKernel | None = None, *, one_shape: bool = False
    ) -> None:
        self.models, self.sampler, self.kernel, self.one_shape = models, sampler, kernel, one_shape
        self.max_rows, self.max_context = models.slot_map.slots.shape
        models.slot_map.add_nobody(models.native[0].cache.num_slots - 1)
        self._graphs = Graphs(models.device)
        self._steps: OrderedDict[Bucket, CompiledStep] = OrderedDict()
        self._candidates: dict[Sequence | Job, int] = {}

    def launch(self, sequences: list[Sequence], settings: Callable[[list[Sequence]], RowSampling]) -> Launch:
        """Run the sequences' last tokens, which the host knows, and draw their next ones."""
        parts = []
        for group in _by_needs(sequences):
            positions = [sequence.length - 1 for sequence in group]
            compiled = self._compiled(self._bucket(group, max(positions) + 1))
            rows = [sequence.row for sequence in group]
            compiled.step.load([sequence.tokens[-1] for sequence in group], positions, rows, settings(group))
            if compiled.step.paged is not None:
                compiled.step.paged.load([_lane(sequence) for sequence in group])
            parts.append(self._run(group, positions, compiled))
        return Launch(parts)

    def continues(self, launch: Launch, sequences: list[Sequence]) -> bool:
        """Whether the next step can follow this one as it is, for these sequences.

        Not if all of them are known to end with this one.
        """
        return (
            not launch.void
            and set(launch.sequences) == set(sequences)
            and all(max(part.positions) + 2 <= part.run.step.bucket.context for part in launch.parts)
            and any(len(sequence.tokens) + 1 < sequence.max_new_tokens for sequence in sequences)
        )

    def follow(self, launch: Launch) -> Launch:
        """Launch the next step, with the ids that this one leaves on the device."""
        parts = [self._run(part.sequences, [p + 1 for p in part.positions], part.run) for part in launch.parts]
        return Launch(parts)

    def outcomes(self, launch: Launch) -> Iterator[Outcome]:
        """What was drawn for the sequences that still wait for it; waits for the step."""
        for part in launch.parts:
            tokens, logprobs, sound, enough = part.results.read()
            for i, sequence in enumerate(part.sequences):
                expects = sequence.is_running and sequence.length == part.positions[i] + 1
                if expects and sequence not in launch.void:
                    yield Outcome(sequence, int(tokens[i]), logprobs[i], bool(sound[i]), bool(enough[i]))

    def redraw(self, sequence: Sequence, ahead: Launch | None) -> None:
        """The candidates were not enough: its token will be drawn by an ordinary step, and with more from then on."""
        bucket_candidates = max(CANDIDATES, self._candidates.get(sequence, 0), sampling(sequence).top_k + 1)
        self._candidates[sequence] = bucket_candidates * CANDIDATE_GROWTH
        self.models.rewind(sequence)
        if ahead is not None:
            ahead.void.add(sequence)

    def forget(self, owner: Sequence | Job) -> None:
        """The owner has left."""
        self._candidates.pop(owner, None)

    def _run(self, sequences: list[Sequence], positions: list[int], compiled: CompiledStep) -> Part:
        self.models.note_decoded(sequences, positions)
        compiled.replay()
        return Part(sequences, positions, compiled, HostCopy(compiled.step.results))

    def _compiled(self, bucket: Bucket) -> CompiledStep:
        """The step of a bucket, made at its first use; the one not used for longest makes room."""
        if bucket not in self._steps:
            if len(self._steps) == KEPT_STEPS:
                self._steps.popitem(last=False)
            step = StaticStep(self.models, self.sampler, bucket, self.kernel)
            self._steps[bucket] = CompiledStep(step, self._graphs.capture(step.run))
        self._steps.move_to_end(bucket)
        return self._steps[bucket]

    def _bucket(self, sequences: list[Sequence], context: int) -> Bucket:
        needs = sequences[0].needs
        if self.one_shape:
            return Bucket(self.max_rows, self.max_context, self.models.vocabulary, needs)
        rows = min(_power_of_two(len(sequences)), self.max_rows)
        context = min(max(_power_of_two(context), SMALLEST_CONTEXT), self.max_context)
        return Bucket(rows, context, max(map(self._candidates_of, sequences)), needs)

    def _candidates_of(self, sequence: Sequence) -> int:
        asked = sampling(sequence)
        if asked.temperature == 0 or not (asked.top_k or asked.top_p < 1 or asked.min_p):
            return 0
        return self._width(max(asked.top_k + 1, self._candidates.get(sequence, 0)))

    def _width(self, wanted: int) -> int:
        """`CANDIDATES` and what follows from its growth, so that there are few buckets."""
        width = CANDIDATES
        while width < wanted:
            width *= CANDIDATE_GROWTH
        return min(width, self.models.vocabulary)


def wanted(config: EngineConfig, pair: Pair) -> bool:
    """Whether an engine over this pair decodes in static steps: if models and settings allow that."""
    on_cuda = pair.after.device.type == "cuda"
    return pair.has_two_caches and (config.static_step == "on" or (config.static_step == "auto" and on_cuda))


def kernel_for(pair: Pair, page_tokens: int) -> PagedKernel | None:
    """The paged kernel, for those layers of the two models for which it is right on this machine."""
    kinds = set()
    for model in (pair.after, pair.before):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kinds.add(Kind(model.dtype, heads, getattr(config, "num_key_value_heads", None) or heads, head_dim))
    return find_kernel(pair.after.device, page_tokens, kinds)


def sampling(sequence: Sequence) -> Sampling:
    """How the sequence's tokens are drawn."""
    return sequence.job.request.sampling  # type: ignore[union-attr]


def _by_needs(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Those that need the same models together, and among them those of one prompt."""
    groups: dict[tuple[bool, bool], list[Sequence]] = {}
    for sequence in sorted(sequences, key=lambda s: s.job.table.pages):  # type: ignore[union-attr]
        groups.setdefault(sequence.needs, []).append(sequence)
    return list(groups.values())


def _lane(sequence: Sequence) -> Lane:
    assert sequence.job.table is not None
    assert sequence.table is not None
    return Lane(sequence.job.table.pages, len(sequence.job.prompt_ids), sequence.table.pages)


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()
