"""What operators asked for, kept in the metadata store until it is done: the next leader takes it up.

A task is called by the revision of its entry, which no other entry ever has. The entry of a drain
stays after the drain: the node is to be left alone until somebody says otherwise.
"""

from hashlib import sha256

import msgspec

from kvstore.leader.task_types import Kind
from mooncake.core import wire
from mooncake.core.errors import CapacityError, ProtocolError, RequestError
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_messages import MetaEntry

TASKS_PREFIX = "/mooncake/tasks/"
BOOK_KEYS_MAX = 1_024
"""Keys of one entry: 35 KB, half of what the metadata store takes as one value."""
ENTRIES_MAX = 128
"""Open tasks (64 at most) and drained nodes: 4 MB at worst."""


class TaskEntry(msgspec.Struct, frozen=True, array_like=True):
    """One request, as it was made."""

    kind: Kind
    keys: list[bytes]
    source: str
    target: str
    size_bytes: int

    @property
    def key(self) -> str:
        """Where it is kept: the same request at the same place."""
        if self.kind is Kind.DRAIN:
            return drain_key(self.source)
        what = wire.encode([self.keys, self.source, self.target])
        return f"{TASKS_PREFIX}{self.kind}/{sha256(what).hexdigest()[:32]}"


class Booked(msgspec.Struct, frozen=True):
    """An entry under its name."""

    task_id: int
    entry: TaskEntry


def drain_key(node: str) -> str:
    """Return where the drain of `node` is kept."""
    return f"{TASKS_PREFIX}{Kind.DRAIN}/{node}"


class TaskBook:
    """The entries in the metadata store. Every call may raise what MetadataStore raises."""

    def __init__(self, metadata: MetadataStore) -> None:
        """It is not closed here."""
        self._metadata = metadata

    async def add(self, entry: TaskEntry) -> int:
        """Keep `entry`; return what it is called, also if it was there.

        Raises:
            RequestError: too many keys.
            CapacityError: too many entries.
        """
        if len(entry.keys) > BOOK_KEYS_MAX:
            raise RequestError(
                f"{len(entry.keys)} keys in one task: at most {BOOK_KEYS_MAX}; ask in several parts"
            )
        there = await self._metadata.get(TASKS_PREFIX)
        known = [found for found in there.entries if found.key == entry.key]
        if known:
            return known[0].revision
        if len(there.entries) >= ENTRIES_MAX:
            raise CapacityError(f"{ENTRIES_MAX} tasks and drained nodes: cancel or undrain some")
        return (await self._metadata.put(entry.key, wire.encode(entry), if_revision=0)).revision

    async def remove(self, key: str) -> None:
        """Forget an entry (idempotent)."""
        await self._metadata.delete(key)

    async def entries(self) -> list[Booked]:
        """Return all, oldest first; what is no entry is left out."""
        listed = (await self._metadata.get(TASKS_PREFIX)).entries
        booked = [Booked(found.revision, entry) for found in listed if (entry := _decode(found))]
        return sorted(booked, key=lambda one: one.task_id)


def _decode(found: MetaEntry) -> TaskEntry | None:
    try:
        entry = wire.decode(found.value, TaskEntry)
    except ProtocolError:
        return None
    return entry if entry.key == found.key else None
