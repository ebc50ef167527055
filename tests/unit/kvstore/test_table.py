"""The table in shared memory: it says of every block what the store would, or that it does not know."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.node.node import Node
from kvstore.table import MANY, ROWS, STALE_S, Table, TableReader, table_bytes

CAPACITY = 1 << 20


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def pair(*, whole: bool = True) -> tuple[Table, TableReader]:
    memory = memoryview(bytearray(table_bytes(CAPACITY)))
    return Table(memory, whole=whole), TableReader(memory)


def crowd(bucket: int) -> list[bytes]:
    """More keys than fit, all of one bucket."""
    return [bytes([n + 1]) * 8 + bucket.to_bytes(8, "little") * 3 for n in range(ROWS + 1)]


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=200))
@settings(max_examples=60, deadline=None)
def test_a_reader_finds_exactly_what_was_added_and_not_removed(steps):
    table, reader = pair()
    there = {}
    for number, add in steps:
        name = key(number)
        if add and name not in there:
            there[name] = (bytes([number]) * 16, number * 4096, 1 + number * 1000)
            table.add(name, *there[name][1:], there[name][0])
        elif not add and name in there:
            del there[name]
            table.remove(name)
    asked = [key(number) for number in range(41)]
    assert [reader.find(one) for one in asked] == [there.get(one) for one in asked]
    assert reader.find_all(asked) == [there.get(one) for one in asked]
    assert reader.sizes(asked) == [there[one][2] if one in there else 0 for one in asked]
    assert reader.sizes(asked[: MANY - 1]) == reader.sizes(asked)[: MANY - 1]
    assert reader.is_whole


def test_a_block_without_a_place_makes_absence_prove_nothing_until_it_is_gone():
    table, reader = pair()
    names = crowd(3)
    for number, name in enumerate(names):
        table.add(name, number, 7, bytes(16))
    hidden = [name for name in names if reader.find(name) is None]
    assert (len(hidden), reader.is_whole) == (1, False)
    table.remove(hidden[0])
    assert reader.is_whole
    table.remove(names[0])
    table.add(hidden[0], 5, 7, bytes(16))
    assert reader.find(hidden[0]) == (bytes(16), 5, 7)


def test_a_table_of_a_store_with_more_tiers_is_never_whole():
    assert not pair(whole=False)[1].is_whole


def test_a_table_is_believed_while_its_store_gives_signs_of_life():
    table, reader = pair()
    table.live(100.0)
    assert reader.is_fresh(100.0 + STALE_S / 2)
    assert not reader.is_fresh(100.0 + STALE_S)
    table.close()
    assert not reader.is_fresh(0.0)


def test_a_table_has_a_row_for_every_eight_kilobytes():
    assert table_bytes(1 << 30) == 4096 + (1 << 30) // 8192 * 64
    assert table_bytes(3 << 28) == table_bytes(1 << 30)
    assert table_bytes(4096) == 4096 + 64 * 512


@pytest.mark.parametrize("leased", [False, True])
def test_a_node_shows_what_is_complete_and_hides_what_it_drops(leased):
    node = Node(CAPACITY)
    node.shelf.table, reader = pair()
    (name,) = names = [key(1)]
    reserved = node.reserve(1.0, "w", names, 5000)
    assert reader.find(name) is None
    node.commit(1.0, reserved.tickets, [b"s" * 16])
    assert reader.find(name) == (b"s" * 16, reserved.offsets[0], 5000)
    if leased:
        node.acquire(1.0, names, 10.0)
    node.drop(2.0, names)
    assert reader.find(name) is None


def test_what_is_evicted_is_hidden_before_its_memory_is_used_again():
    node = Node(2 * 4096)
    node.shelf.table, reader = pair()
    names = [key(number) for number in range(3)]
    for name in names:
        node.commit(1.0, node.reserve(1.0, "w", [name], 4096).tickets, [b"s" * 16])
    assert [row is not None for row in reader.find_all(names)] == [False, True, True]


def test_reads_by_the_table_count_as_uses():
    node = Node(2 * 4096)
    first, second, third = (key(number) for number in range(3))
    for name in (first, second):
        node.commit(1.0, node.reserve(1.0, "w", [name], 4096).tickets, [b"s" * 16])
    node.used(1.0, [first, key(9)], 3)
    node.reserve(1.0, "w", [third], 4096)
    assert (node.block_of(first) is not None, node.block_of(second)) == (True, None)
    assert (node.stats().hits, node.stats().misses) == (2, 3)
