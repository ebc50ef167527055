"""Any interleaving of uses, pins, quotas and time gives the victims of a model that sorts everything anew."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.node.pins import Guarded
from kvstore.node.tags import Pin
from mooncake.core.errors import CapacityError

HARD_BYTES_MAX = 12
TENANTS = (None, "p", "q")
GROUPS = (None, None, "g", "h")

numbers = st.integers(0, 9)
FIRMNESS = {"lapsed": 0, "plain": 0, "soft": 1, "hard": 2}


class Block:
    def __init__(self, number, tenant, group):
        self.key, self.size_bytes = bytes([number]), number + 1
        self.tenant, self.group = tenant, group
        self.pin, self.ttl_s, self.until_s = Pin.NONE, 0, 0
        self.place, self.last = None, 0

    def home(self):
        return {Pin.NONE: "plain", Pin.SOFT: "soft", Pin.HARD: "hard"}[self.pin]


class Model(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.policy = Guarded(HARD_BYTES_MAX)
        self.now_s, self.uses = 0, 0
        self.blocks = {}
        self.quotas = {}
        self.policy.tick(0)

    # ------------------------------------------------------------ the model

    def settle(self, block, place):
        self.uses += 1
        block.place, block.last = place, self.uses

    def hit(self, block):
        block.until_s = self.now_s + block.ttl_s

    def sums(self, tenant):
        mine = [b for b in self.blocks.values() if b.tenant == tenant]
        return sum(b.size_bytes for b in mine), sum(b.size_bytes for b in mine if b.pin is not Pin.NONE)

    def over(self, tenant):
        return max(0, self.sums(tenant)[0] - self.quotas.get(tenant, 1 << 40))

    def fits(self, block, *, hard):
        quota = self.quotas.get(block.tenant, 1 << 40)
        if block.pin is Pin.NONE and self.sums(block.tenant)[1] + block.size_bytes > quota:
            return False
        return not hard or self.hard_bytes() + block.size_bytes <= HARD_BYTES_MAX

    def hard_bytes(self):
        return sum(b.size_bytes for b in self.blocks.values() if b.pin is Pin.HARD)

    def held(self, *places):
        return sorted((b for b in self.blocks.values() if b.place in places), key=lambda b: b.last)

    def victims(self, need):
        chosen = []

        def take(blocks, want):
            before = size(chosen)
            for block in blocks:
                if size(chosen) - before >= want:
                    return
                group = [b for b in self.blocks.values() if b.group == block.group and block.group]
                free = [b for b in group if b.place and FIRMNESS[b.place] <= FIRMNESS[block.place]]
                if block not in chosen:
                    chosen.extend(b for b in [block, *free] if b not in chosen)

        take(self.held("lapsed"), need)
        for tenant in sorted(self.quotas, key=lambda t: (-self.over(t), t)):
            mine = [b for b in self.held("plain") if b.tenant == tenant]
            take(mine, min(need - size(chosen), self.over(tenant)))
        for place in ("plain", "soft"):
            take(self.held(place), need - size(chosen))
        return [b.key for b in chosen] if need > 0 else []

    # ------------------------------------------------------------ what happens

    @rule(number=numbers, tenant=st.sampled_from(TENANTS), group=st.sampled_from(GROUPS))
    def arrive(self, number, tenant, group):
        if bytes([number]) in self.blocks:
            return
        block = self.blocks[bytes([number])] = Block(number, tenant, group)
        self.policy.admit(block.key, block.size_bytes, tenant, group)
        self.policy.insert(block.key, block.size_bytes)
        self.settle(block, "plain")

    @rule(number=numbers)
    def use(self, number):
        block = self.blocks.get(bytes([number]))
        if block and block.place:
            self.policy.touch(block.key)
            self.hit(block)
            self.settle(block, block.home())

    @rule(number=numbers)
    def lease(self, number):
        block = self.blocks.get(bytes([number]))
        if block and block.place:
            self.policy.remove(block.key)
            block.place = None

    @rule(number=numbers)
    def end_lease(self, number):
        block = self.blocks.get(bytes([number]))
        if block and not block.place:
            self.policy.insert(block.key, block.size_bytes)
            self.hit(block)
            self.settle(block, block.home())

    @rule(number=numbers)
    def drop(self, number):
        block = self.blocks.pop(bytes([number]), None)
        if block:
            if block.place:
                self.policy.remove(block.key)
            self.policy.forget(block.key)

    @rule(need=st.integers(1, 30))
    def evict(self, need):
        for key in self.policy.victims(need):
            self.policy.remove(key)
            self.policy.forget(key)
            del self.blocks[key]

    @rule(number=numbers, ttl_s=st.integers(1, 9))
    def pin_soft(self, number, ttl_s):
        block = self.blocks.get(bytes([number]))
        if block is None:
            return
        try:
            self.policy.pin_soft(block.key, block.size_bytes, ttl_s)
        except CapacityError:
            assert not self.fits(block, hard=False)
            return
        if block.pin is not Pin.HARD:
            assert self.fits(block, hard=False)
            block.ttl_s = ttl_s
            self.hit(block)
            self.change(block, Pin.SOFT)

    @rule(number=numbers)
    def pin_hard(self, number):
        block = self.blocks.get(bytes([number]))
        if block is None:
            return
        try:
            self.policy.pin_hard(block.key, block.size_bytes)
        except CapacityError:
            assert not self.fits(block, hard=True)
            return
        if block.pin is not Pin.HARD:
            assert self.fits(block, hard=True)
            self.change(block, Pin.HARD)

    @rule(number=numbers)
    def unpin(self, number):
        self.policy.unpin(bytes([number]))
        if block := self.blocks.get(bytes([number])):
            self.change(block, Pin.NONE)

    def change(self, block, pin):
        if pin is not block.pin:
            block.pin = pin
            if block.place:
                self.settle(block, block.home())

    @rule(tenant=st.sampled_from(TENANTS[1:]), quota=st.none() | st.integers(0, 30))
    def set_quota(self, tenant, quota):
        self.policy.set_quota(tenant, quota)
        self.quotas.pop(tenant, None)
        if quota is not None:
            self.quotas[tenant] = quota

    @rule(step_s=st.integers(0, 12))
    def wait(self, step_s):
        self.now_s += step_s
        self.policy.tick(self.now_s)
        due = [b for b in self.held("soft") if b.until_s <= self.now_s]
        for block in sorted(due, key=lambda b: (b.until_s, b.key)):
            block.pin = Pin.NONE
            self.settle(block, "lapsed")

    # ------------------------------------------------------------ what always holds

    @invariant()
    def victims_are_those_of_the_model(self):
        for need in (0, 1, 9, 20, 1 << 40):
            assert self.policy.victims(need) == self.victims(need)

    @invariant()
    def nothing_pinned_goes_before_what_is_free_and_nothing_in_use_ever(self):
        for need in (7, 25):
            chosen = [self.blocks[key] for key in self.policy.victims(need)]
            assert all(b.place in {"lapsed", "plain", "soft"} for b in chosen)
            if any(b.place == "soft" for b in chosen):
                assert all(b in chosen for b in self.held("lapsed", "plain"))
            assert size(chosen) >= min(need, self.policy.held_bytes)

    @invariant()
    def sums_are_right(self):
        assert self.policy.held_bytes == size(self.held("lapsed", "plain", "soft"))
        assert len(self.policy) == len(self.held("lapsed", "plain", "soft", "hard"))
        assert self.policy.hard_bytes == self.hard_bytes() <= HARD_BYTES_MAX
        assert self.policy.soft_pins == sum(b.pin is Pin.SOFT for b in self.blocks.values())
        assert self.policy.soft_bytes == size(b for b in self.blocks.values() if b.pin is Pin.SOFT)
        assert self.policy.tenants.used() == {
            tenant: self.sums(tenant)[0]
            for tenant in TENANTS[1:]
            if self.sums(tenant)[0] or tenant in self.quotas
        }
        for tenant in TENANTS[1:]:
            use = self.policy.tenants.use(tenant)
            assert (use.used_bytes, use.pinned_bytes) == self.sums(tenant)
        for key, block in self.blocks.items():
            assert (key in self.policy) == (block.place is not None)
            assert self.policy.pin(key) is block.pin
            if block.place:
                assert self.policy.size_of(key) == block.size_bytes

    @invariant()
    def only_what_differs_from_others_has_a_record(self):
        known = [b.key for b in self.blocks.values() if b.tenant or b.group or b.pin is not Pin.NONE]
        assert set(self.policy._blocks) == {*known, *(b.key for b in self.held("lapsed"))}
        assert self.policy.bulk is (self.policy if self.policy._blocks else self.policy._plain)


def size(blocks):
    return sum(block.size_bytes for block in blocks)


TestPinsModel = Model.TestCase
TestPinsModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
