"""PrefixIndex: what it answers, how it forgets, and that it agrees with a dict of sets."""

import tracemalloc
from itertools import pairwise
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.index import BLOCKS_MAX, DEAD_BITS_MAX, PrefixIndex
from mooncake.core.errors import ProtocolError
from mooncake.core.keys import KEY_BYTES, NAME_BITS, share_keys
from tests.unit.conductor.make import keys

KEYS = keys(12)


def blob(*which: int) -> bytes:
    return b"".join(KEYS[i] for i in which)


def test_a_node_hits_as_many_leading_blocks_as_it_holds():
    index = PrefixIndex()
    index.apply("a", blob(0, 1, 2, 3), b"")
    index.apply("b", blob(0, 1), b"")
    assert index.longest_prefix(KEYS) == {"b": 2, "a": 4}


def test_a_block_that_ranks_share_counts_once_and_is_there_as_long_as_the_share_of_the_first():
    index = PrefixIndex()
    shares = share_keys(KEYS[:4], 3)
    index.apply("a", b"".join(shares), b"")
    assert index.longest_prefix(KEYS) == {"a": 4}
    assert index.stats().blocks == 4
    index.apply("a", b"", b"".join([*shares[1:3], *shares[9:]]))
    assert index.longest_prefix(KEYS) == {"a": 3}
    assert index.stats().blocks == 3


def test_a_hole_ends_the_hit_although_deeper_blocks_are_there():
    index = PrefixIndex()
    index.apply("a", blob(0, 1, 2, 3), blob(1))
    assert index.longest_prefix(KEYS) == {"a": 1}


def test_a_node_without_the_first_block_is_left_out():
    index = PrefixIndex()
    index.apply("a", blob(1, 2), b"")
    assert index.longest_prefix(KEYS) == {}


def test_no_keys_and_no_nodes_are_no_hits():
    assert PrefixIndex().longest_prefix(KEYS) == {}
    index = PrefixIndex()
    index.apply("a", blob(0), b"")
    assert index.longest_prefix([]) == {}


def test_keys_are_told_apart_by_their_first_60_bits_only():
    index = PrefixIndex()
    index.apply("a", KEYS[0], b"")
    twin = KEYS[0][:8] + bytes(24)
    assert index.longest_prefix([twin]) == {"a": 1}  # a hit predicted wrongly: engines load by whole keys
    for bit in range(NAME_BITS):
        other = (int.from_bytes(KEYS[0], "little") ^ 1 << bit).to_bytes(KEY_BYTES, "little")
        assert index.longest_prefix([other]) == {}


def test_applying_an_event_twice_changes_nothing():
    index = PrefixIndex()
    for _ in range(2):
        index.apply("a", blob(0, 1), b"")
    assert index.longest_prefix(KEYS) == {"a": 2}
    assert index.stats().blocks == 2


def test_removing_the_last_holder_frees_the_block():
    index = PrefixIndex()
    index.apply("a", blob(0), b"")
    index.apply("b", blob(0), b"")
    index.apply("a", b"", blob(0))
    assert index.holders(KEYS[0]) == ("b",)
    index.apply("b", b"", blob(0, 5))  # 5 was never there: fine
    assert index.stats().blocks == 0


def test_reset_forgets_one_node_at_once_and_it_can_load_a_snapshot():
    index = PrefixIndex()
    index.apply("a", blob(0, 1, 2), b"")
    index.apply("b", blob(0), b"")
    index.reset("a")
    assert index.longest_prefix(KEYS) == {"b": 1}
    index.apply("a", blob(0, 1), b"")
    assert index.longest_prefix(KEYS) == {"b": 1, "a": 2}


def test_many_restarts_are_swept_and_leave_nothing_behind():
    index = PrefixIndex()
    for _ in range(3 * DEAD_BITS_MAX):
        index.apply("a", blob(*range(12)), b"")
        index.drop("a")
    assert index.sweeping
    index.sweep(12)
    assert not index.sweeping
    assert index.longest_prefix(KEYS) == {}
    assert index.stats().sweeps == 3
    assert index.stats().blocks == 0
    assert index.stats().nodes == 0


def test_a_full_index_drops_its_oldest_blocks_and_counts_them():
    index = PrefixIndex(blocks_max=8)
    index.apply("a", blob(*range(8)), b"")
    index.apply("a", blob(8), b"")
    assert index.stats().blocks == 8
    assert index.stats().dropped == 1
    assert index.holders(KEYS[0]) == ()
    assert index.holders(KEYS[8]) == ("a",)


@pytest.mark.parametrize("bad", [b"x", KEYS[0] + b"x"])
def test_half_a_key_is_a_protocol_error_and_applies_nothing(bad):
    index = PrefixIndex()
    with pytest.raises(ProtocolError):
        index.apply("a", blob(0), bad)
    assert index.stats().blocks == 0


NODES = st.sampled_from("abc")
IDS = st.lists(st.integers(0, 11), max_size=12)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), NODES, IDS, IDS),
        st.tuples(st.just("reset"), NODES, st.just([]), st.just([])),
        st.tuples(st.just("sweep"), NODES, st.just([]), st.just([])),
    ),
    max_size=40,
)


@settings(max_examples=2 * settings.default.max_examples, deadline=None)
@given(EVENTS, st.integers(1, 14), st.sampled_from([1 << 16, BLOCKS_MAX]))
def test_it_agrees_with_one_set_per_node_however_far_a_sweep_is(events, look, shard):
    with patch("conductor.index.SHARD_BLOCKS", shard):
        index = PrefixIndex(dead_bits_max=2)
    model: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    for kind, node, stored, removed in events:
        if kind == "apply":
            index.apply(node, blob(*stored), blob(*removed))
            model[node] = (model[node] | set(stored)) - set(removed)
        elif kind == "sweep":
            index.sweep(3)
        else:
            index.reset(node)
            model[node] = set()
        expected = {}
        for name, held in model.items():
            depth = next((i for i in range(12) if i not in held), 12)
            if depth:
                expected[name] = depth
        with patch("conductor.index.LOOK_KEYS", look):
            found = index.longest_prefix(KEYS)
        assert found == expected
        assert list(found.values()) == sorted(expected.values())


@patch("conductor.index.CHECKED_KEYS", 1)
def test_a_block_takes_at_most_100_bytes_and_churn_adds_none():
    blocks = 15_625  # of one of the dicts of an index of a million
    keys_of = [Random(turn).randbytes(blocks * KEY_BYTES) for turn in range(8)]
    tracemalloc.start()
    index = PrefixIndex(blocks_max=2 * blocks)
    for node in "abc":
        index.apply(node, keys_of[0], b"")
    taken = [tracemalloc.get_traced_memory()[0]]
    for gone, fresh in pairwise(keys_of):
        for at in range(0, len(fresh), 100 * KEY_BYTES):
            part = slice(at, at + 100 * KEY_BYTES)
            index.apply("d", fresh[part], b"")
            for node in "abcd":
                index.apply(node, b"", gone[part])
        taken.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert index.stats().blocks == blocks
    assert max(taken) <= 100 * blocks


def test_a_full_index_of_several_dicts_keeps_within_its_bound_and_what_came_last():
    with patch("conductor.index.SHARD_BLOCKS", 64):
        index = PrefixIndex(blocks_max=1_000)
    lately = keys(100, "lately")
    for turn in range(30):
        index.apply("a", b"".join(keys(100, f"chain {turn}")), b"")
        assert index.stats().blocks <= 1_000
    index.apply("a", b"".join(lately), b"")
    assert index.longest_prefix(lately) == {"a": 100}
    assert index.stats().blocks + index.stats().dropped == 31 * 100
