"""Compatibility of two tokenizers, id by id."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

from hypothesis import given, settings
from hypothesis import strategies as st
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from tokenizers_for_tests import byte_level, spelled_out

from lda_service.vocabulary import (
    CONFLICTS_MAX,
    CompatibilityReport,
    Side,
    SpecialTokenDifference,
    VocabularyConflict,
    compare,
    shared_ids,
)

ABC = {"a": 0, "b": 1, "c": 2, "</s>": 3}


def side(entries: dict[str, int], rows: int | None = None, eos: tuple[int, ...] = (3,), **tokenizer) -> Side:
    """One model's half, with a row for each id unless told otherwise; `</s>` ends a sequence."""
    return Side(spelled_out(entries, **tokenizer), max(entries.values()) + 1 if rows is None else rows, eos)


def test_fields_are_those_of_the_contract():
    """The report has exactly the fields of `TokenizerCompatResponse`, and so have its parts."""
    for kind, message in (
        (CompatibilityReport, pb.TokenizerCompatResponse),
        (VocabularyConflict, pb.VocabularyConflict),
        (SpecialTokenDifference, pb.SpecialTokenDifference),
    ):
        assert {field.name for field in fields(kind)} == set(message.DESCRIPTOR.fields_by_name)


def test_equal_vocabularies():
    """Two equal tokenizers are compatible, share every id, and have the same digest."""
    report = compare(side(ABC), side(ABC))
    assert report.compatible
    assert report.vocabularies_equal
    assert report.after_vocab_sha256 == report.before_vocab_sha256
    assert (report.after_vocab_size, report.shared_id_count, report.conflict_count) == (4, 4, 0)
    assert report.verdict == "The two vocabularies are equal. 4 shared ids may be generated."


def test_padding_may_differ():
    """Equal vocabularies with different padding are compatible, and no padded row is shared."""
    after, before = side(ABC, rows=8), side(ABC, rows=6)
    report = compare(after, before)
    assert report.compatible
    assert (report.after_padded_row_count, report.before_padded_row_count) == (4, 2)
    assert shared_ids(after, before) == [0, 1, 2, 3]
    assert "6 padded never are" in report.verdict


def test_gap_in_the_vocabulary_is_a_padded_row():
    """A row in the middle without an entry counts as padded and is not shared."""
    gapped = side({"a": 0, "c": 2}, rows=3, eos=())
    assert compare(gapped, gapped).after_padded_row_count == 1
    assert shared_ids(gapped, gapped) == [0, 2]


def test_entries_beyond_the_output_layer_are_not_shared():
    """An id that one of the two output layers has no row for is never generated, and makes no padded row."""
    after, before = side(ABC, rows=4, eos=(2,)), side(ABC, rows=3, eos=(2,))
    report = compare(after, before)
    assert report.compatible
    assert shared_ids(after, before) == [0, 1, 2]
    assert (report.after_padded_row_count, report.before_padded_row_count) == (0, 0)


def test_added_tokens_on_one_side():
    """Ids that only one tokenizer knows are listed, never shared, and no obstacle."""
    after, before = side(ABC | {"<tool>": 5}), side(ABC | {"x": 4})
    report = compare(after, before)
    assert report.compatible
    assert not report.vocabularies_equal
    assert (report.after_only_ids, report.before_only_ids) == ((5,), (4,))
    assert shared_ids(after, before) == [0, 1, 2, 3]
    assert "1 after-only, 1 before-only" in report.verdict
    assert "out of prompts" in report.verdict


def test_conflict_names_piece_and_both_ids():
    """An id that means different things is a conflict, reported with the after piece's id in the before tokenizer."""
    report = compare(side(ABC), side({"a": 0, "c": 1, "b": 2, "</s>": 3}))
    assert not report.compatible
    assert report.conflict_count == 2
    assert report.conflicts == (VocabularyConflict(b"b", 1, 2), VocabularyConflict(b"c", 2, 1))
    assert "Of 4 ids that both vocabularies have, 2 mean different things" in report.verdict
    assert "2 shared ids may be generated; 2 conflicting never are" in report.verdict
    assert "--allow-incompatible" in report.verdict


def test_conflict_with_a_piece_the_other_lacks():
    """A replaced entry has no id in the before tokenizer."""
    report = compare(side(ABC | {"<tool>": 4}), side(ABC | {"<reserved>": 4}))
    assert report.conflicts == (VocabularyConflict(b"<tool>", 4, None),)


def test_conflict_pieces_are_raw_bytes():
    """Conflicts show the bytes of a byte-level entry, not its spelling in GPT-2's alphabet."""
    tokenizer = byte_level()
    other = {entry: index for entry, index in tokenizer.get_vocab().items() if entry != "Ġ"}
    space = tokenizer.convert_tokens_to_ids("Ġ")
    report = compare(Side(tokenizer, len(tokenizer)), Side(spelled_out(other | {"@@": space}), len(tokenizer)))
    assert report.conflicts == (VocabularyConflict(b" ", space, None),)


def test_sample_of_conflicts_is_bounded():
    """Of many conflicts all are counted and the first ones shown."""
    entries = {f"t{index}": index for index in range(100)}
    shifted = {entry: (index + 1) % 100 for entry, index in entries.items()}
    report = compare(side(entries), side(shifted))
    assert (report.conflict_count, len(report.conflicts)) == (100, CONFLICTS_MAX)
    assert report.conflicts[0] == VocabularyConflict(b"t0", 0, 1)


def test_nothing_in_common():
    """With fewer than two shared ids the remedy is another pair, not the flag."""
    report = compare(side({"a": 0, "b": 1}, eos=()), side({"a": 0, "c": 1}, eos=()))
    assert not report.compatible
    assert report.shared_id_count == 1
    assert "too few" in report.verdict
    assert "--allow-incompatible" not in report.verdict


def test_eos_must_be_shared():
    """An after model whose only end-of-sequence id is unknown to the before model is not compatible."""
    report = compare(side(ABC | {"<end>": 4}, eos=(4,)), side(ABC))
    assert not report.compatible
    assert "No end-of-sequence id of the after model (4) is shared" in report.verdict
    assert "--allow-incompatible" in report.verdict


def test_one_shared_eos_is_enough():
    """Of several end-of-sequence ids one has to be shared; those of the two models may differ."""
    report = compare(side(ABC | {"<end>": 4}, eos=(4, 3, 4)), side(ABC, eos=(2,)))
    assert report.compatible
    assert (report.after_eos_ids, report.before_eos_ids) == ((3, 4), (2,))
    assert "a sequence ends at an end-of-sequence id of either model (after: 3, 4; before: 2)" in report.verdict


def test_model_without_eos():
    """An after model without end-of-sequence ids is no obstacle; sequences end at limits, as it was made."""
    report = compare(side(ABC, eos=()), side(ABC))
    assert report.compatible
    assert "(after: none; before: 3)" in report.verdict


def test_special_tokens_and_templates_are_compared():
    """Special tokens that differ are reported by name, an absent one as an empty string; so are templates."""
    after = side(ABC, eos_token="</s>", pad_token="c", chat_template="{{ messages }}")
    before = side(ABC, eos_token="</s>", bos_token="a")
    report = compare(after, before)
    assert report.compatible
    assert report.special_token_differences == (
        SpecialTokenDifference("bos_token", "", "a"),
        SpecialTokenDifference("pad_token", "c", ""),
    )
    assert not report.chat_templates_equal
    assert compare(after, after).chat_templates_equal


def test_lists_of_special_tokens_are_joined():
    """A list of further special tokens is compared as one string."""

    class Listed:
        chat_template = None
        added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

        def __init__(self, *tokens: str) -> None:
            self.special_tokens_map = {"additional_special_tokens": list(tokens)}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    report = compare(Side(Listed("<x>", "<y>"), 2), Side(Listed("<x>"), 2))
    assert report.special_token_differences == (SpecialTokenDifference("additional_special_tokens", "<x> <y>", "<x>"),)


def test_added_token_hides_an_entry():
    """Where an added token reuses the id of an entry, the added token counts, as it does in decoding."""

    class Shadowing:
        chat_template = None
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def __init__(self, content: str) -> None:
            self.added_tokens_decoder = {1: type("Added", (), {"content": content})}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "<tool>": 1, "c": 2}

    assert compare(Side(Shadowing("<tool>"), 3), Side(Shadowing("<tool>"), 3)).vocabularies_equal
    assert shared_ids(Side(Shadowing("<tool>"), 3), Side(Shadowing("b"), 3)) == [0, 2]


def test_digest_depends_on_ids_and_not_on_order():
    """The digest is the same for any order of the entries, and another one once two ids are swapped."""
    digest = compare(side(ABC), side(dict(reversed(ABC.items())))).before_vocab_sha256
    assert digest == compare(side(ABC), side(ABC)).after_vocab_sha256
    assert digest != compare(side(ABC), side({"b": 0, "a": 1, "c": 2, "</s>": 3})).before_vocab_sha256


def test_digest_is_stable():
    """The digest of a given vocabulary never changes between versions: it may be stored next to results."""
    digest = "7ade698f85e2c1121598f005acc51befa60401fbe57deb957df3e19d77b4c3a9"
    assert compare(side(ABC), side(ABC)).after_vocab_sha256 == digest


vocabularies = st.dictionaries(st.integers(0, 12), st.sampled_from("abcdefgh"), min_size=1).map(
    lambda by_id: {entry: index for index, entry in by_id.items()}
)


@settings(max_examples=100, deadline=None)
@given(vocabularies, vocabularies, st.integers(0, 14), st.integers(0, 14))
def test_every_row_is_accounted_for(ours, theirs, after_rows, before_rows):
    """Shared ids are what a look-up id by id says, and ids in common are shared, conflicting or without a row."""
    after, before = side(ours, after_rows, ()), side(theirs, before_rows, ())
    report = compare(after, before)
    by_id = [{index: entry for entry, index in entries.items()} for entries in (ours, theirs)]
    rows = range(min(after_rows, before_rows))
    expected = [index for index in rows if index in by_id[0] and by_id[0][index] == by_id[1].get(index)]
    assert shared_ids(after, before) == expected
    assert report.shared_id_count == len(expected)
    common = by_id[0].keys() & by_id[1].keys()
    assert report.conflict_count == sum(by_id[0][index] != by_id[1][index] for index in common)
    assert set(report.after_only_ids) == by_id[0].keys() - common
    assert report.after_padded_row_count == sum(index not in by_id[0] for index in range(after_rows))


def test_no_torch():
    """The module is imported without torch or transformers."""
    code = "import sys, lda_service.vocabulary; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
