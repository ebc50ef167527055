"""What is cached where, per context, and how far a prompt is: upstream's answer, of our index. Pure.

A context is what makes blocks of equal tokens interchangeable: tenant, model, adapter, block size, and the
salt that its publishers were registered with. In each, blocks are found by names that tokens make (XXH3), as
events carry the tokens: so the hashes of an engine, whatever went into them, need not be made again. Blocks
of which only an engine's hash is told (a pool's) are found by that; the profile says how to make it.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

import msgspec

from conductor.index import BLOCKS_MAX, PrefixIndex
from conductor.indexer.hashes import (
    After,
    LazyKeys,
    Own,
    Profile,
    Salt,
    VllmV1,
    Xxh3,
    key_of,
    low64,
    xxh3_names,
    xxh3_root,
)
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
        return RankHits(
            max((rank.gpu for rank in of), default=0),
            max((rank.cpu for rank in of), default=0),
            max((rank.disk for rank in of), default=0),
        )


Look = tuple[PrefixIndex, Sequence[bytes]]
"""An index, and a prompt's names in it."""
Naming = Callable[[bytes, Salt], Iterator[bytes]]
"""Tokens as little-endian u32, and a salt, to keys of all full blocks."""


class Context:
    """The blocks of one context, and who serves it."""

    def __init__(
        self,
        key: ContextKey,
        profile: Profile,
        blocks_max: int = BLOCKS_MAX,
        naming: Naming | None = None,
        index: PrefixIndex | None = None,
    ) -> None:
        """Empty; `naming` and `index`: other than XXH3 and an index of its own."""
        self.key = key
        self.profile = profile
        self.tokens = PrefixIndex(blocks_max) if index is None else index
        self.hashes = PrefixIndex(blocks_max) if isinstance(profile, VllmV1) else self.tokens
        self.holders: dict[str, Holder] = {}  # node -> who; those whose word is good now
        self.services: dict[str, tuple[str, int] | None] = {}  # key -> instance and rank; None = of a pool
        self._naming = naming or self._xxh3

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

    def drop(self, node: str) -> None:
        """Forget a holder's blocks, and the holder."""
        self.holders.pop(node, None)
        self.tokens.drop(node)
        self.hashes.drop(node)

    # ------------------------------------------------------------ queries

    def by_tokens(self, packed: bytes, salt: Salt, instance: str | None) -> dict[str, InstanceHits]:
        """Return what each instance has of a prompt.

        Args:
            packed: its tokens as little-endian i32.
            salt: of the request.
            instance: only this one; None = all.
        """
        count = len(packed) // (4 * self.key.block_size)
        own = (self.tokens, LazyKeys(count, self._naming(packed, salt)))
        pooled = [own]
        profile = self.profile
        if isinstance(profile, VllmV1):
            pooled = []
            if any(not holder.instance for holder in self.holders.values()):
                forms = profile.forms(self.key.lora, salt)
                hashed = (profile.digests(packed, self.key.block_size, *form) for form in forms)
                pooled = [(self.hashes, LazyKeys(count, (key_of(low64(one)) for one in of))) for of in hashed]
        return self._hits(own, pooled, instance)

    def by_hashes(self, hashes: Sequence[int], instance: str | None) -> dict[str, InstanceHits]:
        """Return the same of names that the context's profile makes."""
        own = (self.hashes, LazyKeys(len(hashes), map(key_of, hashes)))
        return self._hits(own, [own], instance)

    def _xxh3(self, packed: bytes, salt: Salt) -> Iterator[bytes]:
        seed = self.seed
        return map(key_of, xxh3_names(xxh3_root(salt, seed), packed, self.key.block_size, seed))

    def _hits(self, own: Look, pooled: Sequence[Look], wanted: str | None) -> dict[str, InstanceHits]:
        index, keys = own
        depth = index.longest_prefix(keys)
        nodes: dict[tuple[str, int, Tier], list[str]] = {}
        for node, holder in self.holders.items():
            nodes.setdefault((holder.instance, holder.rank, holder.tier), []).append(node)
        pools = {tier: nodes.get(("", 0, tier), []) for tier in (Tier.CPU, Tier.DISK)}
        known: dict[tuple[int, Tier], int] = {}  # how far the pools alone lead, from a place on

        def on(start: int, instance: str, rank: int, tier: Tier) -> int:
            of = nodes.get((instance, rank, tier), [])
            if of:
                return _reach([(own, of), *((look, pools[tier]) for look in pooled)], start)
            end = known.get((start, tier))
            if end is None:
                end = known[start, tier] = _reach([(look, pools[tier]) for look in pooled], start)
            return end

        size = self.key.block_size
        found: dict[str, InstanceHits] = {}
        for instance, ranks in self.instances().items():
            if wanted is not None and instance != wanted:
                continue
            hits, alone = {}, dict.fromkeys(Tier, 0)
            for rank in ranks:
                gpu = max(
                    (depth.get(node, 0) for node in nodes.get((instance, rank, Tier.GPU), [])), default=0
                )
                cpu = on(gpu, instance, rank, Tier.CPU)
                hits[rank] = RankHits(size * gpu, size * cpu, size * on(cpu, instance, rank, Tier.DISK))
                for tier in (Tier.CPU, Tier.DISK):
                    alone[tier] = max(alone[tier], size * on(0, instance, rank, tier))
                alone[Tier.GPU] = max(alone[Tier.GPU], size * gpu)
            found[instance] = InstanceHits(hits, alone)
        return found


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
        context.services.pop(service, None)
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
