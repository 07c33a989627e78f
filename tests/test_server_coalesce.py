"""Grouping of tokens into messages: pure, with a clock made of numbers."""

from __future__ import annotations

from lda_service.engine.request import FinishReason, Role, SequenceDelta, SequenceFinished, TokenRecord
from lda_service.rpc.coalesce import EventCoalescer


def delta(text, index=0):
    """One token per character."""
    return SequenceDelta("g", Role.AMPLIFIED, index, text, tuple(TokenRecord(ord(c), c.encode()) for c in text))


def finished(index=0):
    """The end of a sequence."""
    return SequenceFinished("g", Role.AMPLIFIED, index, FinishReason.EOS, 1)


def test_unset_passes_everything_on():
    """One token per message means: as the engine sent it, held-back tokens together."""
    coalescer = EventCoalescer()
    for event in (delta("a"), delta("bcd"), delta(""), finished()):
        assert coalescer.take(event, 0) == [event]


def test_full_messages_leave_at_once():
    """A message leaves when it is full; what is left leaves with the end of the sequence."""
    coalescer = EventCoalescer(max_tokens=2)
    assert [coalescer.take(delta(c), 0) for c in "abc"] == [[], [delta("ab")], []]
    assert coalescer.take(finished(), 0) == [delta("c"), finished()]


def test_a_delta_is_never_split_nor_overfilled():
    """Text belongs to its tokens: a delta that does not fit starts the next message."""
    coalescer = EventCoalescer(max_tokens=3)
    assert coalescer.take(delta("ab"), 0) == []
    assert coalescer.take(delta("cd"), 0) == [delta("ab")]
    assert coalescer.take(delta("efgh"), 0) == [delta("cd"), delta("efgh")]


def test_sequences_are_kept_apart():
    """Neighbours share nothing but the clock."""
    coalescer = EventCoalescer(max_tokens=2)
    assert coalescer.take(delta("a", 0), 0) == []
    assert coalescer.take(delta("x", 1), 0) == []
    assert coalescer.take(finished(1), 0) == [delta("x", 1), finished(1)]
    assert coalescer.take(delta("b", 0), 0) == [delta("ab", 0)]


def test_delay_counts_from_the_first_token():
    """The oldest token decides when a message is due."""
    coalescer = EventCoalescer(max_tokens=9, max_delay_s=1.0)
    assert coalescer.wait_s(0.0) is None
    coalescer.take(delta("a"), 0.0)
    coalescer.take(delta("b"), 0.75)
    coalescer.take(delta("x", 1), 0.75)
    assert coalescer.wait_s(0.75) == 0.25
    assert coalescer.take(None, 0.9) == []
    assert coalescer.take(None, 1.0) == [delta("ab")]
    assert coalescer.wait_s(1.0) == 0.75
    assert coalescer.take(None, 2.0) == [delta("x", 1)]
