"""What is cached where, per context, and how far a prompt is: upstream's answer, of our index. Pure.

A context is what makes blocks of equal tokens interchangeable: tenant, model, adapter, block size, and the
salt that its publishers were registered with. In each, blocks are found by names that tokens make (XXH3), as
events carry the tokens: so the hashes of an engine, whatever went into them, need not be made again. Blocks
of which only an engine's hash is told (a pool's) are found by that; the profile says how to make it.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from conductor.index import BLOCKS_MAX, PrefixIndex
from conductor.indexer.hashes import (
    After,
    Keys,
    LazyKeys,
    Naming,
    Own,
    Profile,
    Salt,
    VllmNaming,
    VllmV1,
    Xxh3,
    Xxh3Naming,
    blob_of,
)
from conductor.prompt_keys import KeyMemo
from mooncake.core.errors import CapacityError, RequestError

CONTEXTS_MAX = 1_024
"""Models times tenants times adapters of a large cluster; an empty one takes 10 KB."""
HOPS_MAX = 64
"""From one pool node to another within a prefix: one of 128k tokens in blocks of 16 looks up 8,192 names, and
who changes nodes more often than this is told less than there is, never more."""


class Tier(StrEnum):
    """Where a block is, nearest first."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


LOWER = (Tier.CPU, Tier.DISK)


class ContextKey(msgspec.Struct, frozen=True):
    """See the module; `lora` and `salt`: "" = none."""

    tenant: str
    model: str
    lora: str
    block_size: int
    salt: str = ""


class Holder(msgspec.Struct, frozen=True):
    """One that holds blocks."""

    instance: str  # "" = a pool, for every instance of the context
    rank: int
    tier: Tier


class RankHits(msgspec.Struct, frozen=True):
    """Tokens from the first on: on the rank's GPU, then on in memory, then on in files. Never falls."""

    gpu: int
    cpu: int
    disk: int


class InstanceHits(msgspec.Struct, frozen=True):
    """Of one instance; `alone`: tokens from the first on that one tier has all."""

    ranks: dict[int, RankHits]
    alone: dict[Tier, int]

    @property
    def best(self) -> RankHits:
        """The most of each, as upstream tells it."""
        of = self.ranks.values()
        if len(of) == 1:  # by far the most instances, and this is asked of all
            return next(iter(of))
        return RankHits(
            max((rank.gpu for rank in of), default=0),
            max((rank.cpu for rank in of), default=0),
            max((rank.disk for rank in of), default=0),
        )


class _Rank(msgspec.Struct, frozen=True):
    """Whose word on a rank counts, by tier."""

    rank: int
    gpu: list[str]
    own: dict[Tier, list[str]]


class _Layout(msgspec.Struct, frozen=True):
    """Who holds for whom; made anew when that changes, as every query needs it."""

    instances: dict[str, list[_Rank]]
    nothing: dict[str, InstanceHits]
    pools: dict[Tier, list[str]]


Look = tuple[PrefixIndex, Keys]
"""An index, and a prompt's names in it."""


class Context:
    """The blocks of one context, and who serves it."""

    def __init__(
        self,
        key: ContextKey,
        profile: Profile,
        blocks_max: int = BLOCKS_MAX,
        naming: Callable[[Salt], Naming] | None = None,
        index: PrefixIndex | None = None,
    ) -> None:
        """Empty; `naming` (of a salt) and `index`: other than XXH3 and an index of its own."""
        self.key = key
        self.profile = profile
        self.tokens = PrefixIndex(blocks_max) if index is None else index
        self.hashes = PrefixIndex(blocks_max) if isinstance(profile, VllmV1) else self.tokens
        self.services: dict[str, tuple[str, int] | None] = {}  # key -> instance and rank; None = of a pool
        self._holders: dict[str, Holder] = {}  # node -> who; those whose word is good now
        self._naming = naming or self._xxh3
        self._memo = KeyMemo()
        self._made: _Layout | None = None

    @property
    def seed(self) -> int:
        """Of XXH3."""
        return self.profile.seed if isinstance(self.profile, Xxh3) else Xxh3().seed

    def instances(self) -> dict[str, list[int]]:
        """Return the ranks of every instance."""
        found: dict[str, list[int]] = {}
        for instance, rank in sorted(set(filter(None, self.services.values()))):
            found.setdefault(instance, []).append(rank)
        return found

    def blocks(self) -> int:
        """Return how many blocks are known."""
        both = {id(index): index.stats().blocks for index in (self.tokens, self.hashes)}
        return max(both.values())

    def dropped(self) -> int:
        """Return how many were dropped because an index was full."""
        both = {id(index): index.stats().dropped for index in (self.tokens, self.hashes)}
        return sum(both.values())

    def join(self, service: str, who: tuple[str, int] | None) -> None:
        """Take in a registration: of an instance and rank, or of a pool."""
        self.services[service] = who
        self._made = None

    def leave(self, service: str) -> None:
        """Forget a registration."""
        self.services.pop(service, None)
        self._made = None

    def hold(self, node: str, holder: Holder) -> None:
        """Count a holder's blocks."""
        self._holders[node] = holder
        self._made = None

    def unhold(self, node: str) -> None:
        """Keep a holder's blocks without counting them."""
        self._holders.pop(node, None)
        self._made = None

    def drop(self, node: str) -> None:
        """Forget a holder's blocks, and the holder."""
        self.unhold(node)
        self.tokens.drop(node)
        self.hashes.drop(node)

    def forget_names(self) -> None:
        """Make names of prompts anew: for measuring."""
        self._memo = KeyMemo()

    # ------------------------------------------------------------ queries

    def by_tokens(self, packed: bytes, salt: Salt, instance: str | None) -> dict[str, InstanceHits]:
        """Return what each instance has of a prompt.

        Args:
            packed: its tokens as little-endian i32.
            salt: of the request.
            instance: only this one; None = all.
        """
        size, profile = self.key.block_size, self.profile
        own = (self.tokens, LazyKeys(self._naming(salt), packed, size, self._memo))
        pooled: list[Look] = [own]
        if isinstance(profile, VllmV1):
            pooled = []
            if any(self._layout().pools.values()):
                namings = [VllmNaming(profile, size, form) for form in profile.forms(self.key.lora, salt)]
                pooled = [(self.hashes, LazyKeys(one, packed, size, self._memo)) for one in namings]
        return self._hits(own, pooled, instance)

    def by_hashes(self, hashes: Sequence[int], instance: str | None) -> dict[str, InstanceHits]:
        """Return the same of names that the context's profile makes."""
        own = (self.hashes, Keys(blob_of(hashes), len(hashes)))
        return self._hits(own, [own], instance)

    def _xxh3(self, salt: Salt) -> Naming:
        return Xxh3Naming(self.seed, self.key.block_size, salt)

    def _hits(self, own: Look, pooled: Sequence[Look], wanted: str | None) -> dict[str, InstanceHits]:
        layout = self._layout()
        depth = own[0].longest_prefix(own[1])
        known: dict[tuple[int, Tier], int] = {}  # how far the pools alone lead, from a place on

        def on(start: int, rank: _Rank, tier: Tier) -> int:
            if of := rank.own[tier]:
                return _reach([(own, of), *((look, layout.pools[tier]) for look in pooled)], start)
            end = known.get((start, tier))
            if end is None:
                end = known[start, tier] = _reach([(look, layout.pools[tier]) for look in pooled], start)
            return end

        size = self.key.block_size
        pools = any(layout.pools.values())
        found: dict[str, InstanceHits] = {}
        for instance, ranks in layout.instances.items():
            if wanted is not None and instance != wanted:
                continue
            below = pools or any(rank.own[tier] for rank in ranks for tier in LOWER)
            if not below and not any(node in depth for rank in ranks for node in rank.gpu):
                found[instance] = layout.nothing[instance]
                continue
            hits, alone = {}, dict.fromkeys(Tier, 0)
            for rank in ranks:
                gpu = max((depth.get(node, 0) for node in rank.gpu), default=0)
                alone[Tier.GPU] = max(alone[Tier.GPU], size * gpu)
                cpu = disk = gpu
                if below:
                    cpu = on(gpu, rank, Tier.CPU)
                    disk = on(cpu, rank, Tier.DISK)
                    for tier in LOWER:
                        alone[tier] = max(alone[tier], size * on(0, rank, tier))
                hits[rank.rank] = RankHits(size * gpu, size * cpu, size * disk)
            found[instance] = InstanceHits(hits, alone)
        return found

    def _layout(self) -> _Layout:
        if self._made is not None:
            return self._made
        nodes: dict[tuple[str, int, Tier], list[str]] = {}
        for node, holder in self._holders.items():
            nodes.setdefault((holder.instance, holder.rank, holder.tier), []).append(node)
        instances, nothing = {}, {}
        for instance, ranks in self.instances().items():
            instances[instance] = [
                _Rank(
                    rank,
                    nodes.get((instance, rank, Tier.GPU), []),
                    {tier: nodes.get((instance, rank, tier), []) for tier in LOWER},
                )
                for rank in ranks
            ]
            nothing[instance] = InstanceHits(dict.fromkeys(ranks, RankHits(0, 0, 0)), dict.fromkeys(Tier, 0))
        pools = {tier: nodes.get(("", 0, tier), []) for tier in LOWER}
        self._made = _Layout(instances, nothing, pools)
        return self._made


def _reach(looks: Sequence[tuple[Look, list[str]]], start: int) -> int:
    """Return the first block from `start` on that none of the nodes has."""
    looks = [look for look in looks if look[1]]
    at = start
    for _ in range(HOPS_MAX if looks else 0):
        best = 0
        for (index, keys), nodes in looks:
            depth = index.longest_prefix(After(keys, at))
            best = max(best, *(depth.get(node, 0) for node in nodes))
        if not best:
            break
        at += best
    return at


class Contexts:
    """All contexts; bounded."""

    def __init__(self, seed: int, blocks_max: int = BLOCKS_MAX) -> None:
        """`seed`: of XXH3, where no profile is told; `blocks_max`: of each context."""
        self._seed = seed
        self._blocks_max = blocks_max
        self.all: dict[ContextKey, Context] = {}

    def check(self, key: ContextKey, profile: Profile | None) -> None:
        """Refuse what `bind` could not do.

        Raises:
            RequestError: the context has blocks of another profile.
            CapacityError: there are too many contexts.
        """
        known = self.all.get(key)
        if known is None and len(self.all) >= CONTEXTS_MAX:
            raise CapacityError(f"{CONTEXTS_MAX} contexts are known: unregister some")
        if known is not None and isinstance(known.profile, Own):
            raise RequestError("the context is of this cluster's own engines: register another model name")
        if known is not None and profile is not None and known.profile != profile:
            raise RequestError(f"registration conflicts with the context's hash profile, {known.profile}")

    def bind(self, key: ContextKey, profile: Profile | None) -> Context:
        """Return a context, new or known; raises as `check`."""
        self.check(key, profile)
        known = self.all.get(key)
        if known is None:
            known = self.all[key] = Context(key, profile or Xxh3(self._seed), self._blocks_max)
        return known

    def release(self, context: Context, service: str) -> None:
        """Forget a service, and a context that has none."""
        context.leave(service)
        if not context.services:
            self.all.pop(context.key, None)

    def find(
        self, tenant: str, model: str, lora: str, block_size: int, salt: Salt
    ) -> tuple[Context, Salt] | None:
        """Return the context of a query, and the salt that is the request's own.

        A salt that publishers were registered with names a context; any other one is a request's.
        """
        if salt and (context := self.all.get(ContextKey(tenant, model, lora, block_size, salt))):
            return context, None
        found = self.all.get(ContextKey(tenant, model, lora, block_size))
        return None if found is None else (found, salt)
