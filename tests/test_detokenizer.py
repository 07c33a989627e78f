"""Token ids to text: bytes, whole characters, stop strings."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import MIXED_SCRIPTS, byte_level, sentencepiece_like, spelled_out

from lda_service.engine.detokenizer import Released, TextStream, TokenPieces
from lda_service.engine.request import TokenRecord
from lda_service.errors import InvalidRequest

quick = settings(max_examples=100, deadline=None)


@cache
def byte_tokenizer() -> Any:
    """A byte-level tokenizer with two added tokens that are not special."""
    return byte_level(added=("[tool]", "two words"))


@cache
def byte_pieces() -> TokenPieces:
    """Its pieces."""
    return TokenPieces.from_tokenizer(byte_tokenizer())


SINGLE_BYTES = TokenPieces(tuple(bytes([byte]) for byte in range(256)), frozenset())


def spelled(chunks: list[bytes]) -> tuple[TokenPieces, list[int]]:
    """A vocabulary made of these chunks, and the ids that spell them in order."""
    return TokenPieces(tuple(chunks), frozenset()), list(range(len(chunks)))


def run(pieces: TokenPieces, ids: list[int], stops: tuple[str, ...] = (), flush: bool = True) -> list[Released]:
    """Push until a stop string matches; if none does, flush."""
    stream, out = TextStream(pieces, stops), []
    for token_id in ids:
        out.append(stream.push(TokenRecord(token_id, pieces.piece(token_id))))
        if out[-1].stop_string is not None:
            return out
    return [*out, stream.flush()] if flush else out


def text_of(released: list[Released]) -> str:
    """All text, joined."""
    return "".join(part.text for part in released)


def ids_of(released: list[Released]) -> list[int]:
    """The ids of all tokens released, in order."""
    return [record.token_id for part in released for record in part.tokens]


class TestTokenPieces:
    def test_byte_level_pieces_are_the_bytes(self):
        """The pieces of a byte-level encoding, joined, are the UTF-8 of the text."""
        for text in MIXED_SCRIPTS:
            ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
            assert b"".join(map(byte_pieces().piece, ids)) == text.encode()

    def test_byte_level_covers_every_byte(self):
        """Each of the 256 bytes is the piece of some id."""
        assert {bytes([byte]) for byte in range(256)} <= set(byte_pieces().pieces)

    def test_added_tokens_are_verbatim(self):
        """An added token's piece is its text, even where that text leaves the byte alphabet."""
        for token in ("[tool]", "two words"):
            assert byte_pieces().piece(byte_tokenizer().convert_tokens_to_ids(token)) == token.encode()

    def test_added_tokens_are_not_read_in_the_byte_alphabet(self):
        """An added `né` is those letters. Read in GPT-2's alphabet, as `decode` does, its é would be a stray byte."""
        tokenizer = byte_level(added=("né",))
        ids = tokenizer("né", add_special_tokens=False).input_ids
        assert len(ids) == 1
        assert text_of(run(TokenPieces.from_tokenizer(tokenizer), ids)) == "né"

    def test_special_tokens_have_a_piece_and_no_text(self):
        """A special token shows in `piece`, is listed in `special_ids`, and adds no text."""
        eos = byte_tokenizer().eos_token_id
        assert eos in byte_pieces().special_ids
        assert byte_pieces().piece(eos) == b"<|eos|>"
        assert byte_pieces().text_bytes(eos) == b""
        assert byte_tokenizer().convert_tokens_to_ids("[tool]") not in byte_pieces().special_ids

    def test_ids_without_entry_are_empty(self):
        """Padded rows and negative ids have no bytes."""
        assert byte_pieces().piece(10**6) == b""
        assert byte_pieces().piece(-1) == b""

    def test_gaps_in_the_vocabulary_are_empty(self):
        """An id that the vocabulary skips has no bytes, and its neighbours keep theirs."""
        pieces = TokenPieces.from_tokenizer(spelled_out({"a": 0, "c": 2}))
        assert [pieces.piece(index) for index in range(3)] == [b"a", b"", b"c"]

    def test_sentencepiece_pieces(self):
        """`▁` is a space, `<0x0A>` a line break, and added runs of `▁` are spaces as the decoder makes them."""
        tokenizer = sentencepiece_like(added=("▁▁", "[tool]"))
        pieces = TokenPieces.from_tokenizer(tokenizer)
        expected = {"▁": b" ", "<0x0A>": b"\n", "<0xE6>": b"\xe6", "▁▁": b"  ", "[tool]": b"[tool]", "</s>": b"</s>"}
        assert {entry: pieces.piece(tokenizer.convert_tokens_to_ids(entry)) for entry in expected} == expected

    def test_sentencepiece_text_equals_decode(self):
        """A SentencePiece-like encoding streams to what the tokenizer decodes, but for the space it strips in front."""
        tokenizer = sentencepiece_like()
        pieces = TokenPieces.from_tokenizer(tokenizer)
        for text in MIXED_SCRIPTS:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert text_of(run(pieces, ids)).removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=True)

    def test_unknown_kinds_are_decoded_id_by_id(self):
        """A vocabulary of another kind yields what `decode` says of each id."""
        pieces = TokenPieces.from_tokenizer(spelled_out({"Grüße": 0, "▁x": 1}))
        assert pieces.pieces == ("Grüße".encode(), "▁x".encode())

    def test_tokenizer_without_backend(self):
        """A slow tokenizer with byte entries is read like SentencePiece, any other decoded id by id."""

        class Slow:
            all_special_ids = ()
            added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

            def __init__(self, *entries: str) -> None:
                self.get_vocab = lambda: {entry: index for index, entry in enumerate(entries)}

            def decode(self, ids, **_kwargs):
                return f"({ids[0]})"

        assert TokenPieces.from_tokenizer(Slow("<0x0A>", "▁a")).pieces == (b"\n", b" a")
        assert TokenPieces.from_tokenizer(Slow("a")).pieces == (b"(0)",)

    def test_no_torch(self):
        """The module is imported without torch or transformers."""
        code = "import sys, lda_service.engine.detokenizer; assert not {'torch', 'transformers'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestWholeCharacters:
    @quick
    @given(st.data())
    def test_any_ids_stream_to_what_decode_says(self, data):
        """Any token sequence, sensible or not, joins to `decode(ids, skip_special_tokens=True)`; all are released."""
        ids = data.draw(st.lists(st.integers(0, len(byte_tokenizer()) - 1), max_size=40))
        released = run(byte_pieces(), ids)
        assert text_of(released) == byte_tokenizer().decode(ids, skip_special_tokens=True)
        assert ids_of(released) == ids

    @quick
    @given(st.text(max_size=60))
    def test_any_text_survives(self, text):
        """Text that was encoded streams back unchanged."""
        ids = byte_tokenizer()(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert text_of(run(byte_pieces(), ids)) == text

    @quick
    @given(st.text(max_size=30))
    def test_every_release_is_whole_characters(self, text):
        """Byte by byte, each release extends the text by whole characters of it, never by a replacement character."""
        text = text.replace("\ufffd", "")
        so_far = ""
        for part in run(SINGLE_BYTES, list(text.encode()), ("never in the text\x00",)):
            so_far += part.text
            assert text.startswith(so_far)
        assert so_far == text

    def test_half_a_character_is_released_without_text(self):
        """A token with half a character leaves at once; its text comes with the token that completes it."""
        released = run(SINGLE_BYTES, list("é".encode()), flush=False)
        assert [(part.text, len(part.tokens)) for part in released] == [("", 1), ("é", 1)]

    def test_unfinished_character_at_the_end(self):
        """A sequence that ends inside a character ends in one replacement character."""
        assert text_of(run(SINGLE_BYTES, list("aé".encode()[:-1]))) == "a\ufffd"

    def test_flush_twice(self):
        """A second flush has nothing left to release."""
        stream = TextStream(SINGLE_BYTES, ("ab",))
        stream.push(TokenRecord(ord("a"), b"a"))
        assert stream.flush().text == "a"
        assert stream.flush() == Released("", (), None)


ALPHABET = "ab é\n"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4, unique=True).map(tuple)


@st.composite
def split_bytes(draw) -> list[bytes]:
    """A text over a small alphabet with stray bytes in it, cut into chunks anywhere; empty ones are special tokens."""
    data = b"".join(draw(st.lists(st.sampled_from([*(c.encode() for c in ALPHABET), b"\xc3", b"\xa9"]), max_size=30)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=20)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def earliest(data: bytes, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """The naive oracle: where the whole data is cut, and by which stop string."""
    matches = [(data.find(stop.encode()), -len(stop.encode()), stop) for stop in stops if stop.encode() in data]
    return (min(matches)[0], min(matches)[2]) if matches else None


def ended_by_token(chunks: list[bytes], stops: tuple[str, ...]) -> list[bytes]:
    """The chunks up to and with the first that completes a stop string."""
    for count in range(1, len(chunks) + 1):
        if earliest(b"".join(chunks[:count]), stops):
            return chunks[:count]
    return chunks


class TestStopStrings:
    @settings(max_examples=250, deadline=None)
    @given(split_bytes(), STOPS)
    def test_text_is_cut_where_the_naive_oracle_cuts(self, chunks, stops):
        """The joined text is all text up to the earliest stop string, however the bytes are split into tokens.

        And a token is released exactly if its bytes end at or before the cut.
        """
        chunks = ended_by_token(chunks, stops)
        data = b"".join(chunks)
        cut, stop = earliest(data, stops) or (len(data), None)
        released = run(*spelled(chunks), stops)
        assert text_of(released) == data[:cut].decode(errors="replace")
        assert released[-1].stop_string == stop
        ends = [len(b"".join(chunks[: index + 1])) for index in range(len(chunks))]
        assert ids_of(released) == [index for index, end in enumerate(ends) if end <= cut]

    @settings(max_examples=250, deadline=None)
    @given(split_bytes(), STOPS)
    def test_the_split_into_tokens_does_not_matter(self, chunks, stops):
        """Unless one stop string stands inside another, the text is that of the uncut bytes."""
        stops = tuple(a for a in stops if not any(a != b and a in b for b in stops))
        data = b"".join(chunks)
        cut, stop = earliest(data, stops) or (len(data), None)
        released = run(*spelled(chunks), stops)
        assert text_of(released) == data[:cut].decode(errors="replace")
        assert released[-1].stop_string == stop

    @quick
    @given(split_bytes(), STOPS)
    def test_nothing_of_a_stop_string_is_released_early(self, chunks, stops):
        """After every push, what has been released is a prefix of the final text: nothing is ever taken back."""
        chunks = ended_by_token(chunks, stops)
        data = b"".join(chunks)
        cut, _ = earliest(data, stops) or (len(data), None)
        final = data[:cut].decode(errors="replace")
        pieces, ids = spelled(chunks)
        released = run(pieces, ids, stops)
        for count in range(len(released) + 1):
            assert final.startswith(text_of(released[:count]))
            assert data[:cut].startswith(b"".join(map(pieces.piece, ids_of(released[:count]))))

    @quick
    @given(st.data(), STOPS)
    def test_real_vocabulary(self, data, stops):
        """With a trained vocabulary, the text is the decoded text before the earliest stop string."""
        stops = tuple(a for a in stops if not any(a != b and a in b for b in stops))
        text = data.draw(st.text(ALPHABET, max_size=40))
        ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
        cut, _ = min(((text.find(stop), stop) for stop in stops if stop in text), default=(len(text), None))
        assert text_of(run(byte_pieces(), ids, stops)) == text[:cut]

    def test_longest_of_several_at_one_position(self):
        """Two stop strings that start at the same place and complete together: the longer one is named."""
        released = run(*spelled([b"x", b"abc"]), ("ab", "abc"))
        assert (text_of(released), released[-1].stop_string) == ("x", "abc")

    def test_the_token_that_completes_a_stop_string_ends_the_text(self):
        """A stop string inside a longer one that has only begun ends the text: nobody waits for the longer one."""
        released = run(*spelled([b"a", b"b", b"c", b"d"]), ("bc", "abcd"))
        assert (text_of(released), released[-1].stop_string) == ("a", "bc")

    def test_held_prefix_is_released_when_it_leads_nowhere(self):
        """Text that only began like a stop string comes out with the token that settles it, or with the flush."""
        released = run(*spelled([b"x", b"a", b"a", b"b!", b"a"]), ("aab?",))
        assert [part.text for part in released] == ["x", "", "", "aab!", "", "a"]
        assert [len(part.tokens) for part in released] == [1, 0, 0, 3, 0, 1]

    def test_stop_string_across_a_special_token(self):
        """Special tokens add no text, so a stop string may span one; the special token goes with it."""
        pieces = TokenPieces((b"x", b"a", b"<eos>", b"b"), frozenset({2}))
        released = run(pieces, [2, 0, 1, 2, 3], ("ab",))
        assert (text_of(released), ids_of(released), released[-1].stop_string) == ("x", [2, 0], "ab")

    def test_token_half_before_the_stop_is_withheld(self):
        """A token whose first bytes stand before the stop gives its text, but not its piece."""
        released = run(*spelled([b"x", b"yST", b"OP"]), ("STOP",))
        assert (text_of(released), ids_of(released)) == ("xy", [0])

    def test_pushes_after_the_stop_are_dropped(self):
        """Once a stop string matched, further tokens and the flush release nothing, and still name it."""
        stream = TextStream(SINGLE_BYTES, ("a",))
        for token_id in b"ab":
            assert stream.push(TokenRecord(token_id, bytes([token_id]))) == Released("", (), "a")
        assert stream.flush() == Released("", (), "a")

    def test_empty_stop_string(self):
        """An empty stop string is refused with the field's path."""
        with pytest.raises(InvalidRequest, match="leave it out") as caught:
            TextStream(SINGLE_BYTES, ("a", ""))
        assert caught.value.field == "stopping.stop_strings"

    def test_cost_does_not_grow_with_the_text(self):
        """However long the text, a stream holds no more bytes than the longest stop string could need."""
        stream = TextStream(SINGLE_BYTES, ("aaab",))
        for token_id in b"aaaaa b" * 1000:
            stream.push(TokenRecord(token_id, bytes([token_id])))
            assert len(stream._held) < len("aaab")
            assert len(stream._waiting) < len("aaab")
