"""The whole pool for plain threads: put, get, view and remove objects, wherever their stores are.

    with Pool("tcp://127.0.0.1:7700") as pool:
        pool.put(["weights/0"], [array])
        (data,) = pool.get(["weights/0"])

Stores of this host are used by shared memory: bytes are copied once, or not at all (`view`). Those of other
hosts are reached through a transfer engine. Who has a key is a directory's knowledge; without one, or while
it is away, this host's stores are asked and then all others at once (bounds: kvstore.client.locate).

Every call has a deadline and answers for each key by itself: what was done stays done. What is read is
leased meanwhile and verified by its checksum, so a store that dies, restarts or is overwritten makes a key
fail or be read from another store; it never makes wrong bytes. Objects are immutable: a second put of a
name changes nothing. Only two puts of different bytes under one name *at the same moment* on different
hosts can both succeed; which one a reader then gets is not defined.
"""

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import structlog

from kvstore.client import straight, survey
from kvstore.client.gather import Gather
from kvstore.client.local import LocalStore
from kvstore.client.locate import Locator
from kvstore.client.members import Members, OpenMetadata
from kvstore.client.model import BATCH_KEYS_MAX, Bytes, Hints, Into, Place, Result, parts_of
from kvstore.client.object_names import key_of, keys_of
from kvstore.client.removal import Removal
from kvstore.client.scatter import Scatter
from kvstore.client.straight import Pieces
from kvstore.client.view import Views
from kvstore.leader.placement import COPIES_MAX
from kvstore.limits import LEASE_S_MAX, WRITE_S_MAX
from mooncake.core.errors import MooncakeError, RequestError
from mooncake.core.messages import StoreRecord, StoreStats
from mooncake.core.metadata_open import open_metadata
from mooncake.core.secret import cluster_secret
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.model import Buffer

log = structlog.get_logger(__name__)

DEADLINE_S = 5.0
START_S = 10.0

Name = str | bytes
"""A bytes object of 32 bytes is a key; anything else a name, see kvstore.client.object_names."""


class Pool:
    """See the module. Thread-safe; `close` it, or use it as a context."""

    def __init__(
        self,
        metadata: str | OpenMetadata | None = None,
        *,
        stores: Iterable[StoreRecord] = (),
        engine: TransferEngine | EngineConfig | None = None,
        writer: str = "",
        touch: bool = True,
        start_s: float = START_S,
        members: Members | None = None,
        sure: bool = False,
    ) -> None:
        """Find the stores, attach to those of this host.

        Args:
            metadata: where stores and directories register, "tcp://..." or "etcd://..." (see
                core.metadata_open); None: only `stores` are used.
            stores: records of stores that are known already.
            engine: for stores of other hosts; a running one is not closed here. None: one that shows them
                the cluster's secret (core.secret).
            writer: name of this process, the same after a restart or unique; "" = unique.
            touch: fill this process's page tables for local stores now (0.1 s per GiB).
            start_s: longest wait for the metadata store.
            members: who is in the pool, where somebody else has found out; closed here. It takes an `engine`.
            sure: find what was put a moment ago on any host: where directories know of nobody, every store is
                asked. Else such an object may be MISSING until a directory has heard of it, milliseconds.

        Raises:
            PeerTimeout: the metadata store did not answer; ConfigError: settings that cannot work.
        """
        self._own_engine = engine is None or isinstance(engine, EngineConfig)
        if engine is None or isinstance(engine, EngineConfig):
            self._engine = TransferEngine(engine or EngineConfig(secret=cluster_secret())).start()
        else:
            self._engine = engine
        self._members = members or Members(self._engine, writer or f"pool-{secrets.token_hex(6)}", touch)
        self._locator = Locator(self._members, sure)
        try:
            for record in stores:
                self._members.join(record)
            if metadata is not None:
                text = metadata
                opener = (lambda: open_metadata(text)) if isinstance(text, str) else text
                self._members.follow(opener, start_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything (idempotent). Views that are in use stay readable, their leases end."""
        self._members.close()
        self._locator.close()
        if self._own_engine:
            self._engine.close()

    @property
    def nodes(self) -> list[str]:
        """Names of the stores that are in the pool now."""
        return list(self._members.stores)

    @property
    def records(self) -> list[StoreRecord]:
        """Records of these stores."""
        return [access.record for access in self._members.stores.values()]

    @property
    def changed(self) -> threading.Event:
        """Set whenever `records` or `directories` are others; for one who waits for it and clears it."""
        return self._members.changed

    @property
    def directories(self) -> dict[str, str]:
        """Endpoints of the directories that are in the pool now, by name."""
        return self._members.directories

    def stats(self, node: str, deadline_s: float = DEADLINE_S) -> StoreStats:
        """Return the counters of one of them.

        Raises:
            PeerError: it does not answer; RequestError: it is not in the pool.
        """
        access = self._members.stores.get(node)
        if access is None:
            raise RequestError(f"node {node!r}: not in the pool")
        return access.stats(deadline_s)

    def register(self, memory: Any, size_bytes: int | None = None) -> Buffer:
        """Let bytes of other hosts go straight into and out of `memory` (see TransferEngine.register)."""
        return self._engine.register(memory, size_bytes)

    def unregister(self, buffer: Buffer) -> None:
        """Take registered memory back, see TransferEngine.unregister."""
        self._engine.unregister(buffer)

    # ------------------------------------------------------------ writing

    def put(
        self,
        keys: Sequence[Name],
        buffers: Sequence[Any],
        *,
        replicas: int = 1,
        preferred: Sequence[str] = (),
        soft_pin_s: float = 0.0,
        hard_pin: bool = False,
        tenant: str = "",
        group: str = "",
        listed: bool = False,
        replace: bool = False,
        deadline_s: float = DEADLINE_S,
    ) -> list[Result]:
        """Store objects of any sizes.

        Args:
            keys: names or keys.
            buffers: for each its bytes: one buffer (bytes, memoryview, numpy array, ...), or a list of them
                that make the object in that order.
            replicas: copies on different nodes; fewer that were possible are DONE with a reason.
            preferred: nodes to use first; else this host while it has room, then where there is room.
            soft_pin_s: keep each until it was not read for so long.
            hard_pin: keep each until it is removed.
            tenant: namespace of names, and who pays.
            group: objects that are useful only together.
            listed: `names` shall list those that are called by text; costs memory of the stores.
            replace: what the pool has goes when the new bytes are there, and who has begun to read the old
                ones finishes. No reader finds neither, unless `preferred` sends an object to another node.
            deadline_s: for all of it, at most WRITE_S_MAX.

        Returns:
            DONE, EXISTS (the pool had it), FULL or FAILED for each, in order.

        Raises:
            RequestError: arguments that make no sense; nothing was written then.
        """
        if len(keys) != len(buffers):
            raise RequestError(f"{len(keys)} keys, {len(buffers)} buffers")
        if not 1 <= replicas <= COPIES_MAX:
            raise RequestError(f"replicas={replicas}: 1 to {COPIES_MAX}")
        parts = [parts_of(buffer) for buffer in buffers]
        hashed = keys_of(keys, tenant)
        texts = _texts(keys, hashed) if listed else {}
        hints = Hints(tenant, group, soft_pin_s, hard_pin, texts, replace)
        end_s = time.monotonic() + min(deadline_s, WRITE_S_MAX)
        scatter = Scatter(self._members, self._locator, replicas, preferred, hints, end_s)
        return _in_rounds(hashed, lambda some, at: scatter.put(some, parts[at : at + len(some)]))

    def remove(
        self,
        keys: Sequence[Name],
        *,
        tenant: str = "",
        nodes: Sequence[str] = (),
        unless_read_s: float = 0.0,
        deadline_s: float = DEADLINE_S,
    ) -> list[Result]:
        """Remove objects from every store, or from `nodes` only; readers that hold them finish undisturbed.

        Args:
            keys: names or keys.
            tenant: namespace of names.
            nodes: () = all.
            unless_read_s: leave what any client has read in so many seconds, as far as stores know by now: a
                read is told within 50 ms. A look is no read.
            deadline_s: for all of it.

        Returns:
            DONE (nobody has it any more, as far as stores answered), MISSING, HELD (see `unless_read_s`), or
            FAILED: a store that may have it could not be asked.
        """
        end_s = time.monotonic() + deadline_s

        def remove(some: list[bytes], _: int) -> list[Result]:
            removal = Removal(self._members, some, unless_read_s, end_s)
            for access in list(self._members.stores.values()):
                if not nodes or access.node in nodes:
                    removal.look(access)
            return removal.run()

        return _in_rounds(keys_of(keys, tenant), remove)

    # ------------------------------------------------------------ reading

    def get_into(
        self,
        keys: Sequence[Name],
        targets: Sequence[Any],
        *,
        tenant: str = "",
        deadline_s: float = DEADLINE_S,
        skip_checksums: bool = False,
    ) -> list[Result]:
        """Read objects into the caller's memory.

        Args:
            keys: names or keys.
            targets: for each one writable buffer, or a list of them that is filled in order; larger than
                the object is fine.
            tenant: namespace of names.
            deadline_s: for all of it.
            skip_checksums: trust the lease alone; a store's damaged memory would go unnoticed.

        Returns:
            DONE with the size, MISSING or FAILED for each. A target that is not DONE may have been
            written to.

        Raises:
            RequestError: targets that are no writable buffers; nothing was read then.
        """
        if len(keys) != len(targets):
            raise RequestError(f"{len(keys)} keys, {len(targets)} targets")
        parts = [parts_of(target, writable=True) for target in targets]
        gather = self._gather(deadline_s, not skip_checksums)
        if len(keys) == 1 and len(parts[0]) == 1:
            done = gather.one(key_of(keys[0], tenant), parts[0][0])
            if done is not None:
                return [done]
        return _in_rounds(
            keys_of(keys, tenant), lambda some, at: gather.read(some, Into(parts[at : at + len(some)]))
        )

    def get(
        self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S
    ) -> list[bytes | None]:
        """Return objects as bytes; None = missing or failed (`get_into` tells which)."""
        gather = self._gather(deadline_s)
        values: list[bytes | None] = []
        hashed = keys_of(keys, tenant)
        for at in range(0, len(hashed), BATCH_KEYS_MAX):
            some = hashed[at : at + BATCH_KEYS_MAX]
            sink = Bytes(len(some))
            results = gather.read(some, sink)
            values += [value if one.ok else None for value, one in zip(sink.values, results, strict=True)]
        return values

    def get_straight(
        self, keys: Sequence[Name], pieces: Pieces, *, tenant: str = "", deadline_s: float = DEADLINE_S
    ) -> bool:
        """Read objects whose sizes are known into pieces of one memory, by the shortest way.

        Returns:
            Whether all were read; if not, `get_into` reads what can be read.
        """
        gather = self._gather(deadline_s)
        access = gather.nearest() if 0 < len(keys) <= BATCH_KEYS_MAX else None
        return access is not None and straight.get(access, keys_of(keys, tenant), pieces, gather.end_s)

    def put_straight(
        self, keys: Sequence[Name], pieces: Pieces, *, listed: bool = False, deadline_s: float = DEADLINE_S
    ) -> bool:
        """Store objects of one size that lie in pieces of one memory, by the shortest way.

        Returns:
            Whether all were stored; if not, none was, and `put` tells why, or does it.
        """
        gather = self._gather(min(deadline_s, WRITE_S_MAX))
        access = gather.nearest() if 0 < len(keys) <= BATCH_KEYS_MAX else None
        if access is None or len(self._members.stores) > 1:
            return False
        names = [name.encode() if isinstance(name, str) else b"" for name in keys] if listed else []
        try:
            return straight.put(access, keys_of(keys, ""), pieces, names, gather.end_s)
        except MooncakeError as error:
            self._members.lost(access, error)
            return False

    def view(
        self,
        keys: Sequence[Name],
        *,
        lease_s: float = LEASE_S_MAX,
        tenant: str = "",
        deadline_s: float = DEADLINE_S,
        skip_checksums: bool = False,
    ) -> Views:
        """Return objects of this host's stores where they lie: read-only views, nothing copied.

        They are guaranteed for `lease_s`, or until `release` (the views' context does it). An object that
        is only on other hosts has no view: `get_into` reads it.
        """
        views = Views(len(keys), time.monotonic() + lease_s)
        end_s = time.monotonic() + deadline_s
        hashed = keys_of(keys, tenant)
        for access in [one for one in self._members.stores.values() if isinstance(one, LocalStore)]:
            rows = [row for row, view in enumerate(views.views) if view is None]
            if not rows:
                break
            for at in range(0, len(rows), BATCH_KEYS_MAX):
                some = rows[at : at + BATCH_KEYS_MAX]
                try:
                    look = access.find([hashed[row] for row in some], end_s, lease_s)
                    views.add(access, look, some, not skip_checksums)
                except MooncakeError as error:
                    self._members.lost(access, error)
        return views

    def _gather(self, deadline_s: float, verify: bool = True) -> Gather:
        return Gather(self._members, self._locator, verify, time.monotonic() + deadline_s)

    # ------------------------------------------------------------ looking

    def look(self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S) -> list[Result]:
        """Return for each key DONE with its size and the first nodes that have it, MISSING, or FAILED."""
        gather = self._gather(deadline_s)
        return _in_rounds(keys_of(keys, tenant), lambda some, _: gather.look(some))

    def exists(self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S) -> list[bool]:
        """Return whether the pool has each key; a store that cannot be asked counts as without it."""
        found = self.sizes_here(keys, tenant=tenant, deadline_s=deadline_s)
        if found is not None:
            return [size > 0 for size in found]
        return [one.ok for one in self.look(keys, tenant=tenant, deadline_s=deadline_s)]

    def sizes_here(
        self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S
    ) -> list[int] | None:
        """Return the bytes of each object, 0 = missing; None: that takes a `look` at more than one store."""
        return self._gather(deadline_s).here(keys_of(keys, tenant)) if len(keys) <= BATCH_KEYS_MAX else None

    def sizes(
        self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S
    ) -> list[int | None]:
        """Return the bytes of each object, None = not found."""
        if (found := self.sizes_here(keys, tenant=tenant, deadline_s=deadline_s)) is not None:
            return [size or None for size in found]
        looked = self.look(keys, tenant=tenant, deadline_s=deadline_s)
        return [one.size_bytes if one.ok else None for one in looked]

    def places(
        self, keys: Sequence[Name], *, tenant: str = "", deadline_s: float = DEADLINE_S
    ) -> list[list[Place]]:
        """Return for each key where its copies are now; nothing keeps them there.

        Raises:
            PeerError: a store could not be asked.
        """
        return survey.places(self._members, keys_of(keys, tenant), time.monotonic() + deadline_s)

    def names(self, *, tenant: str = "", deadline_s: float = DEADLINE_S) -> list[str]:
        """Return what objects were put as `listed` and are there, each once.

        Raises:
            PeerError: a store could not be asked.
        """
        return survey.names(self._members, tenant, time.monotonic() + deadline_s)


def _texts(names: Sequence[Name], keys: Sequence[bytes]) -> dict[bytes, bytes]:
    return {key: name.encode() for name, key in zip(names, keys, strict=True) if isinstance(name, str)}


def _in_rounds(keys: list[bytes], call: Callable[[list[bytes], int], list[Result]]) -> list[Result]:
    """Return what `call` answers to BATCH_KEYS_MAX keys at a time, beginning at a row."""
    if len(keys) <= BATCH_KEYS_MAX:
        return call(keys, 0)
    starts = range(0, len(keys), BATCH_KEYS_MAX)
    return list(itertools.chain.from_iterable(call(keys[at : at + BATCH_KEYS_MAX], at) for at in starts))
