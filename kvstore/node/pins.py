"""Pins, object groups and tenants over quota: an eviction policy around another one. Pure.

`Guarded` holds every evictable block in one of four places and gives them up in this order:

    lapsed   soft pins whose time ran out without a hit: longer unused than most, oldest first; and what only
             passes through on its way from the SSD
    plain    no pin, in the order of the policy it is made with; tenants over quota first,
             see kvstore.node.tenants
    soft     pinned for a time that each hit starts anew: only when nothing else is left
    hard     never

A group's blocks are of use only together: one victim takes along those that are as free to go.

The owner tells of a block of a tenant or group when it is complete (`admit`), of each block that is
gone (`forget`), calls `tick` before anything else and leases `companions` along. Costs O(1) per block
and O(log n) per soft pin beside those of the inner policy, twice those for a block of a tenant with a
quota. A block with tenant, group or pin needs about 130 bytes beside the inner policy's, one of a group
90 more, a soft pin 110 more; any other leaves no trace here.
"""

import heapq
import math
from collections.abc import Callable

import msgspec

from kvstore.limits import KEYS_PER_REQUEST_MAX
from kvstore.node.eviction import EvictionPolicy, Lru
from kvstore.node.tags import Pin, check_ttl
from kvstore.node.tenants import Tenant, Tenants
from mooncake.core.errors import CapacityError

GROUP_KEYS_MAX = KEYS_PER_REQUEST_MAX
"""One lease or one put holds a whole group. Groups are best effort: later members stand alone."""
STALE_MIN = 64
"""Superseded timers that are always tolerated: a sweep costs as much as there are timers."""


class _Block(msgspec.Struct, gc=False):
    size_bytes: int
    tenant: Tenant | None = None
    group: str | None = None
    pin: Pin = Pin.NONE
    ttl_s: float = 0.0
    until_s: float = 0.0
    timer_s: float = math.inf  # when the timer that counts rings; others of this key are superseded
    reads_left: int = 0  # until it is worth its place
    place: EvictionPolicy | None = None  # None while leased


class Guarded:
    """See the module's text. An EvictionPolicy; not thread-safe."""

    def __init__(
        self,
        hard_bytes_max: int,
        make: Callable[[], EvictionPolicy] = Lru,
        *,
        evict_soft: bool = True,
        quota_needed: bool = False,
    ) -> None:
        """Start empty.

        Args:
            hard_bytes_max: sum of hard pins; what is left of the segment stays usable as a cache.
            make: the inner policy.
            evict_soft: whether soft pins are given up at all before their time is over.
            quota_needed: whether a tenant without a quota is nobody.
        """
        self.hard_bytes_max = hard_bytes_max
        self.tenants = Tenants(quota_needed=quota_needed)
        self._evict_soft = evict_soft
        self._make = make
        self._now_s = -math.inf
        self._blocks: dict[bytes, _Block] = {}
        self._lapsed = Lru()
        self._plain = make()
        self._soft = Lru()
        self._hard = Lru()
        self._hard_bytes = 0
        self._soft_bytes = 0
        self._groups: dict[str, dict[bytes, None]] = {}
        self._timers: list[tuple[float, bytes]] = []
        self._soft_pins = 0

    # ------------------------------------------------------------ a block's life

    def tick(self, now_s: float) -> None:
        """Let soft pins lapse whose time ran out; blocks in use keep theirs."""
        self._now_s = now_s = max(now_s, self._now_s)
        while self._timers and self._timers[0][0] <= now_s:
            timer_s, key = heapq.heappop(self._timers)
            block = self._blocks.get(key)
            if block is None or block.timer_s != timer_s:
                continue
            block.timer_s = math.inf
            if block.place is None:
                block.until_s = now_s + block.ttl_s
            if block.until_s > timer_s:  # hit since it was set
                self._set_timer(key, block)
                continue
            self._leave(key, block)
            self._set_pin(block, Pin.NONE)
            self._lapsed.insert(key, block.size_bytes)
            block.place = self._lapsed

    def admit(self, key: bytes, size_bytes: int, tenant: str | None = None, group: str | None = None) -> None:
        """Learn of a complete block, before its first insert. The tenant of its first writer pays for it.

        Needed for blocks of a tenant or a group only.
        """
        assert key not in self._blocks, "admitted twice"
        block = self._blocks[key] = _Block(size_bytes)
        if tenant is not None:
            block.tenant = self.tenants.get(tenant)
            self.tenants.charge(block.tenant, size_bytes)
        if group is not None:
            members = self._groups.setdefault(group, {})
            if len(members) < GROUP_KEYS_MAX:
                members[key] = None
                block.group = group
        self._spare(key, block)

    def insert(self, key: bytes, size_bytes: int, depth: int | None = None, below: int | None = None) -> None:
        """See EvictionPolicy. A block that was not admitted has neither tenant nor group."""
        block = self._blocks.get(key)
        if block is None:
            self._plain.insert(key, size_bytes, depth, below)
            return
        assert block.place is None, "inserted twice"
        assert block.size_bytes == size_bytes, "another size"
        self._refresh(block)
        self._enter(key, block, depth, below)
        if not block.reads_left:
            self._spare(key, block)

    def touch(self, key: bytes, below: int | None = None) -> None:
        """See EvictionPolicy. A hit starts the time of a soft pin anew; a lapsed one stays lapsed."""
        block = self._blocks.get(key)
        if block is None:
            self._plain.touch(key, below)
            return
        assert block.place is not None, "touched while leased"
        self._refresh(block)
        if block.place is self._lapsed:
            self._leave(key, block)
            self._enter(key, block, None, below)
            self._spare(key, block)
            return
        block.place.touch(key, below)
        if (own := self._own(block)) is not None:
            own.touch(key, below)

    def pass_through(self, key: bytes, size_bytes: int, reads: int) -> None:
        """Give a plain block up first until it was used `reads` times: there is a copy of it elsewhere."""
        block = self._known(key, size_bytes)
        if block.pin is Pin.NONE and block.place is self._plain:
            self._blocks[key] = block
            self._leave(key, block)
            block.reads_left = reads + 1  # to come in is no use
            self._enter(key, block, None, None)

    def remove(self, key: bytes) -> None:
        """See EvictionPolicy. Counts as a hit: it is what a lease begins with."""
        block = self._blocks.get(key)
        if block is None:
            self._plain.remove(key)
            return
        self._leave(key, block)
        self._refresh(block)
        self._spare(key, block)

    def forget(self, key: bytes) -> None:
        """End everything about a removed block: it is gone. Needed for each, or quotas count ghosts."""
        self._plain.forget(key)
        block = self._blocks.pop(key, None)
        if block is None:
            return
        assert block.place is None, "remove it first"
        self._set_pin(block, Pin.NONE)
        if block.tenant is not None:
            if block.tenant.plain is not None:
                block.tenant.plain.forget(key)
            self.tenants.charge(block.tenant, -block.size_bytes)
        if block.group is not None:
            members = self._groups[block.group]
            del members[key]
            if not members:
                del self._groups[block.group]

    # ------------------------------------------------------------ who goes first

    @property
    def held_bytes(self) -> int:
        """See EvictionPolicy: without pins that are not given up."""
        soft_bytes = self._soft.held_bytes if self._evict_soft else 0
        return self._lapsed.held_bytes + self._plain.held_bytes + soft_bytes

    def victims(self, need_bytes: int) -> list[bytes]:
        """See EvictionPolicy and the module's text. Groups may make it more than needed."""
        chosen: dict[bytes, int] = {}
        need_bytes -= self._choose(self._lapsed, need_bytes, chosen)
        for tenant in self.tenants.over():
            assert tenant.plain is not None
            need_bytes -= self._choose(tenant.plain, min(need_bytes, tenant.over_bytes), chosen)
        for policy in (self._plain, self._soft) if self._evict_soft else (self._plain,):
            need_bytes -= self._choose(policy, need_bytes, chosen)
        return list(chosen)

    def victims_of(self, tenant: str, need_bytes: int) -> list[bytes]:
        """As `victims`, of the plain blocks of a tenant with a quota, and of companions of theirs."""
        chosen: dict[bytes, int] = {}
        known = self.tenants.find(tenant)
        if known is not None and known.plain is not None:
            self._choose(known.plain, need_bytes, chosen)
        return list(chosen)

    def companions(self, key: bytes) -> list[bytes]:
        """Return the other complete blocks of the key's group, in the order they came."""
        block = self._blocks.get(key)
        if block is None or block.group is None:
            return []
        return [member for member in self._groups[block.group] if member != key]

    def size_of(self, key: bytes) -> int:
        """See EvictionPolicy."""
        block = self._blocks.get(key)
        return self._plain.size_of(key) if block is None else block.size_bytes

    @property
    def bulk(self) -> EvictionPolicy:
        """What to tell of uses now: the inner policy as long as no block has tenant, group or pin."""
        return self if self._blocks else self._plain

    @property
    def has_groups(self) -> bool:
        """Whether any block has companions."""
        return bool(self._groups)

    def __contains__(self, key: bytes) -> bool:
        block = self._blocks.get(key)
        return key in self._plain if block is None else block.place is not None

    def __len__(self) -> int:
        return len(self._lapsed) + len(self._plain) + len(self._soft) + len(self._hard)

    # ------------------------------------------------------------ pins

    def pin_soft(self, key: bytes, size_bytes: int, ttl_s: float) -> None:
        """Keep a complete block until it has not been hit for `ttl_s`. A hard pin stays hard.

        Raises:
            RequestError: ttl_s out of bounds.
            CapacityError: it would not fit into the tenant's quota.
        """
        check_ttl(ttl_s)
        block = self._known(key, size_bytes)
        if block.pin is not Pin.HARD:
            _check_quota(block)
            self._change_pin(key, block, Pin.SOFT)
            block.ttl_s = ttl_s
            block.until_s = self._now_s + ttl_s
            if block.until_s < block.timer_s:
                self._set_timer(key, block)

    def pin_hard(self, key: bytes, size_bytes: int) -> None:
        """Keep a complete block until `unpin`.

        Raises:
            CapacityError: it would not fit into the tenant's quota or among the hard pins.
        """
        block = self._known(key, size_bytes)
        if block.pin is not Pin.HARD:
            if self._hard_bytes + size_bytes > self.hard_bytes_max:
                raise CapacityError(f"hard pins hold {self._hard_bytes} of {self.hard_bytes_max} bytes")
            _check_quota(block)
            self._change_pin(key, block, Pin.HARD)

    def unpin(self, key: bytes) -> None:
        """End any pin of `key`; this counts as a use."""
        block = self._blocks.get(key)
        if block is not None:
            self._change_pin(key, block, Pin.NONE)
            self._spare(key, block)

    def pin(self, key: bytes) -> Pin:
        """Return how firmly `key` is held."""
        block = self._blocks.get(key)
        return Pin.NONE if block is None else block.pin

    @property
    def hard_bytes(self) -> int:
        """Sum of sizes of hard pins, leased ones too."""
        return self._hard_bytes

    @property
    def soft_bytes(self) -> int:
        """Sum of sizes of soft pins, leased ones too."""
        return self._soft_bytes

    @property
    def soft_pins(self) -> int:
        """How many soft pins there are."""
        return self._soft_pins

    # ------------------------------------------------------------ tenants

    def set_quota(self, tenant: str, quota_bytes: int | None, *, strict: bool = False) -> None:
        """Give a tenant a share under pressure, or a wall if `strict`; None ends it.

        O(n): every plain block is looked at, when the tenant had none.

        Raises:
            RequestError: a negative quota.
            CapacityError: too many quotas.
        """
        self.tenants.check_quota(tenant, quota_bytes)
        known = self.tenants.get(tenant)
        known.quota_bytes = quota_bytes
        known.strict = strict
        if quota_bytes is None:
            known.plain = None
        elif known.plain is None:
            known.plain = self._make()
            for key in self._plain.victims(self._plain.held_bytes):
                block = self._blocks.get(key)
                if block is not None and block.tenant is known:
                    known.plain.insert(key, block.size_bytes)
        self.tenants.charge(known, 0)

    # ------------------------------------------------------------ inside

    def _known(self, key: bytes, size_bytes: int) -> _Block:
        """Return the record of a complete block that is to be pinned; a plain one gets it now."""
        block = self._blocks.get(key)
        if block is None:
            block = _Block(size_bytes, place=self._plain if key in self._plain else None)
        return block

    def _spare(self, key: bytes, block: _Block) -> None:
        """End the record of a block that is like any other now."""
        plain = block.pin is Pin.NONE and block.place is not self._lapsed and not block.reads_left
        if plain and block.tenant is None and block.group is None:
            del self._blocks[key]

    def _own(self, block: _Block) -> EvictionPolicy | None:
        """Return the tenant's own policy, if the block is in it too."""
        return block.tenant.plain if block.tenant is not None and block.place is self._plain else None

    def _enter(self, key: bytes, block: _Block, depth: int | None, below: int | None) -> None:
        places = {Pin.NONE: self._plain, Pin.SOFT: self._soft, Pin.HARD: self._hard}
        block.reads_left = max(0, block.reads_left - 1)
        block.place = self._lapsed if block.reads_left and block.pin is Pin.NONE else places[block.pin]
        block.place.insert(key, block.size_bytes, depth, below)
        if (own := self._own(block)) is not None:
            own.insert(key, block.size_bytes, depth, below)

    def _leave(self, key: bytes, block: _Block) -> None:
        assert block.place is not None, "not held"
        block.place.remove(key)
        if (own := self._own(block)) is not None:
            own.remove(key)
        block.place = None

    def _change_pin(self, key: bytes, block: _Block, pin: Pin) -> None:
        if pin is block.pin:
            return
        self._blocks[key] = block
        held = block.place is not None
        if held:
            self._leave(key, block)
        self._set_pin(block, pin)
        if held:
            self._enter(key, block, None, None)

    def _set_pin(self, block: _Block, pin: Pin) -> None:
        self._hard_bytes += block.size_bytes * ((pin is Pin.HARD) - (block.pin is Pin.HARD))
        softer = (pin is Pin.SOFT) - (block.pin is Pin.SOFT)
        self._soft_pins += softer
        self._soft_bytes += block.size_bytes * softer
        if block.tenant is not None:
            block.tenant.pinned_bytes += block.size_bytes * ((block.pin is Pin.NONE) - (pin is Pin.NONE))
        block.pin = pin
        if pin is not Pin.SOFT:
            block.timer_s = math.inf

    def _refresh(self, block: _Block) -> None:
        if block.pin is Pin.SOFT:
            block.until_s = self._now_s + block.ttl_s  # its timer rings too early then, and is set again

    def _set_timer(self, key: bytes, block: _Block) -> None:
        block.timer_s = block.until_s
        heapq.heappush(self._timers, (block.timer_s, key))
        if len(self._timers) > 2 * self._soft_pins + STALE_MIN:
            # a superseded timer may ring at the same time as the one that counts: once each
            live = (
                (at_s, k) for at_s, k in self._timers if k in self._blocks and self._blocks[k].timer_s == at_s
            )
            self._timers = list(dict.fromkeys(live))
            heapq.heapify(self._timers)

    def _choose(self, policy: EvictionPolicy, want_bytes: int, chosen: dict[bytes, int]) -> int:
        """Add victims of `policy` and their companions to `chosen`; return the bytes gained."""
        if want_bytes <= 0:
            return 0
        gained = 0
        # it may name what is chosen already: ask for so much more
        for key in policy.victims(want_bytes + sum(chosen.values())):
            if gained >= want_bytes:
                break
            if key in chosen:
                continue
            for each in (key, *self._joined(key)):
                if each not in chosen:
                    chosen[each] = self.size_of(each)
                    gained += chosen[each]
        return gained

    def _joined(self, key: bytes) -> list[bytes]:
        """Return the companions that go with a victim: held, and pinned only if it is."""
        block = self._blocks.get(key)
        if block is None or block.group is None:
            return []
        place = block.place
        free = (self._lapsed, self._plain, self._soft) if place is self._soft else (self._lapsed, self._plain)
        return [each for each in self.companions(key) if self._blocks[each].place in free]


def _check_quota(block: _Block) -> None:
    """Pass if its tenant can pin it; raises CapacityError."""
    if block.tenant is not None and block.pin is Pin.NONE:
        block.tenant.check_pin(block.size_bytes)
