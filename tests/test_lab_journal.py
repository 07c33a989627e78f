"""The journal of a survey: what was appended is there again, however the file was cut off."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lda_client.lab._journal import Journal

RECORDS = st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=40)), max_size=8)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def contents(path):
    with Journal(path) as journal:
        return {number: journal.read(number) for number in journal.numbers()}


@SAME_FOLDER
@given(records=RECORDS, data=st.data())
def test_a_cut_drops_only_what_it_cuts(tmp_path, records, data):
    """Cut off anywhere, with or without rubbish behind: the whole records before are there, and appending goes on."""
    path = tmp_path / "journal"
    path.unlink(missing_ok=True)
    ends = [0]
    with Journal(path) as journal:
        for number, payload in records:
            journal.append(number, payload)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    rubbish = data.draw(st.binary(max_size=20))
    path.write_bytes(path.read_bytes()[:cut] + rubbish)
    whole = sum(end <= cut for end in ends) - 1
    expected = dict(reversed(records[:whole]))
    if rubbish:  # may happen to be what was cut off
        assert expected.items() <= contents(path).items()
    else:
        assert contents(path) == expected
    with Journal(path) as journal:
        journal.append(10, b"more")
    assert contents(path)[10] == b"more"


def test_a_damaged_record_ends_the_journal(tmp_path):
    """A flipped bit is noticed; what follows it is dropped, since lengths can no longer be trusted."""
    path = tmp_path / "journal"
    with Journal(path) as journal:
        for number in range(3):
            journal.append(number, b"payload")
    size = path.stat().st_size // 3
    damaged = bytearray(path.read_bytes())
    damaged[size + 20] ^= 1
    path.write_bytes(damaged)
    assert contents(path) == {0: b"payload"}
    assert path.stat().st_size == size


def test_what_is_not_there(tmp_path):
    """Reading a number that was never appended is an error of ours."""
    with Journal(tmp_path / "journal") as journal, pytest.raises(KeyError):
        journal.read(1)
