"""The embedded metadata store: a pure machine, and the asyncio shell that gives it a clock.

The machine takes `now_s`, never looks at a clock, and is the reference of what any backend does.
Every change has its own revision; history is bounded, older watchers are told to list again.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.metadata import POLL_S
from mooncake.core.metadata_messages import MetaChange, MetaChanges, MetaEntries, MetaEntry, MetaPutResult

KEY_CHARS_MAX = 512
VALUE_BYTES_MAX = 64 << 10
"""Records are 1 kB; whoever needs more wants another place for it."""
KEYS_MAX = 10_000
LEASES_MAX = 10_000
"""One lease per process: ten times the largest cluster we think of."""
STORED_BYTES_MAX = 8 << 20
"""All keys and values: one listing must fit a message of 16 MiB (wire.MESSAGE_BYTES_MAX)."""
HISTORY_MAX = 4096
HISTORY_BYTES_MAX = 4 << 20
"""Changes kept for watchers: minutes of a busy cluster, and one reply always fits a message."""
TTL_S_MIN, TTL_S_MAX = 0.05, 3600.0
TICK_S = 0.1
"""Leases end at most this late."""
STALL_S = 1.0
"""A loop that slept longer than this could not hear keep-alives: leases are extended instead."""


class _Entry:
    __slots__ = ("lease_id", "revision", "value")

    def __init__(self, value: bytes, revision: int, lease_id: int) -> None:
        self.value, self.revision, self.lease_id = value, revision, lease_id


class _Lease:
    __slots__ = ("end_s", "keys", "ttl_s")

    def __init__(self, ttl_s: float, end_s: float) -> None:
        self.ttl_s, self.end_s = ttl_s, end_s
        self.keys: dict[str, None] = {}  # a dict, not a set: removal order must not vary


class MetadataMachine:
    """State of the store. Same calls in the same order give the same state."""

    def __init__(self, epoch: str, first_lease_id: int = 1, history_max: int = HISTORY_MAX) -> None:
        """`first_lease_id` should differ between lives: an old lease must not match a new one."""
        self.epoch = epoch
        self.revision = 0
        self._history_max = history_max
        self._entries: dict[str, _Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._next_lease_id = first_lease_id
        self._history: deque[MetaChange] = deque()
        self._history_bytes = 0
        self._stored_bytes = 0
        self._compacted_to = 0  # changes up to here are no longer in history

    def get(self, prefix: str) -> MetaEntries:
        """Return entries under `prefix`, sorted by key."""
        keys = sorted(key for key in self._entries if key.startswith(prefix))
        found = [MetaEntry(key, self._entries[key].value, self._entries[key].revision) for key in keys]
        return MetaEntries(self.revision, found, self.epoch)

    def put(self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None) -> MetaPutResult:
        """Write one key; see MetadataStore.put.

        Raises:
            RequestError: unknown lease, or key or value too large.
            CapacityError: the store is full.
        """
        if not 0 < len(key) <= KEY_CHARS_MAX:
            raise RequestError(f"metadata key of {len(key)} characters: 1..{KEY_CHARS_MAX} are allowed")
        if len(value) > VALUE_BYTES_MAX:
            raise RequestError(f"metadata value of {key} has {len(value)} bytes, at most {VALUE_BYTES_MAX}")
        if lease_id and lease_id not in self._leases:
            raise RequestError(f"lease {lease_id} is gone: grant a new one and put {key} again")
        old = self._entries.get(key)
        current = old.revision if old else 0
        if if_revision is not None and if_revision != current:
            return MetaPutResult(False, current)
        grow_bytes = len(value) - len(old.value) if old else len(key) * 4 + len(value)
        if (old is None and len(self._entries) >= KEYS_MAX) or (
            self._stored_bytes + grow_bytes > STORED_BYTES_MAX
        ):
            raise CapacityError(
                f"metadata store is full: {len(self._entries)} keys, {self._stored_bytes} bytes "
                f"(limits {KEYS_MAX} keys, {STORED_BYTES_MAX} bytes)"
            )
        if old and old.lease_id:
            self._leases[old.lease_id].keys.pop(key, None)
        if lease_id:
            self._leases[lease_id].keys[key] = None
        self._stored_bytes += grow_bytes
        self._record(key, value)
        self._entries[key] = _Entry(value, self.revision, lease_id)
        return MetaPutResult(True, self.revision)

    def delete(self, key: str) -> bool:
        """Remove one key; return whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        if entry.lease_id:
            self._leases[entry.lease_id].keys.pop(key, None)
        self._stored_bytes -= len(key) * 4 + len(entry.value)
        self._record(key, None)
        return True

    def grant(self, now_s: float, ttl_s: float) -> int:
        """Return a new lease of `ttl_s`, held within TTL_S_MIN..TTL_S_MAX.

        Raises:
            RequestError: the time to live is out of range.
            CapacityError: too many leases.
        """
        if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:  # NaN fails here too
            raise RequestError(f"lease of {ttl_s} s: {TTL_S_MIN}..{TTL_S_MAX} s are allowed")
        if len(self._leases) >= LEASES_MAX:
            raise CapacityError(f"{LEASES_MAX} metadata leases are alive")
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self._leases[lease_id] = _Lease(ttl_s, now_s + ttl_s)
        return lease_id

    def keep_alive(self, now_s: float, lease_id: int) -> float:
        """Refresh a lease and return its time to live; 0 = it is gone."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0.0
        lease.end_s = now_s + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int) -> bool:
        """End a lease, remove its keys; return whether it was alive."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        for key in list(lease.keys):
            self.delete(key)
        del self._leases[lease_id]
        return True

    def tick(self, now_s: float) -> bool:
        """End leases whose time is over; return whether any ended."""
        over = [lease_id for lease_id, lease in self._leases.items() if lease.end_s <= now_s]
        for lease_id in over:
            self.revoke(lease_id)
        return bool(over)

    def extend_leases(self, by_s: float) -> None:
        """Give every lease `by_s` more: the store itself was not there to hear its holders."""
        for lease in self._leases.values():
            lease.end_s += by_s

    def changes_after(self, prefix: str, revision: int, epoch: str = "") -> MetaChanges:
        """Return changes under `prefix` after `revision`, or compacted."""
        foreign = (epoch and epoch != self.epoch) or revision > self.revision
        if foreign or revision < self._compacted_to:
            return MetaChanges(self.revision, [], compacted=True, epoch=self.epoch)
        newest_first = []
        for change in reversed(self._history):
            if change.revision <= revision:
                break
            if change.key.startswith(prefix):
                newest_first.append(change)
        return MetaChanges(self.revision, newest_first[::-1], epoch=self.epoch)

    def _record(self, key: str, value: bytes | None) -> None:
        self.revision += 1
        self._history.append(MetaChange(key, value, self.revision))
        self._history_bytes += len(key) * 4 + len(value or b"")
        while len(self._history) > self._history_max or self._history_bytes > HISTORY_BYTES_MAX:
            dropped = self._history.popleft()
            self._history_bytes -= len(dropped.key) * 4 + len(dropped.value or b"")
            self._compacted_to = dropped.revision


class MemoryMetadata:
    """The machine with a clock, in this process. Implements MetadataStore.

    Needs a running event loop from its first call on; `close` stops its ticker.
    """

    def __init__(
        self,
        clock_s: Callable[[], float] = time.monotonic,
        history_max: int = HISTORY_MAX,
        poll_s: float = POLL_S,
        tick_s: float = TICK_S,
    ) -> None:
        """`clock_s` is injected by tests. A watch yields every `poll_s`, leases end every `tick_s`."""
        self._poll_s = poll_s
        self._tick_s = tick_s
        # random and below 2**52: never equal to a lease of an earlier life, exact in JSON
        self._machine = MetadataMachine(secrets.token_hex(8), secrets.randbits(51) + 1, history_max)
        self._clock_s = clock_s
        self._changed = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> str:
        """Name of this life of the store."""
        return self._machine.epoch

    async def get(self, prefix: str) -> MetaEntries:
        """See MetadataStore."""
        return self._machine.get(prefix)

    async def put(
        self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None
    ) -> MetaPutResult:
        """See MetadataStore."""
        result = self._machine.put(key, value, lease_id, if_revision)
        self._notify()
        return result

    async def delete(self, key: str) -> None:
        """See MetadataStore."""
        if self._machine.delete(key):
            self._notify()

    async def grant(self, ttl_s: float) -> int:
        """See MetadataStore."""
        if self._ticker is None:  # without leases nothing ever ends: no ticker
            self._ticker = asyncio.create_task(self._tick_for_ever(), name="metadata ticker")
        return self._machine.grant(self._clock_s(), ttl_s)

    async def keep_alive(self, lease_id: int) -> bool:
        """See MetadataStore."""
        return self._machine.keep_alive(self._clock_s(), lease_id) > 0

    async def revoke(self, lease_id: int) -> None:
        """See MetadataStore."""
        if self._machine.revoke(lease_id):
            self._notify()

    async def watch(self, prefix: str, from_revision: int, epoch: str = "") -> AsyncIterator[MetaChanges]:
        """See MetadataStore."""
        while True:
            batch = await self.poll(prefix, from_revision, epoch, self._poll_s)
            yield batch
            if batch.compacted:
                return
            from_revision = batch.revision

    async def poll(self, prefix: str, revision: int, epoch: str, wait_s: float) -> MetaChanges:
        """Return the next changes under `prefix`, or an empty batch after `wait_s`."""
        end_s = time.monotonic() + wait_s  # not clock_s: waiting is real even in tests
        while True:
            batch = self._machine.changes_after(prefix, revision, epoch)
            rest_s = end_s - time.monotonic()
            if batch.changes or batch.compacted or rest_s <= 0:
                return batch
            revision = batch.revision  # what was scanned without a match need not be scanned again
            try:
                async with asyncio.timeout(rest_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """See MetadataStore."""
        if self._ticker:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # waiters of the old one wake, later ones wait anew

    async def _tick_for_ever(self) -> None:
        seen_s = self._clock_s()
        while True:
            await asyncio.sleep(self._tick_s)
            now_s = self._clock_s()
            if now_s - seen_s > STALL_S:
                self._machine.extend_leases(now_s - seen_s)
            seen_s = now_s
            if self._machine.tick(now_s):
                self._notify()
