"""Room that a node grants before it knows what for."""

import hashlib

import pytest

from kvstore.limits import GRANT_SHARE_MAX, NodeLimits
from kvstore.node.node import Node
from kvstore.table import Table, TableReader, table_bytes
from mooncake.core.errors import RequestError

PAGE = 4096
SUM = b"s" * 16


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def node(pages: int, **limits) -> Node:
    return Node(pages * PAGE, NodeLimits(**limits))


def put(owner: Node, number: int, now_s: float = 0.0) -> None:
    owner.commit(now_s, owner.reserve(now_s, "w", [key(number)], PAGE).tickets, [SUM])


def test_room_becomes_an_object_when_it_is_filled():
    one = node(16)
    one.shelf.table = Table(memoryview(memory := bytearray(table_bytes(16 * PAGE))))
    (offset,), (ticket,) = one.grant(0.0, "w", 100, 1, 1)
    assert one.stats().blocks == 0
    assert one.fill(ticket, key(1), SUM)
    block = one.block_of(key(1))
    assert (block.offset, block.size_bytes, block.checksum) == (offset, 100, SUM)
    assert TableReader(memoryview(memory)).find(key(1)) == (SUM, offset, 100)
    assert one.drain_events().stored == [key(1)]
    assert not one.fill(ticket, key(2), SUM)
    assert (one.stats().used_bytes, one.writing.granted_bytes) == (PAGE, 0)


def test_an_object_that_is_there_or_being_written_stays_and_the_room_is_free_again():
    one = node(16)
    put(one, 1)
    one.reserve(0.0, "w", [key(2)], PAGE)
    _, tickets = one.grant(0.0, "w", PAGE, 2, 2)
    assert [one.fill(ticket, key(at + 1), SUM) for at, ticket in enumerate(tickets)] == [False, False]
    assert one.stats().used_bytes == 2 * PAGE


def test_what_is_asked_for_evicts_and_what_is_offered_beyond_does_not():
    one = node(16)
    for number in range(15):
        put(one, number)
    offsets, _ = one.grant(0.0, "w", PAGE, 3, 10)
    assert (len(offsets), one.stats().evictions) == (3, 2)


def test_beyond_what_is_asked_for_a_part_of_the_segment_is_the_most():
    one = node(64)
    assert len(one.grant(0.0, "w", PAGE, 1, 60)[0]) == 64 // GRANT_SHARE_MAX
    assert len(one.grant(0.0, "x", PAGE, 1, 60)[0]) == 1


def test_less_than_what_is_asked_for_is_nothing():
    one = node(4)
    one.grant(0.0, "w", PAGE, 3, 3)
    assert one.grant(0.0, "w", PAGE, 2, 2) == ([], [])
    assert one.stats().used_bytes == 3 * PAGE


def test_room_comes_back_at_once_when_its_writer_returns_it():
    one = node(4)
    _, tickets = one.grant(0.0, "w", PAGE, 4, 4)
    one.give_back("another", tickets)
    assert one.stats().used_bytes == 4 * PAGE
    one.give_back("w", [*tickets, 99])
    assert (one.stats().used_bytes, one.writing.granted_bytes) == (0, 0)


@pytest.mark.parametrize("named", [False, True])
def test_room_of_a_lost_writer_rests_before_it_is_used_again(named):
    one = node(4, write_s=30, quarantine_s=60)
    _, tickets = one.grant(0.0, "w", PAGE, 4, 4)
    if named:
        one.abandon(0.0, "w", [])
    else:
        one.tick(29.9)
        assert one.writing.quarantined_bytes == 0
        one.tick(30.0)
    assert (one.writing.quarantined_bytes, one.writing.granted_bytes) == (4 * PAGE, 0)
    assert not one.fill(tickets[0], key(1), SUM)
    one.tick(100.0)
    assert one.stats().used_bytes == 0


def test_what_was_filled_in_time_counts_however_late_it_is_read():
    one = node(4, write_s=30)
    _, (ticket,) = one.grant(0.0, "w", PAGE, 1, 1)
    assert one.fill(ticket, key(1), SUM)
    one.tick(1000.0)
    assert one.block_of(key(1)) is not None


@pytest.mark.parametrize(
    ("size", "count", "count_max"), [(0, 1, 1), (5 * PAGE, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 1 << 20)]
)
def test_room_that_makes_no_sense_is_refused(size, count, count_max):
    with pytest.raises(RequestError):
        node(4).grant(0.0, "w", size, count, count_max)


def test_a_key_that_is_none_is_refused_and_the_room_stays():
    one = node(4)
    _, (ticket,) = one.grant(0.0, "w", PAGE, 1, 1)
    with pytest.raises(RequestError):
        one.fill(ticket, b"short", SUM)
    assert one.fill(ticket, key(1), SUM)
