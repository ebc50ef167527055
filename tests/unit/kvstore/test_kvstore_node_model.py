"""Any interleaving of requests and time keeps the node's promises, against a model of plain dicts."""

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.allocator import aligned
from kvstore.limits import NodeLimits
from kvstore.node import FULL, PRESENT, Node

PAGE = 4096
CAPACITY = 12 * PAGE
LIMITS = NodeLimits(lease_s_max=8, write_s=5, quarantine_s=7)
WRITERS = ("a", "b")

numbers = st.integers(0, 9)
key_lists = st.lists(numbers, min_size=1, max_size=5)


def key(n: int) -> bytes:
    return bytes([n]) * 32


class Model(RuleBasedStateMachine):
    """`held` maps every range that must not be reused to the reason and the time it ends."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.node = Node(CAPACITY, LIMITS)
        self.writes = {}  # ticket -> (writer, key, offset, size, expires_s)
        self.quarantine = []  # (offset, size, until_s)
        self.leases = {}  # lease_id -> ([(offset, size)], expires_s)
        self.complete = {}  # key -> (offset, size, checksum)
        self.replayed = set()  # what an index would believe

    def expire(self):
        for ticket, write in list(self.writes.items()):
            if write[4] <= self.now_s:
                self.give_up(ticket)
        self.quarantine = [item for item in self.quarantine if item[2] > self.now_s]
        self.leases = {i: lease for i, lease in self.leases.items() if lease[1] > self.now_s}

    def give_up(self, ticket):
        _, _, offset, size, _ = self.writes.pop(ticket)
        self.quarantine.append((offset, size, self.now_s + LIMITS.quarantine_s))

    def pinned_ranges(self):
        """Ranges somebody may read or write now, leased ones once."""
        leased = {item for items, _ in self.leases.values() for item in items}
        return [
            *((w[2], w[3]) for w in self.writes.values()),
            *((offset, size) for offset, size, _ in self.quarantine),
            *sorted(leased),
        ]

    def forget_evicted(self):
        """Learn from the node's events which blocks it chose to evict, and that it might."""
        leased = {item for items, _ in self.leases.values() for item in items}
        visible = set(self.node.complete_keys())
        for gone in [k for k in self.complete if k not in visible]:
            offset, size, _ = self.complete.pop(gone)
            assert (offset, size) not in leased, "a leased block was evicted"

    @rule(seconds=st.sampled_from([0.5, 1, 3, 6, 20]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.expire()
        self.node.tick(self.now_s)

    @rule(writer=st.sampled_from(WRITERS), wanted=key_lists, size=st.integers(1, 4 * PAGE))
    def reserve(self, writer, wanted, size):
        pinned = self.pinned_ranges()
        reserved = self.node.reserve(self.now_s, writer, [key(n) for n in wanted], size)
        writing = {w[1] for w in self.writes.values()}
        known = set(self.complete)
        self.forget_evicted()
        for n, offset, ticket in zip(wanted, reserved.offsets, reserved.tickets, strict=True):
            if offset < 0:
                assert ticket == 0
                # a block that was complete at the start may have been evicted for an earlier key
                assert offset == (PRESENT if key(n) in writing or key(n) in self.complete else FULL) or (
                    offset == PRESENT and key(n) in known
                )
                continue
            assert key(n) not in writing
            assert key(n) not in self.complete
            assert offset % PAGE == 0
            assert offset + size <= CAPACITY
            for start, length in pinned:
                assert offset + aligned(size) <= start or start + aligned(length) <= offset, (
                    "reused too early"
                )
            pinned.append((offset, size))
            writing.add(key(n))
            self.writes[ticket] = (writer, key(n), offset, size, self.now_s + LIMITS.write_s)

    @rule(data=st.data(), checksum=st.binary(min_size=16, max_size=16))
    def commit(self, data, checksum):
        tickets = data.draw(st.lists(st.sampled_from([0, 777, *self.writes]), max_size=4, unique=True))
        done = self.node.commit(self.now_s, tickets, [checksum] * len(tickets)).done
        assert done == [ticket in self.writes for ticket in tickets]
        for ticket, ok in zip(tickets, done, strict=True):
            if ok:
                _, name, offset, size, _ = self.writes.pop(ticket)
                self.complete[name] = (offset, size, checksum)

    @rule(data=st.data(), writer=st.sampled_from(WRITERS), everything=st.booleans())
    def abandon(self, data, writer, everything):
        named = (
            []
            if everything
            else data.draw(st.lists(st.sampled_from([5, *self.writes]), min_size=1, max_size=3))
        )
        self.node.abandon(self.now_s, writer, named)
        for ticket in named or list(self.writes):
            if ticket in self.writes and self.writes[ticket][0] == writer:
                self.give_up(ticket)

    @rule(wanted=key_lists, lease_s=st.sampled_from([1.0, 4.0, 100.0]))
    def acquire(self, wanted, lease_s):
        got = self.node.acquire(self.now_s, [key(n) for n in wanted], lease_s)
        expected = []
        for n in wanted:
            if key(n) not in self.complete:
                break
            expected.append(self.complete[key(n)])
        assert [(b.offset, b.size_bytes, b.checksum) for b in got.blocks] == expected
        assert bool(got.lease_id) == bool(expected)
        if expected:
            ranges = [(offset, size) for offset, size, _ in expected]
            self.leases[got.lease_id] = (ranges, self.now_s + min(lease_s, LIMITS.lease_s_max))

    @rule(data=st.data())
    def release(self, data):
        lease_id = data.draw(st.sampled_from([0, 999, *self.leases]))
        self.node.release(self.now_s, lease_id)
        self.leases.pop(lease_id, None)

    @rule(wanted=key_lists)
    def drop(self, wanted):
        dropped = self.node.drop(self.now_s, [key(n) for n in wanted])
        assert dropped == len({key(n) for n in wanted} & set(self.complete))
        for n in wanted:
            self.complete.pop(key(n), None)

    @rule()
    def drain(self):
        events = self.node.drain_events()
        assert not set(events.stored) & set(events.removed)
        assert not set(events.stored) & self.replayed, "stored twice"
        assert set(events.removed) <= self.replayed, "removed what nobody knew"
        self.replayed = (self.replayed | set(events.stored)) - set(events.removed)
        assert self.replayed == set(self.node.complete_keys())

    @invariant()
    def no_two_live_ranges_overlap(self):
        ranges = sorted({*self.pinned_ranges(), *((o, s) for o, s, _ in self.complete.values())})
        for (start, size), (following, _) in itertools.pairwise(ranges):
            assert start + aligned(size) <= following

    @invariant()
    def complete_blocks_are_the_models(self):
        assert set(self.node.complete_keys()) == set(self.complete)

    @invariant()
    def used_bytes_are_exactly_the_live_ranges(self):
        ranges = {*self.pinned_ranges(), *((o, s) for o, s, _ in self.complete.values())}
        stats = self.node.stats()
        assert stats.used_bytes == sum(aligned(size) for _, size in ranges)
        assert self.node.quarantined_bytes == sum(aligned(size) for _, size, _ in self.quarantine)
        assert (stats.writing, stats.leases, stats.blocks) == (
            len(self.writes),
            len(self.leases),
            len(self.complete),
        )


TestNodeAgainstModel = Model.TestCase
TestNodeAgainstModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
