"""What a store node promises to readers, writers and indexes; time is a number here."""

import pytest

from kvstore.limits import QUARANTINE_S, WRITE_S_MAX, NodeLimits
from kvstore.node.contract import FULL, ID_BITS, PRESENT, id_base
from kvstore.node.eviction import Lru
from kvstore.node.node import Node
from kvstore.node.pins import Guarded
from mooncake.core.errors import CapacityError, ConfigError, RequestError

SIZE = 8192
SUM = b"s" * 16


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


def make(blocks: int = 4, **limits) -> Node:
    return Node(blocks * SIZE, NodeLimits(**limits))


def put(node: Node, *numbers: int, now_s: float = 0.0) -> list[int]:
    reserved = node.reserve(now_s, "w", keys(*numbers), SIZE)
    assert min(reserved.offsets) >= 0
    assert all(node.commit(now_s, reserved.tickets, [SUM] * len(numbers)).done)
    return reserved.offsets


# ---------------------------------------------------------------- readers


def test_acquire_leases_the_longest_complete_prefix():
    node = make()
    offsets = put(node, 1, 2, 4)
    got = node.acquire(0, keys(1, 2, 3, 4), 5)
    assert [block.offset for block in got.blocks] == offsets[:2]
    assert {(block.size_bytes, block.checksum) for block in got.blocks} == {(SIZE, SUM)}
    assert got.lease_id != 0
    assert (node.stats().hits, node.stats().misses, node.stats().leases) == (2, 2, 1)


def test_a_miss_makes_no_lease():
    got = make().acquire(0, keys(1), 5)
    assert (got.lease_id, got.blocks) == (0, [])


def test_what_is_being_written_is_not_readable_yet():
    node = make()
    node.reserve(0, "w", keys(1), SIZE)
    assert node.acquire(0, keys(1), 5).blocks == []
    assert node.is_writing(key(1))


def test_first_writing_names_the_block_that_a_reader_could_wait_for():
    node = make()
    put(node, 1)
    node.reserve(0, "w", keys(2), SIZE)
    assert node.first_writing(0, keys(1, 2, 3)) == key(2)
    assert node.first_writing(0, keys(1, 3, 2)) is None
    assert node.first_writing(0, keys(1)) is None


def test_a_leased_block_is_never_evicted_and_is_again_after_release():
    node = make(2)
    put(node, 1, 2)
    lease = node.acquire(0, keys(1, 2), 10)
    assert node.reserve(1, "w", keys(3), SIZE).offsets == [FULL]
    node.release(2, lease.lease_id)
    assert node.reserve(3, "w", keys(3), SIZE).offsets[0] >= 0


def test_a_lease_ends_by_itself():
    node = make(1)
    put(node, 1)
    node.acquire(0, keys(1), 10)
    assert node.reserve(9.9, "w", keys(2), SIZE).offsets == [FULL]
    assert node.reserve(10, "w", keys(2), SIZE).offsets == [0]


def test_no_lease_is_longer_than_the_limit():
    node = make(1, lease_s_max=5)
    put(node, 1)
    node.acquire(0, keys(1), 1e9)
    node.tick(5)
    assert node.stats().leases == 0


def test_two_leases_on_one_block_both_have_to_end():
    node = make(1)
    put(node, 1)
    first, second = node.acquire(0, keys(1), 10), node.acquire(0, keys(1, 1), 10)
    node.release(1, second.lease_id)
    assert node.reserve(1, "w", keys(2), SIZE).offsets == [FULL]
    node.release(1, first.lease_id)
    assert node.reserve(1, "w", keys(2), SIZE).offsets == [0]


def test_release_is_idempotent_and_ignores_strangers():
    node = make()
    put(node, 1)
    lease = node.acquire(0, keys(1), 10)
    for lease_id in (lease.lease_id, lease.lease_id, 0, -5, 1 << 62):
        node.release(1, lease_id)
    assert node.stats().leases == 0


# ---------------------------------------------------------------- eviction


def test_the_least_recently_used_block_goes_first():
    node = make(3)
    put(node, 1)
    put(node, 2)
    put(node, 3)
    node.release(0, node.acquire(0, keys(1), 5).lease_id)
    node.reserve(0, "w", keys(4), SIZE)
    assert node.complete_keys() == keys(1, 3)
    assert node.stats().evictions == 1


def test_of_one_prefix_the_end_goes_before_the_beginning():
    node = make(3)
    put(node, 1, 2, 3)
    node.release(0, node.acquire(0, keys(1, 2, 3), 5).lease_id)
    node.reserve(0, "w", keys(4), SIZE)
    assert node.complete_keys() == keys(1, 2)


def test_offering_a_present_block_counts_as_its_use():
    node = make(2)
    put(node, 1)
    put(node, 2)
    assert node.reserve(0, "w", keys(1), SIZE).offsets == [PRESENT]
    node.reserve(0, "w", keys(3), SIZE)
    assert node.complete_keys() == keys(1)


def test_a_hopeless_reserve_evicts_nothing():
    node = make(4)
    put(node, 1, 2)
    node.acquire(0, keys(1), 50)
    assert node.reserve(0, "w", keys(9), 4 * SIZE).offsets == [FULL]
    assert node.complete_keys() == keys(1, 2)


def test_a_large_block_evicts_several_small_ones():
    node = make(4)
    put(node, 1, 2, 3, 4)
    assert node.reserve(0, "w", keys(9), 4 * SIZE).offsets == [0]
    assert node.drain_events().removed == []  # stored and removed since the last drain: no net change
    assert node.stats().evictions == 4


# ---------------------------------------------------------------- writers


def test_duplicates_answer_present_and_cost_nothing():
    node = make()
    put(node, 1)
    reserved = node.reserve(0, "w", keys(1, 2, 2), SIZE)
    assert reserved.offsets[0] == PRESENT
    assert reserved.offsets[2] == PRESENT
    assert [bool(ticket) for ticket in reserved.tickets] == [False, True, False]


def test_when_full_the_rest_of_a_request_is_full_but_duplicates_still_answer():
    node = make(2)
    put(node, 7)
    node.acquire(0, keys(7), 50)
    reserved = node.reserve(0, "w", keys(1, 2, 7), SIZE)
    assert reserved.offsets[0] >= 0
    assert reserved.offsets[1:] == [FULL, PRESENT]
    assert reserved.tickets[1:] == [0, 0]


def test_a_ticket_commits_once_and_strangers_never():
    node = make()
    ticket = node.reserve(0, "w", keys(1), SIZE).tickets[0]
    assert node.commit(0, [ticket, ticket, ticket + 1, 0, -3], [SUM] * 5).done == [True] + [False] * 4
    assert node.stats().commits == 1


def test_an_uncommitted_write_expires_and_its_range_rests_in_quarantine():
    node = make(1)
    ticket = node.reserve(0, "w", keys(1), SIZE).tickets[0]
    node.tick(WRITE_S_MAX)
    assert node.commit(WRITE_S_MAX, [ticket], [SUM]).done == [False]
    assert node.writing.quarantined_bytes == SIZE == node.stats().used_bytes
    until_s = WRITE_S_MAX + QUARANTINE_S
    assert node.reserve(until_s - 0.1, "w", keys(2), SIZE).offsets == [FULL]
    assert node.reserve(until_s, "w", keys(2), SIZE).offsets == [0]
    assert node.writing.quarantined_bytes == 0


def test_the_key_of_a_lost_write_can_be_written_elsewhere_at_once():
    node = make(2)
    first = node.reserve(0, "w", keys(1), SIZE).offsets[0]
    node.abandon(0, "w", [])
    again = node.reserve(0, "w", keys(1), SIZE).offsets[0]
    assert again >= 0
    assert again != first


def test_a_restarted_writer_gives_up_its_writes_and_nobody_elses():
    node = make()
    mine = node.reserve(0, "a", keys(1, 2), SIZE).tickets
    others = node.reserve(0, "b", keys(3), SIZE).tickets
    node.abandon(0, "a", [])
    assert node.writing.quarantined_bytes == 2 * SIZE
    assert node.commit(0, [*mine, *others], [SUM] * 3).done == [False, False, True]


def test_abandoning_named_tickets_leaves_the_others():
    node = make()
    mine = node.reserve(0, "a", keys(1, 2), SIZE).tickets
    node.abandon(0, "b", mine)  # not b's: ignored
    node.abandon(0, "a", [mine[0], 12345])
    assert node.commit(0, mine, [SUM] * 2).done == [False, True]


def test_abandoning_after_commit_keeps_the_block():
    node = make()
    put(node, 1)
    node.abandon(0, "w", [])
    assert node.complete_keys() == keys(1)
    assert node.writing.quarantined_bytes == 0


def test_time_that_runs_backwards_revives_nothing():
    node = make(1)
    node.reserve(100, "w", keys(1), SIZE)
    node.tick(100 + WRITE_S_MAX)
    node.tick(0)
    assert node.writing.quarantined_bytes == SIZE
    assert node.reserve(0, "w", keys(2), SIZE).offsets == [FULL]


# ---------------------------------------------------------------- dropping


def test_a_dropped_leased_block_is_invisible_at_once_and_freed_at_the_end_of_the_lease():
    node = make(1)
    put(node, 1)
    lease = node.acquire(0, keys(1), 10)
    assert node.drop(1, keys(1)) == 1
    assert node.acquire(1, keys(1), 5).blocks == []
    assert node.stats().used_bytes == SIZE
    assert node.reserve(1, "w", keys(2), SIZE).offsets == [FULL]
    node.release(2, lease.lease_id)
    assert node.stats().used_bytes == 0


def test_a_key_dropped_under_a_lease_can_be_stored_again_beside_the_old_bytes():
    node = make(2)
    old = put(node, 1)
    lease = node.acquire(0, keys(1), 10)
    node.drop(0, keys(1))
    new = put(node, 1)
    assert new != old
    node.release(1, lease.lease_id)
    assert [block.offset for block in node.acquire(1, keys(1), 5).blocks] == new


def test_dropping_twice_or_unknown_keys_is_harmless():
    node = make()
    put(node, 1)
    assert node.drop(0, keys(1, 1, 9)) == 1
    assert node.drop(0, keys(1)) == 0


def test_a_bad_block_is_dropped_and_counted_unless_it_was_replaced_meanwhile():
    node = make(2)
    put(node, 1)
    check = node.lease_for_check(0, key(1), 10)
    node.drop(0, keys(1))
    put(node, 1)
    node.drop_bad(0, key(1), check.blocks[0])
    assert node.complete_keys() == keys(1)
    assert node.stats().checksum_failures == 0
    node.drop_bad(0, key(1), node.lease_for_check(0, key(1), 10).blocks[0])
    assert node.complete_keys() == []
    assert node.stats().checksum_failures == 1


def test_checks_count_neither_hits_nor_misses():
    node = make()
    put(node, 1)
    node.lease_for_check(0, key(1), 10)
    assert node.lease_for_check(0, key(2), 10).blocks == []
    assert (node.stats().hits, node.stats().misses) == (0, 0)


# ---------------------------------------------------------------- events


def test_events_tell_net_changes_once():
    node = make(2)
    put(node, 1, 2)
    assert node.drain_events().stored == keys(1, 2)
    put(node, 3)  # evicts 2, the end of the prefix
    node.drop(0, keys(1))
    put(node, 1)  # went and came: no net change
    events = node.drain_events()
    assert (events.stored, events.removed) == (keys(3), keys(2))
    assert not node.has_events


def test_reserving_abandoning_and_leasing_tell_nothing():
    node = make()
    put(node, 1)
    node.drain_events()
    node.reserve(0, "w", keys(2), SIZE)
    node.abandon(0, "w", [])
    node.release(0, node.acquire(0, keys(1), 5).lease_id)
    assert not node.has_events


# ---------------------------------------------------------------- limits and malformed requests


@pytest.mark.parametrize("bad", [b"", b"x" * 31, b"x" * 33])
def test_keys_of_another_length_are_refused(bad):
    node = make()
    for call in (
        lambda: node.acquire(0, [bad], 5),
        lambda: node.reserve(0, "w", [bad], SIZE),
        lambda: node.drop(0, [bad]),
        lambda: node.first_writing(0, [bad]),
        lambda: node.lease_for_check(0, bad, 5),
    ):
        with pytest.raises(RequestError, match="32 bytes"):
            call()


@pytest.mark.parametrize("size", [0, -1, -(2**63), 4 * SIZE + 1, 2**63])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(RequestError, match="size_bytes"):
        make(4).reserve(0, "w", keys(1), size)


@pytest.mark.parametrize("lease_s", [0, -1, float("nan"), float("inf")])
def test_impossible_lease_times_are_refused(lease_s):
    with pytest.raises(RequestError, match="lease_s"):
        make().acquire(0, keys(1), lease_s)


def test_too_many_keys_are_refused():
    node = make(keys_max=2)
    for call in (
        lambda: node.acquire(0, keys(1, 2, 3), 5),
        lambda: node.reserve(0, "w", keys(1, 2, 3), SIZE),
        lambda: node.commit(0, [1, 2, 3], [SUM] * 3),
        lambda: node.abandon(0, "w", [1, 2, 3]),
    ):
        with pytest.raises(RequestError, match="at most 2"):
            call()


@pytest.mark.parametrize("writer", ["", "w" * 129])
def test_a_writer_needs_a_short_name(writer):
    node = make()
    with pytest.raises(RequestError, match="writer"):
        node.reserve(0, writer, keys(1), SIZE)
    with pytest.raises(RequestError, match="writer"):
        node.abandon(0, writer, [])


@pytest.mark.parametrize("checksums", [[], [SUM, SUM], [b"short"], [b"x" * 17]])
def test_a_malformed_commit_commits_nothing(checksums):
    node = make()
    tickets = node.reserve(0, "w", keys(1), SIZE).tickets
    with pytest.raises(RequestError, match="checksum"):
        node.commit(0, tickets, checksums)
    assert node.commit(0, tickets, [SUM]).done == [True]


def test_leases_are_bounded_in_number_and_in_blocks():
    node = make(leases_max=2, leased_blocks_max=3)
    put(node, 1, 2)
    node.acquire(0, keys(1, 2), 5)
    with pytest.raises(CapacityError, match="no more"):
        node.acquire(0, keys(1, 2), 5)
    node.acquire(0, keys(1), 5)
    with pytest.raises(CapacityError, match="no more"):
        node.acquire(0, keys(2), 5)
    assert (node.stats().hits, node.stats().leases) == (3, 2)
    assert len(node.acquire(5, keys(1, 2), 5).blocks) == 2


def test_writes_in_progress_are_bounded():
    node = make(4, writes_max=2)
    assert node.reserve(0, "w", keys(1, 2, 3), SIZE).offsets[2] == FULL


def test_released_leases_leave_nothing_behind():
    node = make(leases_max=8)
    put(node, 1)
    for _ in range(200):
        node.release(0, node.acquire(0, keys(1), 50).lease_id)
    assert len(node._leases._heap) <= 2 * 8 + 1


def test_a_limit_that_is_not_positive_names_itself():
    with pytest.raises(ConfigError, match="write_s=0"):
        NodeLimits(write_s=0)


def test_ids_carry_the_epoch_and_fit_the_wire():
    bases = {id_base(str(n)) for n in range(500)}
    assert len(bases) == 500
    assert all(0 < base < 2**63 and base % (1 << ID_BITS) == 0 for base in bases)
    node = Node(SIZE, first_id=id_base("e1"))
    assert node.reserve(0, "w", keys(1), SIZE).tickets[0] >> ID_BITS == id_base("e1") >> ID_BITS


def test_a_policy_forgets_what_the_node_has_given_up():
    told = []

    class Watched(Lru):
        def forget(self, key):
            told.append(key)

    node = Node(2 * SIZE, policy=Guarded(0, Watched))
    for number in range(3):
        reserved = node.reserve(0.0, "w", [key(number)], SIZE)
        node.commit(0.0, reserved.tickets, [bytes(16)])
    assert told == [key(0)]
    held = node.acquire(0.0, [key(1)], 10.0)
    assert node.drop(0.0, [key(1)]) == 1  # leased: hidden now, its bytes go later
    assert told == [key(0), key(1)]
    node.release(0.0, held.lease_id)
