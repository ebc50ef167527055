"""Blocks reach the SSD before they are evicted: once each, oldest first, sooner when memory is short."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.ssd.writebehind import WriteBehind, WriteBehindLimits
from mooncake.core.errors import ConfigError

LIMITS = WriteBehindLimits(age_s=2.0, high=0.8, low=0.7, batch_bytes=100, attempts_max=3)
QUIET, FULL, BETWEEN = 0.5, 0.9, 0.75


def key(n: int) -> bytes:
    return bytes([n]) * 32


def filled(count: int, size: int = 10) -> WriteBehind:
    queue = WriteBehind(LIMITS)
    for n in range(count):
        queue.stored(float(n), key(n), size)
    return queue


def test_in_quiet_times_a_block_is_copied_once_it_is_old_enough():
    queue = filled(3)
    assert queue.due(1.9, QUIET) == []
    assert queue.due(3.0, QUIET) == [key(0), key(1)]
    assert queue.due(3.5, QUIET) == []
    assert queue.due(4.0, QUIET) == [key(2)]


def test_a_block_that_goes_before_its_age_is_never_written():
    queue = filled(2)
    queue.removed(key(0))
    assert queue.due(9.0, QUIET) == [key(1)]


def test_when_memory_is_short_blocks_are_copied_at_once_until_it_is_not():
    queue = filled(1)
    assert queue.due(0.0, BETWEEN) == []
    assert queue.due(0.0, FULL) == [key(0)]
    queue.stored(0.0, key(1), 10)
    assert queue.due(0.0, BETWEEN) == [key(1)], "still pressed"
    queue.stored(0.0, key(2), 10)
    assert queue.due(0.0, QUIET) == []
    assert queue.due(0.0, BETWEEN) == [], "no longer pressed"


def test_a_batch_is_bounded_but_a_large_block_is_not_stuck():
    queue = filled(3, size=40)
    assert queue.due(0.0, FULL) == [key(0), key(1)]
    queue.stored(0.0, key(9), 1000)
    assert queue.due(0.0, FULL) == [key(2)]
    assert queue.due(0.0, FULL) == [key(9)]


def test_a_failed_copy_is_tried_again_behind_the_others_and_in_the_end_given_up():
    queue = filled(1)
    assert queue.due(0.0, FULL) == [key(0)]
    queue.stored(0.0, key(5), 10)
    queue.ended(0.0, key(0), copied=False)
    assert queue.due(0.0, FULL) == [key(5), key(0)]
    queue.ended(0.0, key(0), copied=False)
    assert queue.due(0.0, FULL) == [key(0)]
    queue.ended(0.0, key(0), copied=False)
    assert queue.due(0.0, FULL) == []
    assert queue.given_up == 1


def test_a_block_that_left_while_it_was_copied_is_not_tried_again():
    queue = filled(1)
    assert queue.due(0.0, FULL) == [key(0)]
    queue.removed(key(0))
    queue.ended(0.0, key(0), copied=False)
    assert queue.due(100.0, FULL) == []


def test_a_block_that_came_back_while_its_old_copy_ended_waits_once():
    queue = filled(1)
    assert queue.due(0.0, FULL) == [key(0)]
    queue.removed(key(0))
    queue.stored(1.0, key(0), 10)
    queue.ended(1.0, key(0), copied=False)
    assert queue.due(1.0, FULL) == [key(0)]
    assert queue.due(1.0, FULL) == []


steps = st.lists(
    st.tuples(st.sampled_from(["stored", "removed", "due", "good", "bad"]), st.integers(0, 5)), max_size=60
)


@given(steps)
def test_waiting_bytes_are_those_of_the_waiting_blocks_and_none_is_handed_out_twice(plan):
    queue, copying, waiting = WriteBehind(LIMITS), set(), set()
    for now_s, (what, n) in enumerate(plan):
        if what == "stored":
            queue.stored(now_s, key(n), n + 1)
            waiting |= {n} - copying
        elif what == "removed":
            queue.removed(key(n))
            waiting.discard(n)
            copying.discard(n)
        elif what == "due":
            due = [k[0] for k in queue.due(now_s, FULL)]
            assert set(due) == waiting
            copying |= waiting
            waiting.clear()
        elif n in copying:
            before = queue.given_up
            queue.ended(now_s, key(n), copied=what == "good")
            copying.discard(n)
            if what == "bad" and queue.given_up == before:
                waiting.add(n)
        assert queue.waiting_bytes == sum(n + 1 for n in waiting)
        assert len(queue) == len(waiting) + len(copying), "what is being copied is in DRAM only, too"


@pytest.mark.parametrize(
    "bad", [{"low": 0.9}, {"high": 1.1}, {"age_s": -1.0}, {"batch_bytes": 0}, {"attempts_max": 0}], ids=str
)
def test_limits_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        WriteBehindLimits(**bad)
