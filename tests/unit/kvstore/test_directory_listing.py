"""Pages of a directory join to exactly what it holds; counts are of live nodes only."""

from hashlib import sha256

import hypothesis.strategies as st
from hypothesis import given, settings

from kvstore.directory.directory import Directory
from mooncake.core.keys import KEY_BYTES


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def directory(held: list[set[int]]) -> Directory:
    made = Directory()
    for index, numbers in enumerate(held):
        made.join(0.0, f"n{index}", "e")
        made.on_snapshot(0.0, f"n{index}", "e", [b"".join(map(key, numbers))])
    return made


holdings = st.lists(st.sets(st.integers(0, 300), max_size=60), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(held=holdings, limit=st.integers(1, 20), node=st.booleans(), gone=st.booleans())
def test_pages_join_to_everything_in_order(held, limit, node, gone):
    made = directory([*held, {1, 2, 500}])
    if gone:
        made.leave(f"n{len(held)}")
    listing = made.listing("n0" if node else "")
    expected = held[0] if node else set().union(*held, set() if gone else {1, 2, 500})
    found: list[bytes] = []
    while page := listing.page(limit, after=found[-1] if found else b""):
        assert len(page) <= limit
        found += page
    assert found == sorted(map(key, expected))


@settings(max_examples=30, deadline=None)
@given(held=holdings, length=st.integers(0, 3))
def test_a_prefix_chooses_the_keys_that_begin_with_it(held, length):
    everything = sorted(map(key, set().union(*held)))
    prefix = everything[0][:length] if everything else b"\x00" * length
    found = directory(held).listing().page(10_000, prefix)
    assert found == [one for one in everything if one.startswith(prefix)]


@settings(max_examples=30, deadline=None)
@given(held=holdings)
def test_replicas_are_counted_on_live_nodes(held):
    made = directory([*held, {1, 2, 3}])
    made.leave(f"n{len(held)}")
    counts = made.listing().replica_counts()
    expected = [sum(number in numbers for numbers in held) for number in set().union(*held)]
    assert counts == {count: expected.count(count) for count in set(expected)}


def test_an_unknown_node_holds_nothing():
    assert directory([{1}]).listing("nobody").page(10) == []


def test_a_listing_stays_as_it_was():
    made = directory([{1}])
    listing = made.listing()
    made.on_events(0.0, "n0", b"\xff" * KEY_BYTES, b"")
    assert listing.page(10) == [key(1)]
