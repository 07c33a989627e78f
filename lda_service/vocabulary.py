"""Whether two tokenizers make one pair, id by id, and which ids may be generated.

The policy:

* An id may be generated only if both tokenizers give it the same entry and both output layers have a row for it.
  These are the shared ids.
* Padded rows (rows of an output layer without an entry) and ids that only one of the two tokenizers knows are never
  generated: nobody trained one of the two logits, and amplification would let them win.
* An id that both know but that means different things in the two is a conflict.
* A pair is compatible if it has no conflict, at least two shared ids, and, if the after model has end-of-sequence ids,
  at least one of them shared. Equal vocabularies with different padding are compatible.
* A pair that is not compatible is loaded only with `--allow-incompatible`, and then generates its shared ids alone.
* The end-of-sequence ids of the two may differ; a sequence ends at any of either.
* Other special tokens and the chat template may differ too: that is reported, and the after model's are used.

Knows Hugging Face tokenizers; knows neither torch nor how masks are applied.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from typing import Any

from lda_service.engine.detokenizer import TokenPieces, vocabulary_entries
from lda_service.errors import PairIncompatible

logger = logging.getLogger(__name__)

CONFLICTS_MAX = 32
SHARED_IDS_MIN = 2


@dataclass(frozen=True, slots=True)
class VocabularyConflict:
    """An entry the two tokenizers disagree on: its bytes, and its id in each, None where it is absent."""

    piece: bytes
    after_id: int | None
    before_id: int | None


@dataclass(frozen=True, slots=True)
class SpecialTokenDifference:
    """A special token defined differently; an empty string where a tokenizer has none of that name."""

    name: str
    after_token: str
    before_token: str


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """How the two vocabularies compare. `conflicts` is a sample of `conflict_count` ids; ids ascend everywhere."""

    compatible: bool
    after_vocab_size: int
    before_vocab_size: int
    vocabularies_equal: bool
    conflicts: tuple[VocabularyConflict, ...]
    conflict_count: int
    after_vocab_sha256: str
    before_vocab_sha256: str
    shared_id_count: int
    after_only_ids: tuple[int, ...]
    before_only_ids: tuple[int, ...]
    after_padded_row_count: int
    before_padded_row_count: int
    special_token_differences: tuple[SpecialTokenDifference, ...]
    after_eos_ids: tuple[int, ...]
    before_eos_ids: tuple[int, ...]
    chat_templates_equal: bool
    verdict: str


@dataclass(frozen=True, slots=True)
class Side:
    """One model's half: its tokenizer, the rows of its output layer, the ids that end a sequence for it."""

    tokenizer: Any
    output_rows: int
    eos_ids: tuple[int, ...] = ()


def compare(after: Side, before: Side) -> CompatibilityReport:
    """Compare two tokenizers by the policy of this module; never raises because they differ."""
    ours, theirs = vocabulary_entries(after.tokenizer), vocabulary_entries(before.tokenizer)
    shared = _shared(ours, theirs, min(after.output_rows, before.output_rows))
    conflicting = [index for index, entry in ours.items() if theirs.get(index, entry) != entry]
    can_end = not after.eos_ids or not set(after.eos_ids).isdisjoint(shared)
    report = CompatibilityReport(
        compatible=not conflicting and len(shared) >= SHARED_IDS_MIN and can_end,
        after_vocab_size=len(ours),
        before_vocab_size=len(theirs),
        vocabularies_equal=ours == theirs,
        conflicts=_conflicts(conflicting[:CONFLICTS_MAX], ours, theirs, after.tokenizer),
        conflict_count=len(conflicting),
        after_vocab_sha256=_sha256(ours),
        before_vocab_sha256=_sha256(theirs),
        shared_id_count=len(shared),
        after_only_ids=tuple(index for index in ours if index not in theirs),
        before_only_ids=tuple(index for index in theirs if index not in ours),
        after_padded_row_count=_padded_rows(after, ours),
        before_padded_row_count=_padded_rows(before, theirs),
        special_token_differences=_special_token_differences(after.tokenizer, before.tokenizer),
        after_eos_ids=tuple(sorted(set(after.eos_ids))),
        before_eos_ids=tuple(sorted(set(before.eos_ids))),
        chat_templates_equal=after.tokenizer.chat_template == before.tokenizer.chat_template,
        verdict="",
    )
    return replace(report, verdict=_verdict(report, can_end))


def admit(after: Side, before: Side, *, allow_incompatible: bool) -> tuple[CompatibilityReport, tuple[int, ...]]:
    """Compare a pair that is to be loaded; the report, and the ids that may be generated.

    Raises:
        PairIncompatible: it is not compatible, unless that is allowed and enough ids are shared.
    """
    report, shared = compare(after, before), tuple(shared_ids(after, before))
    if not report.compatible and not (allow_incompatible and len(shared) >= SHARED_IDS_MIN):
        raise PairIncompatible(report.verdict)
    if not report.vocabularies_equal:
        logger.warning("%s", report.verdict)
    return report, shared


def shared_ids(after: Side, before: Side) -> list[int]:
    """The ids that may be generated, ascending."""
    rows = min(after.output_rows, before.output_rows)
    return _shared(vocabulary_entries(after.tokenizer), vocabulary_entries(before.tokenizer), rows)


def _shared(ours: dict[int, str], theirs: dict[int, str], rows: int) -> list[int]:
    return [index for index, entry in ours.items() if index < rows and theirs.get(index) == entry]


def _padded_rows(side: Side, entries: dict[int, str]) -> int:
    return side.output_rows - sum(index < side.output_rows for index in entries)


def _conflicts(
    ids: list[int], ours: dict[int, str], theirs: dict[int, str], tokenizer: Any
) -> tuple[VocabularyConflict, ...]:
    """For each id: the after model's piece there, and where the before model has that piece."""
    if not ids:
        return ()
    pieces = TokenPieces.from_tokenizer(tokenizer)
    their_ids = {entry: index for index, entry in theirs.items()}
    return tuple(VocabularyConflict(pieces.piece(index), index, their_ids.get(ours[index])) for index in ids)


def _sha256(entries: dict[int, str]) -> str:
    """Digest of the (id, entry) pairs by ascending id, as JSON: no entry can imitate two."""
    return hashlib.sha256(json.dumps(list(entries.items())).encode()).hexdigest()


def _special_token_differences(after: Any, before: Any) -> tuple[SpecialTokenDifference, ...]:
    ours, theirs = _special_tokens(after), _special_tokens(before)
    return tuple(
        SpecialTokenDifference(name, ours.get(name, ""), theirs.get(name, ""))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, "") != theirs.get(name, "")
    )


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    """Name to token; lists of further special tokens are joined by spaces."""
    return {
        name: " ".join(map(str, token)) if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }


def _verdict(report: CompatibilityReport, can_end: bool) -> str:
    sentences = [_finding(report), _consequence(report, can_end), _remedy(report)]
    return " ".join(sentence for sentence in sentences if sentence)


def _finding(report: CompatibilityReport) -> str:
    if report.vocabularies_equal:
        return "The two vocabularies are equal."
    if report.conflict_count == 0:
        return "The two vocabularies agree on every id that both have."
    common = report.after_vocab_size - len(report.after_only_ids)
    return f"Of {common} ids that both vocabularies have, {report.conflict_count} mean different things in the two."


def _consequence(report: CompatibilityReport, can_end: bool) -> str:
    if report.shared_id_count < SHARED_IDS_MIN:
        return f"The number of shared ids is {report.shared_id_count}, too few to sample from."
    if not can_end:
        eos = _listed(report.after_eos_ids)
        return f"No end-of-sequence id of the after model ({eos}) is shared, so its sequences would end only at limits."
    shared = f"{report.shared_id_count} shared ids may be generated"
    excluded = _excluded(report)
    never = f"; {excluded} never are" if excluded else ""
    if report.after_eos_ids == report.before_eos_ids:
        return f"{shared}{never}."
    eos = f"after: {_listed(report.after_eos_ids)}; before: {_listed(report.before_eos_ids)}"
    return f"{shared}{never}, and a sequence ends at an end-of-sequence id of either model ({eos})."


def _excluded(report: CompatibilityReport) -> str:
    """The kinds of ids that are never generated, as far as there are any."""
    counts = {
        "conflicting": report.conflict_count,
        "after-only": len(report.after_only_ids),
        "before-only": len(report.before_only_ids),
        "padded": report.after_padded_row_count + report.before_padded_row_count,
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _remedy(report: CompatibilityReport) -> str:
    if report.compatible:
        return "" if report.vocabularies_equal else "Keep ids that only one of the two knows out of prompts."
    if report.shared_id_count < SHARED_IDS_MIN:
        return "Choose two models that share a tokenizer."
    return "Choose two models that share a tokenizer, or start with --allow-incompatible to use the shared ids alone."


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) or "none"
