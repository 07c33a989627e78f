"""Token ids to whole UTF-8 text, incrementally, with stop strings.

Works on bytes throughout: tokens may split characters, and stop strings may split tokens. Knows the vocabulary's bytes;
knows nothing of models, of sampling, of end-of-sequence ids, and not when a sequence should end for another reason than
a stop string.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lda_service.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lda_service.engine.request import TokenRecord

_METASPACE = "▁"
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def vocabulary_entries(tokenizer: Any) -> dict[int, str]:
    """Id to entry of a Hugging Face tokenizer, by ascending id.

    An added token hides an entry of the vocabulary that has its id, as it does in decoding.
    """
    pairs = sorted(((index, entry) for entry, index in tokenizer.get_vocab().items()), reverse=True)
    entries = dict(pairs) | {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    return dict(sorted(entries.items()))


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """The raw bytes of every id of one tokenizer, and which ids are special.

    `pieces[i]` belongs to id `i`; ids without an entry have no bytes. Special tokens have a piece but add no text.
    """

    pieces: tuple[bytes, ...]
    special_ids: frozenset[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenPieces:
        """Read the vocabulary of a Hugging Face tokenizer.

        Byte-level and SentencePiece-like vocabularies are read entry by entry; any other is decoded id by id, which
        loses what only shows between two tokens.
        """
        added = tokenizer.added_tokens_decoder
        to_bytes = _reader(tokenizer)
        # An added token stands for its own text, except that SentencePiece-like decoders rewrite it like any other.
        verbatim = {} if to_bytes is _metaspace else added
        found = {
            index: entry.encode() if index in verbatim else to_bytes(index, entry)
            for index, entry in vocabulary_entries(tokenizer).items()
        }
        special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        size = max(found, default=-1) + 1
        return cls(tuple(found.get(index, b"") for index in range(size)), frozenset(special))

    def piece(self, token_id: int) -> bytes:
        """The bytes of an id, special or not; empty for an id without an entry, such as a padded row."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes an id adds to the text: its piece, or nothing for a special token."""
        return b"" if token_id in self.special_ids else self.piece(token_id)


class Released(NamedTuple):
    """What became final: whole characters, and the tokens all of whose bytes have been released.

    `stop_string` is set once the sequence has ended by one.
    """

    text: str
    tokens: tuple[TokenRecord, ...]
    stop_string: str | None


class TextStream:
    """The text of one sequence, token by token.

    A token that completes a stop string ends the text. If it completes several, the earliest position wins, then the
    longest string; the text ends before it, and nothing of it is ever released, neither as text nor as the piece of a
    token. Bytes that may turn out to begin a stop string are held back until the next tokens decide.

    The cost of a push depends on the token and on the stop strings, not on the length of the text.

    Args:
        pieces: the vocabulary of the pair.
        stop_strings: strings that end the text; none of them empty.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    __slots__ = ("_decoder", "_held", "_pieces", "_released", "_stop_string", "_stops", "_waiting")

    def __init__(self, pieces: TokenPieces, stop_strings: tuple[str, ...] = ()) -> None:
        self._pieces = pieces
        self._stops = _stop_set(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._released = 0
        self._waiting: deque[tuple[int, TokenRecord]] = deque()  # with the offset at which each token's bytes end
        self._stop_string: str | None = None

    def push(self, record: TokenRecord) -> Released:
        """Add one token; returns what it made final. After a stop string every further token is dropped."""
        if self._stop_string is not None:
            return Released("", (), self._stop_string)
        pending = self._held + self._pieces.text_bytes(record.token_id)
        self._waiting.append((self._released + len(pending), record))
        match = self._stops.find(pending)
        if match is not None:
            return self._end_at(pending, *match)
        return self._release(pending, len(pending) - self._stops.held_length(pending))

    def flush(self) -> Released:
        """The sequence ended for another reason: release everything held, an unfinished character as U+FFFD."""
        return self._release(self._held, len(self._held), final=True)

    def _end_at(self, pending: bytes, start: int, stop_string: str) -> Released:
        """End the text at `start` of the pending bytes, and forget the rest."""
        self._stop_string = stop_string
        released = self._release(pending, start, final=True)
        self._held = b""
        return released

    def _release(self, pending: bytes, count: int, final: bool = False) -> Released:
        """Release the first `count` pending bytes, hold the others."""
        self._held = pending[count:]
        self._released += count
        text = self._decoder.decode(pending[:count], final)
        tokens = []
        while self._waiting and self._waiting[0][0] <= self._released:
            tokens.append(self._waiting.popleft()[1])
        return Released(text, tuple(tokens), self._stop_string)


@dataclass(frozen=True, slots=True)
class _StopSet:
    """Stop strings with their UTF-8 bytes, and all proper prefixes of those bytes."""

    stops: tuple[tuple[bytes, str], ...]
    prefixes: frozenset[bytes]
    longest_prefix: int

    def find(self, data: bytes) -> tuple[int, str] | None:
        """Position and stop string of the earliest match in `data`, the longest one if several start there."""
        matches = [(data.find(stop), -len(stop), text) for stop, text in self.stops if stop in data]
        if not matches:
            return None
        start, _, text = min(matches)
        return start, text

    def held_length(self, data: bytes) -> int:
        """Length of the longest suffix of `data` that is a proper prefix of a stop string."""
        for start in range(max(0, len(data) - self.longest_prefix), len(data)):
            if data[start:] in self.prefixes:
                return len(data) - start
        return 0


@lru_cache(maxsize=32)
def _stop_set(stop_strings: tuple[str, ...]) -> _StopSet:
    """All sequences of a request share one."""
    if "" in stop_strings:
        raise InvalidRequest(
            "A stop string is empty and would end every text at once: leave it out.", field="stopping.stop_strings"
        )
    # A lone surrogate has no UTF-8; it passes, and never matches.
    stops = tuple((text.encode("utf-8", "surrogatepass"), text) for text in stop_strings)
    prefixes = frozenset(stop[:length] for stop, _ in stops for length in range(1, len(stop)))
    return _StopSet(stops, prefixes, max(map(len, prefixes), default=0))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(_index: int, entry: str) -> bytes:
    """An entry in GPT-2's alphabet; one that leaves the alphabet stands for itself, as in `tokenizers`."""
    try:
        return bytes([_ALPHABET[character] for character in entry])
    except KeyError:
        return entry.encode()


def _metaspace(_index: int, entry: str) -> bytes:
    """An entry of a SentencePiece-like vocabulary, or one of its 256 bytes."""
    byte = _BYTE_ENTRY.fullmatch(entry)
    return bytes([int(byte[1], 16)]) if byte else entry.replace(_METASPACE, " ").encode()


def _reader(tokenizer: Any) -> Callable[[int, str], bytes]:
    """How the entries of this vocabulary spell bytes."""

    def decoded(index: int, _entry: str) -> bytes:
        text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).encode()

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _metaspace if "<0x0A>" in tokenizer.get_vocab() else decoded
    for component in (backend.decoder, backend.pre_tokenizer):
        kinds = set(_kinds(component))
        if "ByteLevel" in kinds:
            return _byte_level
        if kinds & {"Metaspace", "ByteFallback", "Replace" + _METASPACE}:
            return _metaspace
    return decoded


def _kinds(component: Any) -> Iterator[str]:
    """The types of a decoder or pre-tokenizer and of everything nested in it."""
    remaining = [] if component is None else [json.loads(component.__getstate__())]
    while remaining:
        node = remaining.pop()
        pattern = node.get("pattern", {})
        yield node["type"] + (pattern.get("String", "") if node["type"] == "Replace" else "")
        remaining += node.get("decoders", []) + node.get("pretokenizers", [])
