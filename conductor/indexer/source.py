"""One publisher's events into the contexts it serves. Pure.

Each block is remembered by the publisher's hash: a removal names nothing else, and a block that follows needs
its parent's name. What token ids and a salt do not name (pictures, embeddings) has no name that a query could
make: it is left out and counted. Losing all of it costs hits, never correctness.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from itertools import islice
from typing import Any

import msgspec

from conductor.indexer.contexts import Context, ContextKey, Contexts, Holder, Tier
from conductor.indexer.events import Told
from conductor.indexer.hashes import Profile, VllmV1, blob_of, low64, xxh3_names, xxh3_root
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.keys import token_bytes
from mooncake.worker.gpu_blocks import Cleared, Event, Hash, Removed, Stored

POOL = "Mooncake"
KINDS = ("vLLM", "SGLang", POOL)
MEDIA = {
    "gpu": Tier.GPU, "npu": Tier.GPU, "cpu": Tier.CPU, "cpu_pinned": Tier.CPU, "disk": Tier.DISK,
    "storage": Tier.DISK, "ssd": Tier.DISK,
}  # fmt: skip
"""vLLM's, SGLang's and the master's words, in small letters."""
SOURCE_BLOCKS_MAX = 4_000_000
"""Of one publisher and tier: the hash and the name take 110 bytes."""
DROP_FRACTION = 16
"""When full, the oldest 1/16 goes in one pass, as of PrefixIndex."""


class Service(msgspec.Struct, frozen=True):
    """One registration."""

    endpoint: str
    replay_endpoint: str
    kind: str
    model: str
    lora: str
    tenant: str
    instance: str
    block_size: int
    rank: int
    salt: str
    profile: Profile | None  # None = of the context, or XXH3

    @property
    def key(self) -> str:
        """As upstream spells it."""
        return f"{self.instance}|{self.tenant}|{self.rank}"

    def context(self, lora: str = "", tenant: str = "") -> ContextKey:
        """Return the context of its blocks; what is not told is the registration's."""
        return ContextKey(tenant or self.tenant, self.model, lora or self.lora, self.block_size, self.salt)


class LeftOut(StrEnum):
    """Why a block has no name: a metric label."""

    EXTRA = "extra_keys"  # pictures, embeddings
    PARENT = "parent"  # follows a block that is not known
    SHAPE = "shape"  # not one block_size of tokens each; another cache group
    MEDIUM = "medium"  # a word of a later version
    KEY = "object_key"  # a pool's object that is no block, or of another model
    CONTEXTS = "contexts"  # there are too many contexts, or it is another profile's


class _Table:
    """Blocks of one context on one tier."""

    def __init__(self, context: Context, node: str, holder: Holder) -> None:
        self.context = context
        self.node = node
        self.holder = holder
        self.names: dict[Hash, int | None] = {}  # None = the hash alone names it
        self.copies: Counter[Hash] = Counter()  # beyond the first: each is told when it goes

    def add(self, hashes: Sequence[Hash], names: Sequence[int | None]) -> None:
        self._apply(hashes, names, stored=True)
        for one, name in zip(hashes, names, strict=True):
            if one in self.names:
                self.copies[one] += 1
            else:
                self.names[one] = name
        excess = len(self.names) - SOURCE_BLOCKS_MAX
        if excess > 0:
            self.remove(list(islice(self.names, max(excess, SOURCE_BLOCKS_MAX // DROP_FRACTION))), every=True)

    def remove(self, hashes: Sequence[Hash], every: bool = False) -> None:
        gone: list[Hash] = []
        for one in hashes:
            copies = self.copies.pop(one, 0)
            if copies and not every:
                if copies > 1:
                    self.copies[one] = copies - 1
            elif one in self.names:
                gone.append(one)
        self._apply(gone, [self.names.pop(one) for one in gone], stored=False)

    def clear(self) -> None:
        self.names.clear()
        self.copies.clear()
        for index in {id(one): one for one in (self.context.tokens, self.context.hashes)}.values():
            index.reset(self.node)

    def _apply(self, hashes: Sequence[Hash], names: Sequence[int | None], stored: bool) -> None:
        context = self.context
        blob = blob_of([name for name in names if name is not None])
        context.tokens.apply(self.node, *((blob, b"") if stored else (b"", blob)))
        if context.hashes is not context.tokens:
            blob = blob_of(list(map(low64, hashes)))
            context.hashes.apply(self.node, *((blob, b"") if stored else (b"", blob)))


class Source:
    """What one registration has told."""

    def __init__(self, service: Service, contexts: Contexts) -> None:
        """Bind its context.

        Raises:
            RequestError: another profile is there.
            CapacityError: too many contexts.
        """
        self.service = service
        self._contexts = contexts
        self._tables: dict[tuple[ContextKey, str, Tier], _Table] = {}
        self._bound: dict[ContextKey, Context] = {}
        self._trusted = True
        self.left_out: Counter[LeftOut] = Counter()
        self._bind(service.context())

    def __len__(self) -> int:
        return sum(len(table.names) for table in self._tables.values())

    # ------------------------------------------------------------ trust

    @property
    def trusted(self) -> bool:
        """Whether its blocks count."""
        return self._trusted

    def trust(self, trusted: bool) -> None:
        """Count its blocks, or keep them without counting until it is heard again."""
        self._trusted = trusted
        for table in self._tables.values():
            if trusted:
                table.context.hold(table.node, table.holder)
            else:
                table.context.unhold(table.node)

    def forget(self) -> None:
        """Hold nothing: what is known cannot be relied on any more."""
        for table in self._tables.values():
            table.clear()

    def close(self) -> None:
        """Leave all contexts."""
        for table in self._tables.values():
            table.context.drop(table.node)
        for context in self._bound.values():
            self._contexts.release(context, self.service.key)
        self._tables.clear()
        self._bound.clear()

    # ------------------------------------------------------------ events

    def apply(self, events: Sequence[Event | Told]) -> None:
        """Take a batch."""
        for event in events:
            if isinstance(event, Told):
                self._told(event)
            elif isinstance(event, Cleared):
                self.forget()
            elif event.group_idx not in (None, 0):
                self.left_out[LeftOut.SHAPE] += len(event.block_hashes)
            elif (tier := MEDIA.get((event.medium or Tier.GPU).lower())) is None:
                self.left_out[LeftOut.MEDIUM] += len(event.block_hashes)
            elif isinstance(event, Removed):
                self._remove(tier, event.block_hashes)
            else:
                self._store(tier, event)

    def _remove(self, tier: Tier, hashes: Sequence[Hash]) -> None:
        for (_, _, of), table in self._tables.items():
            if of is tier:
                table.remove(hashes)

    def _store(self, tier: Tier, event: Stored) -> None:
        lora = event.lora_name or ("" if event.lora_id is None else f"#{event.lora_id}")
        table = self._table(self.service.context(lora), "", tier)
        count, size = len(event.block_hashes), self.service.block_size
        if table is None:
            self.left_out[LeftOut.CONTEXTS] += count
            return
        if (
            not event.token_ids
        ):  # a tier below tells hashes only; the tokens were told when they were computed
            names = [self._name(table.context, one) for one in event.block_hashes]
            reason = LeftOut.PARENT
        elif (event.block_size, len(event.token_ids)) != (size, count * size):
            names, reason = [None] * count, LeftOut.SHAPE
        else:
            names, reason = self._names(table.context, event)
        self.left_out[reason] += names.count(None)
        if not isinstance(table.context.profile, VllmV1):
            named = [
                (one, name) for one, name in zip(event.block_hashes, names, strict=True) if name is not None
            ]
            table.add([one for one, _ in named], [name for _, name in named])
        else:
            table.add(event.block_hashes, names)

    def _names(self, context: Context, event: Stored) -> tuple[list[int | None], LeftOut]:
        count = len(event.block_hashes)
        parent: int | None = None
        if event.parent_block_hash is not None:
            parent = self._name(context, event.parent_block_hash)
            if parent is None:
                return [None] * count, LeftOut.PARENT
        extras = event.extra_keys
        if extras is None or len(extras) != count:
            extras = [None] * count
        named = count
        for index, extra in enumerate(extras):
            salt = _salt(extra, event.lora_name)
            if salt == "":
                continue
            if salt is None or index or event.parent_block_hash is not None:
                named = index
                break
            parent = xxh3_root(salt, context.seed)
        size = self.service.block_size
        packed = token_bytes(event.token_ids[: named * size])
        made = xxh3_names(parent, packed, size, context.seed)
        return [*made, *[None] * (count - named)], LeftOut.EXTRA

    def _name(self, context: Context, block_hash: Hash) -> int | None:
        for (key, _, _), table in self._tables.items():
            if key == context.key and (name := table.names.get(block_hash)) is not None:
                return name
        return None

    def _told(self, event: Told) -> None:
        """Take an event of the standard's envelope: of a pool, or of an engine that names blocks by it."""
        if event.model not in ("", self.service.model) or event.block_size not in (
            None,
            self.service.block_size,
        ):
            self.left_out[LeftOut.KEY] += max(1, len(event.hashes))
            return
        tier = MEDIA.get(event.medium.lower() or (Tier.CPU if self.service.kind == POOL else Tier.GPU))
        if tier is None:
            self.left_out[LeftOut.MEDIUM] += max(1, len(event.hashes))
            return
        if event.kind == "cleared":
            for (_, backend, of), table in self._tables.items():
                if of is tier and backend == event.backend:
                    table.clear()
            return
        found = self._table(self.service.context(event.lora, event.tenant), event.backend, tier)
        if found is None:
            self.left_out[LeftOut.CONTEXTS] += len(event.hashes)
        elif not event.hashes:
            self.left_out[LeftOut.KEY] += 1
        elif event.kind == "removed":
            found.remove(event.hashes)
        else:
            standard = not isinstance(found.context.profile, VllmV1)
            # one object, one event: told again is not another copy
            new = [one for one in event.hashes if one not in found.names]
            found.add(new, [low64(one) if standard else None for one in new])

    # ------------------------------------------------------------ tables

    def _bind(self, key: ContextKey) -> Context:
        context = self._bound.get(key)
        if context is None:
            context = self._bound[key] = self._contexts.bind(key, self.service.profile)
            pool = self.service.kind == POOL
            context.join(self.service.key, None if pool else (self.service.instance, self.service.rank))
        return context

    def _table(self, key: ContextKey, backend: str, tier: Tier) -> _Table | None:
        table = self._tables.get((key, backend, tier))
        if table is None:
            try:
                context = self._bind(key)
            except (RequestError, CapacityError):
                return None
            service = self.service
            instance, rank = ("", 0) if service.kind == POOL else (service.instance, service.rank)
            node = f"{service.key}|{backend}|{tier}"
            table = self._tables[key, backend, tier] = _Table(context, node, Holder(instance, rank, tier))
            if self._trusted:
                context.hold(node, table.holder)
        return table


def _salt(extra: list[Any] | None, lora_name: str | None) -> str | None:
    """Return the salt that a block's extra keys tell; "" = none, None = there is more than a salt."""
    rest = list(extra or ())
    if lora_name is not None and rest[:1] == [lora_name]:
        del rest[0]
    if not rest:
        return ""
    return rest[0] if len(rest) == 1 and type(rest[0]) is str else None
