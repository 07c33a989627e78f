"""The policy on its own: what it chooses follows from the acceptance and the costs that it was told."""

from __future__ import annotations

import pytest

from lda_service.engine.speculation_policy import (
    LENGTHS,
    PROBE_EVERY,
    PROBE_LENGTH,
    Acceptance,
    Policy,
    expected_tokens,
)


def told(step=2.0, blocks=None):
    """A policy that was told what steps of one row cost; by default a second for each pass."""
    policy = Policy()
    costs = {0: step, **({length: length + 1.0 for length in LENGTHS} if blocks is None else blocks)}
    for length, seconds in costs.items():
        policy.record(1, length, 1000.0)  # the first of a kind does not count
        policy.record(1, length, seconds)
    policy.record(1, 0, step)
    return policy


def accepting(rate):
    return Acceptance(accepted=1000 * rate, tried=1000.0)


@pytest.mark.parametrize(("rate", "length"), [(0.3, 0), (0.5, 0), (0.6, 0), (0.7, 2), (0.8, 3), (0.9, 4), (0.99, 6)])
def test_the_length_is_the_best_by_tokens_for_the_time(rate, length):
    """With passes of one cost, longer blocks pay as more drafts stand, and none pays at one half and below."""
    assert told().choose([accepting(rate)], 1, 100) == length


def test_expected_tokens_is_the_closed_form():
    """The sum equals (1 - a^k) / (1 - a), and k where all drafts stand."""
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**4) / 0.2)
    assert expected_tokens(1.0, 6) == 6


def test_measured_costs_decide():
    """Blocks that were measured to be dear are not chosen, whatever their drafts; nor is a length without room."""
    assert told(blocks=dict.fromkeys(LENGTHS, 20.0)).choose([accepting(0.99)], 1, 100) == 0
    assert told().choose([accepting(0.99)], 1, 3) == 3
    assert told().choose([accepting(0.99)], 1, 1) == 0


def test_nobody_is_slowed_down_by_a_neighbour():
    """One request whose drafts fail keeps its steps ordinary; otherwise the shortest length wanted is taken."""
    assert told().choose([accepting(0.99), accepting(0.2)], 1, 100) == 0
    assert told().choose([accepting(0.99), accepting(0.7)], 1, 100) == 2


def test_nothing_is_drafted_before_an_ordinary_step_was_measured():
    """The first steps of a number of rows are ordinary: there is nothing to compare with."""
    policy = told()
    assert policy.choose([accepting(0.99)], 2, 100) == 0


def test_both_kinds_of_steps_are_tried_again_rarely():
    """A request that gave up probes once in `PROBE_EVERY` steps; one that drafts takes an ordinary step as often."""
    policy, hopeless = told(), accepting(0.1)
    chosen = [policy.choose([hopeless], 1, 100) for _ in range(3 * PROBE_EVERY + 3)]
    assert [i for i, length in enumerate(chosen) if length] == [PROBE_EVERY, 2 * PROBE_EVERY + 1, 3 * PROBE_EVERY + 2]
    assert set(chosen) == {0, PROBE_LENGTH}
    policy, ordinary = told(), 0
    for _ in range(2 * PROBE_EVERY + 2):
        length = policy.choose([accepting(0.9)], 1, 100)
        ordinary += length == 0
        policy.record(1, length, length + 1.0 if length else 2.0)
    assert ordinary == 2


def test_the_estimate_follows_what_happens():
    """It starts optimistic, and a dozen blocks in which all drafts fail or stand bring it near the truth."""
    bad, good = Acceptance(), Acceptance()
    assert bad.rate == pytest.approx(0.8)
    for _ in range(12):
        bad.record(0, 1)
        good.record(4, 4)
    assert bad.rate < 0.15
    assert good.rate > 0.97
