"""Any interleaving of requests and time keeps the node's promises, against a model of plain dicts.

Which block goes is the policy's to choose (test_pins_model, test_kvstore_eviction); here it is checked
that the choice keeps every promise: leases, pins, groups, quotas, events, memory.
"""

import itertools
import math

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.limits import NodeLimits
from kvstore.node.allocator import aligned
from kvstore.node.contract import FULL, PRESENT
from kvstore.node.eviction import POLICIES
from kvstore.node.keeping import make_policy
from kvstore.node.node import Node
from kvstore.node.tags import PLAIN, Pin, Tags

PAGE = 4096
CAPACITY = 16 * PAGE
LIMITS = NodeLimits(lease_s_max=8, write_s=5, quarantine_s=7)
WRITERS = ("a", "b")
TENANTS = ("p", "q")
HARD_BYTES_MAX = CAPACITY // 2
HINTS = st.just(PLAIN) | st.one_of(
    st.builds(Tags, tenant=st.sampled_from(TENANTS), depth=st.integers(-1, 3)),
    st.builds(Tags, group=st.sampled_from(("g", "h"))),
    st.builds(Tags, soft_pin_s=st.just(4.0), depth=st.just(0)),
    st.builds(
        Tags,
        tenant=st.sampled_from(("", *TENANTS)),
        group=st.sampled_from(("", "g", "h")),
        soft_pin_s=st.sampled_from((0.0, 4.0)),
        hard_pin=st.sampled_from((False, False, True)),
    ),
)

numbers = st.integers(0, 13)
key_lists = st.lists(numbers, min_size=1, max_size=5)


def key(n: int) -> bytes:
    return bytes([n]) * 32


class Model(RuleBasedStateMachine):
    """`held` maps every range that must not be reused to the reason and the time it ends."""

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def begin(self, name):
        self.node = Node(CAPACITY, LIMITS, make_policy(CAPACITY, name))
        self.set_quota("p", 1)

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.node = Node(CAPACITY, LIMITS)
        self.tags = {}  # of complete blocks, by key
        self.hard = set()  # keys whose hard pin was granted
        self.quotas = {}
        self.writes = {}  # ticket -> (writer, key, offset, size, expires_s, tags)
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
        _, _, offset, size, *_ = self.writes.pop(ticket)
        self.quarantine.append((offset, size, self.now_s + LIMITS.quarantine_s))

    def pinned_ranges(self):
        """Ranges somebody may read or write now, leased ones once."""
        leased = {item for items, _ in self.leases.values() for item in items}
        return [
            *((w[2], w[3]) for w in self.writes.values()),
            *((offset, size) for offset, size, _ in self.quarantine),
            *sorted(leased),
        ]

    def leased_ranges(self):
        return {item for items, _ in self.leases.values() for item in items}

    def over_quota(self):
        used = dict.fromkeys(self.quotas, 0)
        for name, (_, size, _) in self.complete.items():
            if self.tags[name].tenant in used:
                used[self.tags[name].tenant] += aligned(size)
        return {tenant for tenant in used if used[tenant] > self.quotas[tenant]}

    def standing(self):
        """How firmly each unleased block is held; "lapsed" ones go before any other."""
        leased, policy = self.leased_ranges(), self.node.policy
        return {
            name: "lapsed" if name in policy._lapsed else policy.pin(name).value
            for name, (offset, size, _) in self.complete.items()
            if (offset, size) not in leased
        }

    def forget_evicted(self, before):
        """Learn which blocks the node chose to evict, and that it might.

        Args:
            before: `standing` before it chose; None if the same request changed pins.
        """
        leased, greedy, visible = self.leased_ranges(), self.over_quota(), set(self.node.complete_keys())
        gone = [name for name in self.complete if name not in visible]
        for name in gone:
            offset, size, _ = self.complete.pop(name)
            assert (offset, size) not in leased, "a leased block was evicted"
            assert name not in self.hard, "a hard pin was evicted"
        if before is None:
            return
        alone = [name for name in gone if not self.tags[name].group]  # groups take others along
        left = {name: how for name, how in before.items() if name in visible}
        if any(before[name] != "lapsed" for name in alone):
            assert "lapsed" not in left.values(), "a lapsed pin is the first to go"
        if any(before[name] == "soft" for name in alone):
            assert "none" not in left.values(), "a soft pin went before a block without"
        if any(before[name] == "none" and self.tags[name].tenant not in greedy for name in alone):
            plain = {self.tags[name].tenant for name, how in left.items() if how == "none"}
            assert not plain & self.over_quota(), "who is over quota gives first"

    @rule(seconds=st.sampled_from([0.5, 1, 3, 6, 20]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.expire()
        self.node.tick(self.now_s)

    @rule(
        writer=st.sampled_from(WRITERS),
        wanted=st.lists(numbers, min_size=1, max_size=3),
        size=st.integers(1, 3 * PAGE),
        tags=HINTS,
        replace=st.booleans(),
    )
    def reserve(self, writer, wanted, size, tags, replace=False):
        pinned = self.pinned_ranges()
        offered = set() if replace else {key(n) for n in wanted} & set(self.complete)
        before = None if offered else self.standing()
        names = [key(n) for n in wanted]
        reserved = self.node.reserve(self.now_s, writer, names, size, tags, replace=replace)
        writing = {w[1] for w in self.writes.values()}
        known = set() if replace else set(self.complete)
        self.forget_evicted(before)
        self.learn_hard_pins(offered, tags)
        for n, offset, ticket in zip(wanted, reserved.offsets, reserved.tickets, strict=True):
            if offset < 0:
                assert ticket == 0
                # a block that was complete at the start may have been evicted for an earlier key
                there = key(n) in writing or (key(n) in self.complete and not replace)
                assert offset == (PRESENT if there else FULL) or (offset == PRESENT and key(n) in known)
                continue
            assert key(n) not in writing
            assert replace or key(n) not in self.complete
            assert offset % PAGE == 0
            assert offset + size <= CAPACITY
            for start, length in pinned:
                assert offset + aligned(size) <= start or start + aligned(length) <= offset, (
                    "reused too early"
                )
            pinned.append((offset, size))
            writing.add(key(n))
            self.writes[ticket] = (writer, key(n), offset, size, self.now_s + LIMITS.write_s, tags)

    @rule(puts=st.lists(st.tuples(key_lists, st.integers(1, 3), HINTS), min_size=1, max_size=4))
    def put(self, puts):
        """Writers that do what they announced, with new blocks: the usual case, and pressure."""
        for wanted, pages, tags in puts:
            before = set(self.writes)
            new = [n for n in wanted if key(n) not in self.complete]
            self.reserve("a", new, pages * PAGE, tags)
            self.commit_these([ticket for ticket in self.writes if ticket not in before], bytes(16))

    @rule(data=st.data(), checksum=st.binary(min_size=16, max_size=16))
    def commit(self, data, checksum):
        tickets = data.draw(st.lists(st.sampled_from([0, 777, *self.writes]), max_size=4, unique=True))
        self.commit_these(tickets, checksum)

    def commit_these(self, tickets, checksum):
        done = self.node.commit(self.now_s, tickets, [checksum] * len(tickets)).done
        assert done == [ticket in self.writes for ticket in tickets]
        for ticket, ok in zip(tickets, done, strict=True):
            if ok:
                _, name, offset, size, _, tags = self.writes.pop(ticket)
                self.complete[name] = (offset, size, checksum)
                self.tags[name] = tags
                self.hard.discard(name)  # of what it replaces
                self.learn_hard_pins([name], self.tags[name])

    def learn_hard_pins(self, names, tags):
        granted = {name for name in names if self.node.policy.pin(name) is Pin.HARD}
        assert granted <= self.hard or tags.hard_pin
        self.hard |= granted

    @rule(wanted=key_lists, ttl_s=st.sampled_from((0.0, 2.0, 6.0, math.inf)), everything=st.booleans())
    def pin(self, wanted, ttl_s, everything):
        names = dict.fromkeys([*(key(n) for n in wanted), *(self.complete if everything else ())])
        refused = self.node.pins_refused
        done = self.node.pin(self.now_s, list(names), ttl_s)
        there = [name for name in names if name in self.complete]
        assert done + self.node.pins_refused - refused == len(there)
        if ttl_s == 0:
            self.hard -= set(there)
            assert all(self.node.policy.pin(name) is Pin.NONE for name in there)
        else:
            self.learn_hard_pins(there, Tags(hard_pin=math.isinf(ttl_s)))

    @rule(tenant=st.sampled_from(TENANTS), pages=st.sampled_from((None, 0, 1, 3)))
    def set_quota(self, tenant, pages):
        self.quotas.pop(tenant, None)
        if pages is not None:
            self.quotas[tenant] = pages * PAGE
        use = self.node.set_quota(self.now_s, tenant, self.quotas.get(tenant))
        mine = [size for name, (_, size, _) in self.complete.items() if self.tags[name].tenant == tenant]
        assert use.used_bytes == sum(map(aligned, mine))

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

    @rule(data=st.data(), wanted=key_lists, lease_s=st.sampled_from([1.0, 4.0, 100.0]))
    def acquire(self, data, wanted, lease_s):
        if self.complete:  # so that most find something
            wanted = [data.draw(st.sampled_from(sorted(self.complete)))[0], *wanted]
        got = self.node.acquire(self.now_s, [key(n) for n in wanted], lease_s)
        expected = []
        for n in wanted:
            if key(n) not in self.complete:
                break
            expected.append(self.complete[key(n)])
        assert [(b.offset, b.size_bytes, b.checksum) for b in got.blocks] == expected
        assert bool(got.lease_id) == bool(expected)
        if expected:
            names = dict.fromkeys(key(n) for n in wanted[: len(expected)])
            groups = {self.tags[name].group for name in names} - {""}
            along = [name for name in self.complete if self.tags[name].group in groups]
            ranges = [self.complete[name][:2] for name in {**names, **dict.fromkeys(along)}]
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
            self.hard.discard(key(n))

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
        assert self.node.writing.quarantined_bytes == sum(aligned(size) for _, size, _ in self.quarantine)
        assert (stats.writing, stats.leases, stats.blocks) == (
            len(self.writes),
            len(self.leases),
            len(self.complete),
        )

    @invariant()
    def hard_pins_are_those_granted_and_bounded(self):
        assert self.hard <= set(self.complete)
        hard_bytes = sum(aligned(self.complete[name][1]) for name in self.hard)
        assert self.node.stats().hard_pinned_bytes == hard_bytes <= HARD_BYTES_MAX

    @invariant()
    def the_policy_holds_exactly_what_nobody_reads(self):
        leased = self.leased_ranges()
        held = {name for name in self.complete if name in self.node.policy}
        assert held == {name for name, (o, s, _) in self.complete.items() if (o, s) not in leased}
        assert len(self.node.policy) == len(held)


TestNodeAgainstModel = Model.TestCase
TestNodeAgainstModel.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
