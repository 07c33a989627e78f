"""One reader of a worker's events, reading as it likes: nothing is lost, repeated or out of order."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from lda_service.engine.request import (
    Branch,
    FinishReason,
    GenerationRequest,
    Output,
    Role,
    Sampling,
    SequenceDelta,
    SequenceFinished,
    Stopping,
    TokenRecord,
)
from lda_service.worker.stream import EVENTS_BEHIND, EventStream

SEQUENCES = 3
# A burst of tokens of a sequence, as many as make a reader fall behind or not; or so many events read.
STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "read"]), st.integers(0, SEQUENCES - 1), st.integers(1, 2 * EVENTS_BEHIND)),
    max_size=30,
)


def stream_of(sequences):
    """A stream whose worker owes that many sequences."""
    branches = (Branch(Role.AMPLIFIED, 1.0),)
    request = GenerationRequest("g", (1,), branches, sequences, Sampling(), Stopping(), Output())
    return EventStream(request, 1 << 20, lambda stream: None, lambda: None)


def delta(index, token):
    """One token."""
    return SequenceDelta("g", Role.AMPLIFIED, index, chr(97 + token % 26), (TokenRecord(token, b"x"),))


@given(STEPS)
def test_every_sequence_arrives_whole_and_in_order(steps):
    """However pushing and reading take turns, also where a reader that was behind has nearly caught up.

    Tokens that join others which wait must not overtake tokens that stand alone behind them.
    """

    async def run():
        stream, pushed = stream_of(SEQUENCES), [0] * SEQUENCES
        got = [[] for _ in range(SEQUENCES)]

        async def read():
            event = await stream.next(timeout_s=0)
            if isinstance(event, SequenceDelta):
                got[event.sequence_index] += [token.token_id for token in event.tokens]
                assert event.text == "".join(chr(97 + token.token_id % 26) for token in event.tokens)
            elif isinstance(event, SequenceFinished):
                assert len(got[event.sequence_index]) == pushed[event.sequence_index], "the end comes last"

        for kind, index, count in steps:
            for _ in range(count):
                if kind == "push":
                    stream.push(delta(index, pushed[index]))
                    pushed[index] += 1
                else:
                    await read()
        for index in range(SEQUENCES):
            stream.push(SequenceFinished("g", Role.AMPLIFIED, index, FinishReason.EOS, pushed[index]))
        while not stream.exhausted:
            await read()
        assert got == [list(range(count)) for count in pushed]
        assert stream._buffered_tokens == 0

    asyncio.run(run())


async def test_a_waiting_reader_is_woken():
    """A reader that waits for as long as it takes gets the next event."""
    stream = stream_of(1)
    reading = asyncio.ensure_future(stream.next())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.push(delta(0, 5))
    assert (await reading).tokens[0].token_id == 5
