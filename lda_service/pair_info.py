"""What is known about a loaded pair, as plain data: identity of the models, vocabulary report, limits.

Made once when the pair is loaded; read by the servicer and the library. Knows neither torch nor the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lda_service.vocabulary import CompatibilityReport


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One loaded model. `revision` is a digest of its weights, `vocab_size` counts rows of its output layer."""

    model_id: str
    revision: str
    dtype: str
    vocab_size: int
    architecture: str
    parameter_count: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class PairInfo:
    """Both models, where they run, and how their vocabularies compare."""

    after: ModelInfo
    before: ModelInfo
    device: str
    fingerprint: str
    has_chat_template: bool
    compatibility: CompatibilityReport

    @property
    def context_tokens(self) -> int:
        """The longest sequence that both models reach."""
        return min(self.after.context_tokens, self.before.context_tokens)
