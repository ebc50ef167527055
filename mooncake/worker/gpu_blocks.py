"""Which blocks an engine's own prefix cache holds, by our names, from vLLM's KV events. Pure.

vLLM names a block by a hash of its own; ours is made from the parent's name and the token ids, which an
event carries, so nothing of vLLM's hashing is repeated here: its hashes only tell which block follows which.
What token ids do not name (adapters, pictures, embeddings) is left out and counted, never guessed.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from mooncake.core import wire
from mooncake.core.errors import ProtocolError
from mooncake.core.keys import chain, request_root

GPU = "GPU"
"""What vLLM calls the engine's own cache, on every device. Other tiers are the pool's business."""

Hash = int | bytes
"""vLLM's: the low 64 bits, or all of them (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)."""
Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


# ---------------------------------------------------------------- vLLM's words, in both encodings


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Blocks of one request, in order; `extra_keys`: what else each of them commits to."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[Token]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class Removed(msgspec.Struct, frozen=True, gc=False):
    """Blocks that were given up."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """The whole cache was emptied."""


class _StoredMap(Stored, frozen=True, gc=False, tag="BlockStored"):
    pass


class _RemovedMap(Removed, frozen=True, gc=False, tag="BlockRemoved"):
    pass


class _ClearedMap(Cleared, frozen=True, gc=False, tag="AllBlocksCleared"):
    pass


class _StoredArray(Stored, frozen=True, gc=False, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(Removed, frozen=True, gc=False, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(Cleared, frozen=True, gc=False, array_like=True, tag="AllBlocksCleared"):
    pass


class _TypeMap(msgspec.Struct):
    type: str


class _TypeArray(msgspec.Struct, array_like=True):
    type: str


class _Batch(msgspec.Struct, array_like=True):
    at_s: float
    events: list[msgspec.Raw]


Event = Stored | Removed | Cleared
_MAP: Any = _StoredMap | _RemovedMap | _ClearedMap
_ARRAY: Any = _StoredArray | _RemovedArray | _ClearedArray
_KNOWN = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})


def decode_batch(payload: bytes) -> list[Event]:
    """Return the events of one message of vLLM's that we know, in order.

    Raises:
        ProtocolError: it is no batch, or an event of a type that we know is not what it should be.
    """
    found = (_decode(memoryview(raw)) for raw in wire.decode(payload, _Batch).events)
    return [event for event in found if event is not None]


def _decode(raw: memoryview) -> Event | None:
    is_array = 0x90 <= raw[0] <= 0x9F or raw[0] in (0xDC, 0xDD)
    try:
        event: Event = wire.decode(raw, _ARRAY if is_array else _MAP)
    except ProtocolError:
        kind: type[_TypeMap | _TypeArray] = _TypeArray if is_array else _TypeMap
        if wire.decode(raw, kind).type in _KNOWN:
            raise
        return None  # a later vLLM may tell more
    return event


# ---------------------------------------------------------------- by our names


class LeftOut(StrEnum):
    """Why a block has no name of ours: a metric label."""

    LORA = "lora"  # an event names an adapter, not its content
    EXTRA = "extra_keys"  # pictures, embeddings; or nothing is said about them
    PARENT = "parent"  # follows a block that has no name, or that we forgot
    SHAPE = "shape"  # not one block_size of tokens each: windows, other groups


class GpuBlocks:
    """vLLM's hash -> our key of every block in the cache, and what changed since the last `drain`.

    A block may be there more than once (two requests computed it side by side): every copy is told when it
    comes and when it goes, so copies are counted.
    """

    def __init__(self, root: bytes, block_size: int, blocks_max: int) -> None:
        """Start empty.

        Args:
            root: of the engine's names, KvContext.root().
            block_size: tokens per block.
            blocks_max: blocks that the engine has; who tells of more has lost count.
        """
        self._root = root
        self._block_size = block_size
        self._blocks_max = blocks_max
        self._keys: dict[Hash, bytes] = {}
        self._copies: Counter[Hash] = Counter()  # beyond the first
        self._total = 0  # with copies
        self._changes: Counter[bytes] = Counter()  # key -> came less went, since the last drain
        self.left_out: Counter[LeftOut] = Counter()
        self.evicted = 0
        """Blocks that the cache gave up, with or without a name."""

    def __len__(self) -> int:
        return len(self._keys)

    def apply(self, events: Sequence[Event]) -> None:
        """Take a batch.

        Raises:
            ProtocolError: it contradicts what was told before; `forget` then.
        """
        for event in events:
            if isinstance(event, Cleared):
                self.forget()
            elif event.medium not in (None, GPU):
                continue
            elif isinstance(event, Removed):
                if event.group_idx in (None, 0):
                    self.evicted += len(event.block_hashes)
                    self._removed(event)
            else:
                self._stored(event)

    def forget(self) -> None:
        """Hold nothing: the cache was cleared, or what is known cannot be trusted."""
        self._changes.subtract(self._keys.values())
        self._keys.clear()
        self._copies.clear()
        self._total = 0

    def keys(self) -> list[bytes]:
        """Return every block's key."""
        return list(self._keys.values())

    def drain(self) -> tuple[list[bytes], list[bytes]]:
        """Return the keys that came and those that went since the last call; none is in both."""
        changes, self._changes = self._changes, Counter()
        came = [key for key, balance in changes.items() if balance > 0]
        return came, [key for key, balance in changes.items() if balance < 0]

    def _stored(self, event: Stored) -> None:
        count = len(event.block_hashes)
        expected = (self._block_size, count * self._block_size)
        if event.group_idx not in (None, 0) or (event.block_size, len(event.token_ids)) != expected:
            self.left_out[LeftOut.SHAPE] += count
        elif event.lora_id is not None or event.lora_name is not None:
            self.left_out[LeftOut.LORA] += count
        else:
            parent, named = self._parent(event)
            reason = LeftOut.PARENT if parent is None else LeftOut.EXTRA
            self.left_out[reason] += count - named
            if parent is not None:
                tokens = event.token_ids[: named * self._block_size]
                keys = chain(parent, tokens, self._block_size)
                for block_hash, key in zip(event.block_hashes, keys, strict=False):
                    self._add(block_hash, key)

    def _parent(self, event: Stored) -> tuple[bytes | None, int]:
        """Return the key that the first block follows, None = unknown, and how many blocks have names."""
        count = len(event.block_hashes)
        if event.parent_block_hash is not None:
            parent = self._keys.get(event.parent_block_hash)
            if parent is None:
                return None, 0
        else:
            parent = self._root
        if event.extra_keys is None or len(event.extra_keys) != count:
            return parent, 0
        for index, extra in enumerate(event.extra_keys):
            if not extra:
                continue
            # of a prompt's first block, with no adapter: a text alone is the tenant's salt, as pictures are
            # pairs and embeddings bytes
            if index or event.parent_block_hash is not None or len(extra) != 1 or type(extra[0]) is not str:
                return parent, index
            parent = request_root(self._root, extra[0], None)
        return parent, count

    def _add(self, block_hash: Hash, key: bytes) -> None:
        known = self._keys.get(block_hash)
        if known is None:
            self._keys[block_hash] = key
            self._changes[key] += 1
        elif known == key:
            self._copies[block_hash] += 1
        else:
            raise ProtocolError(f"one hash, {block_hash!r}, for two blocks")
        self._total += 1
        if self._total > self._blocks_max:
            raise ProtocolError(f"more blocks than the engine has, {self._blocks_max}")

    def _removed(self, event: Removed) -> None:
        for block_hash in event.block_hashes:
            if block_hash not in self._keys:
                continue  # it had no name
            self._total -= 1
            copies = self._copies.pop(block_hash, 0)
            if copies == 0:
                self._changes[self._keys.pop(block_hash)] -= 1
            elif copies > 1:
                self._copies[block_hash] = copies - 1
