"""What the calls of `mooncake.store` do to the pool: upstream's codes, its read leases and its names.

Upstream's master refuses to remove what was read a moment ago (kv_lease_ttl), so that its readers are safe.
Ours are safe without: a store keeps what is being read. The refusal is kept for callers who rely on it: of
what this client itself has read or looked at, and of what a store knows that any client has read.
"""

import ctypes
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from kvstore.client.model import Outcome, Place, Result
from kvstore.client.scatter import WRITING
from kvstore.client.straight import Pieces
from kvstore.leader.placement import COPIES_MAX
from kvstore.node.contract import QUOTA_USED_UP
from kvstore.node.names import NAME_BYTES_MAX
from kvstore.node.tenants import NOT_REGISTERED
from mooncake.core.errors import PeerGone, RequestError
from mooncake.dropin.store.settings import node_of
from mooncake.dropin.store.start import Started
from mooncake.dropin.store.types import (
    INVALID_PARAMS,
    NO_AVAILABLE_HANDLE,
    OBJECT_HAS_LEASE,
    OBJECT_NOT_FOUND,
    OK,
    RPC_FAIL,
    TENANT_NOT_REGISTERED,
    TENANT_QUOTA_EXCEEDED,
    TRANSFER_FAIL,
    ReplicateConfig,
    SoftPinAction,
    segments_of,
)
from transfer.memory import check_mapped

MOVE_S = 30.0
"""For a call that moves bytes; upstream's transfers have the same limit."""
LOOK_S = 5.0
LIST_S = 60.0
READS_MAX = 1 << 16
"""Names whose last read is remembered; the oldest is forgotten first."""
COPIES_TRIED = 2
"""Reads of an object that is there and could not be read: another one wrote it, or a store has just died."""

log = structlog.get_logger(__name__)

Parts = Sequence[memoryview]


_REMOVE_CODES = {Outcome.MISSING: OBJECT_NOT_FOUND, Outcome.HELD: OBJECT_HAS_LEASE}


class ReadLeases:
    """What this client has used in the last `ttl_s` seconds. Thread-safe."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Know of no read."""
        self.ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}  # in the order of their ends

    def note(self, names: Sequence[str]) -> None:
        """These have just been read."""
        if not self.ttl_s:
            return
        now_s = self._clock()
        with self._lock:
            forget = self._until.pop
            for name in names:
                forget(name, None)
            self._until.update(dict.fromkeys(names, now_s + self.ttl_s))
            while self._until:
                oldest, until_s = next(iter(self._until.items()))
                if until_s > now_s and len(self._until) <= READS_MAX:
                    break
                del self._until[oldest]

    def forget(self, names: Sequence[str]) -> None:
        """These are gone, or somebody insists."""
        with self._lock:
            for name in names:
                self._until.pop(name, None)

    def holds(self, name: str) -> bool:
        """Return whether `name` must stay."""
        return self._until.get(name, 0.0) > self._clock()


class Calls:
    """Calls of one `setup`, by text names; everything else is as in kvstore.client.pool."""

    def __init__(self, started: Started) -> None:
        """`started` is not closed here."""
        self.started = started
        self.pool = started.pool
        self.tenant = started.tenant
        self.reads = ReadLeases(started.background.master_settings.kv_lease_ttl_s)

    # ------------------------------------------------------------ writing

    def put(
        self,
        names: Sequence[str],
        sources: Sequence[Parts],
        config: ReplicateConfig | None,
        *,
        replace: bool = False,
    ) -> list[int]:
        """Store objects; an object that is there stays, which is success, unless it is to be replaced."""
        config = config or ReplicateConfig()
        if config.replica_num < 1 or any(_is_bad(name) for name in names):
            return [INVALID_PARAMS] * len(names)
        groups = [""] * len(names) if config.group_ids is None else list(config.group_ids)
        if len(groups) != len(names):
            return [INVALID_PARAMS] * len(names)
        codes = [OK] * len(names)
        for group in dict.fromkeys(groups):
            rows = [row for row, one in enumerate(groups) if one == group]
            results = self.pool.put(
                [names[row] for row in rows],
                [sources[row] for row in rows],
                replicas=min(config.replica_num, COPIES_MAX),
                preferred=[node_of(segment) for segment in segments_of(config)],
                soft_pin_s=self._soft_pin_s(config),
                hard_pin=config.with_hard_pin,
                tenant=self.tenant,
                group=group,
                listed=True,
                replace=replace,
                deadline_s=MOVE_S,
            )
            for row, result in zip(rows, results, strict=True):
                size_bytes = sum(part.nbytes for part in sources[row])
                code = self._put_code(names[row], result, replace=replace)
                codes[row] = code if size_bytes else INVALID_PARAMS
        return codes

    def _soft_pin_s(self, config: ReplicateConfig) -> float:
        if config.soft_pin_action is not SoftPinAction.ENABLE:
            return 0.0
        if config.soft_pin_ttl_ms is None:
            return self.started.background.master_settings.soft_pin_ttl_s
        return config.soft_pin_ttl_ms / 1000

    def _put_code(self, name: str, result: Result, *, replace: bool) -> int:
        if result.ok:
            return OK
        if WRITING in result.reason and not replace:
            return OK  # as upstream answers: the name is taken, whoever finishes it
        log.warning("mooncake.store: not put", key=name, reason=result.reason)
        if QUOTA_USED_UP in result.reason:
            return TENANT_QUOTA_EXCEEDED
        if NOT_REGISTERED in result.reason:
            return TENANT_NOT_REGISTERED
        if result.outcome is Outcome.FULL:
            return NO_AVAILABLE_HANDLE
        if not self.pool.nodes:
            return NO_AVAILABLE_HANDLE if self.started.background.has_master() else RPC_FAIL
        return RPC_FAIL

    def upsert(
        self, names: Sequence[str], sources: Sequence[Parts], config: ReplicateConfig | None
    ) -> list[int]:
        """Store objects in the place of those that are there; readers of these finish undisturbed."""
        self.reads.forget(names)
        return self.put(names, sources, config, replace=True)

    # ------------------------------------------------------------ reading

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the objects, None for what nobody has.

        Raises:
            PeerGone: one may be there and cannot be read: that is no miss.
        """
        values = self.pool.get(names, tenant=self.tenant, deadline_s=MOVE_S)
        for _ in range(COPIES_TRIED):
            rows = [row for row, value in enumerate(values) if value is None]
            if not rows:
                break
            looked = self._look([names[row] for row in rows])
            there = [row for row, result in zip(rows, looked, strict=True) if result.ok]
            for row, result in zip(rows, looked, strict=True):
                if result.outcome is Outcome.FAILED:
                    raise PeerGone(f"{names[row]}: {result.reason}")
            if not there:
                break
            again = self.pool.get([names[row] for row in there], tenant=self.tenant, deadline_s=MOVE_S)
            for row, value in zip(there, again, strict=True):
                values[row] = value
        else:
            late = [name for name, value in zip(names, values, strict=True) if value is None]
            if late:
                raise PeerGone(f"{late[0]}: it is there and could not be read")
        self.reads.note([name for name, value in zip(names, values, strict=True) if value is not None])
        return values

    def get_straight(
        self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int] | None:
        """Read objects of known sizes into one registered buffer, quicker; None: `get_into` has to do it."""
        pieces = self._pieces(names, addresses, sizes)
        if pieces is None or not self.pool.get_straight(names, pieces, tenant=self.tenant, deadline_s=MOVE_S):
            return None
        self.reads.note(names)
        return list(sizes)

    def put_straight(
        self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int] | None:
        """Store new objects of one size out of one registered buffer, quicker; None: `put` has to do it."""
        pieces = self._pieces(names, addresses, sizes) if not self.tenant and all(names) else None
        if pieces is None or max(map(len, names)) > NAME_BYTES_MAX // 4:
            return None
        done = self.pool.put_straight(names, pieces, listed=True, deadline_s=MOVE_S)
        return [OK] * len(names) if done else None

    def _pieces(self, names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> Pieces | None:
        """Return the pieces of one registered buffer, if that is what it is."""
        if not 0 < len(names) == len(addresses) == len(sizes):
            return None
        if {type(one) for one in (*addresses, *sizes)} != {int}:
            return None
        buffer = self.started.engine.buffer_at(lowest := min(addresses)) if min(addresses) >= 0 else None
        if buffer is None or buffer.view is None or min(sizes) <= 0:
            return None
        if max(map(int.__add__, addresses, sizes)) > buffer.end:
            return None
        memory = buffer.part(lowest, buffer.end - lowest)
        return Pieces(memory, [address - lowest for address in addresses], sizes)

    def get_into(self, names: Sequence[str], targets: Sequence[Parts]) -> list[int]:
        """Read objects into memory; return their sizes or codes."""
        lists = [list(parts) for parts in targets]
        results = self.pool.get_into(names, lists, tenant=self.tenant, deadline_s=MOVE_S)
        codes = [result.size_bytes if result.ok else OBJECT_NOT_FOUND for result in results]
        failed = [row for row, result in enumerate(results) if result.outcome is Outcome.FAILED]
        if failed:
            looked = self._look([names[row] for row in failed])
            for row, there in zip(failed, looked, strict=True):
                codes[row] = self._get_code(there, sum(part.nbytes for part in lists[row]))
                if codes[row] != OBJECT_NOT_FOUND:
                    log.warning("mooncake.store: not read", key=names[row], reason=results[row].reason)
        self.reads.note([name for name, code in zip(names, codes, strict=True) if code > 0])
        return codes

    @staticmethod
    def _get_code(there: Result, room_bytes: int) -> int:
        if there.outcome is Outcome.MISSING:
            return OBJECT_NOT_FOUND
        if not there.ok:
            return RPC_FAIL
        return INVALID_PARAMS if there.size_bytes > room_bytes else TRANSFER_FAIL

    # ------------------------------------------------------------ looking

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Return the size of each object, or a code."""
        here = self.pool.sizes_here(names, tenant=self.tenant, deadline_s=LOOK_S)
        if here is not None:
            codes = [size or OBJECT_NOT_FOUND for size in here]
        else:
            codes = [_size_code(result) for result in self._look(names)]
        self.reads.note([name for name, code in zip(names, codes, strict=True) if code > 0])
        return codes

    def _look(self, names: Sequence[str]) -> list[Result]:
        """Return who is there; where nobody is but the master, nothing is there."""
        if not self.pool.nodes and self.started.background.has_master():
            return [Result(Outcome.MISSING)] * len(names)
        return self.pool.look(names, tenant=self.tenant, deadline_s=LOOK_S)

    def places(self, names: Sequence[str]) -> list[list[Place]]:
        """Return where the copies are; raises PeerError."""
        places = self.pool.places(names, tenant=self.tenant, deadline_s=LOOK_S)
        self.reads.note([name for name, found in zip(names, places, strict=True) if found])
        return places

    # ------------------------------------------------------------ removing

    def remove(self, names: Sequence[str], force: bool) -> list[int]:
        """Remove objects; those that were just read stay, unless forced."""
        held = {} if force else {name: None for name in names if self.reads.holds(name)}
        kept = [row for row, name in enumerate(names) if name in held]
        free = [row for row, name in enumerate(names) if name not in held]
        codes = [OBJECT_HAS_LEASE] * len(names)
        for row, result in zip(kept, self._look([names[row] for row in kept]), strict=True):
            if result.outcome is Outcome.MISSING:
                codes[row] = OBJECT_NOT_FOUND
        some = [names[row] for row in free]
        for row, result in zip(free, self._remove(some, 0.0 if force else self.reads.ttl_s), strict=True):
            codes[row] = OK if result.ok else _REMOVE_CODES.get(result.outcome, RPC_FAIL)
        self.reads.forget(some)
        return codes

    def clear(self, names: Sequence[str], segment: str) -> list[str]:
        """Remove copies of what was not just read, on one segment or all; return those that had some."""
        free = [name for name in names if not self.reads.holds(name)]
        nodes = [node_of(segment)] if segment else []
        results = self.pool.remove(
            free, tenant=self.tenant, nodes=nodes, unless_read_s=self.reads.ttl_s, deadline_s=LOOK_S
        )
        return [name for name, result in zip(free, results, strict=True) if result.ok]

    def _remove(self, names: Sequence[str], unless_read_s: float) -> list[Result]:
        results = self.pool.remove(names, tenant=self.tenant, unless_read_s=unless_read_s, deadline_s=LOOK_S)
        if not self.pool.nodes and not self.started.background.has_master():
            return [Result(Outcome.FAILED, reason="no master and no store")] * len(names)
        return results

    def remove_matching(self, pattern: str | None, force: bool) -> int:
        """Remove what has a name in which `pattern` occurs, None = all; return how many.

        Raises:
            RequestError: no regular expression; PeerError: a store could not be asked.
        """
        try:
            matcher = re.compile(pattern) if pattern is not None else None
        except re.error as error:
            raise RequestError(f"regular expression {pattern!r}: {error}") from error
        if not self.pool.nodes and not self.started.background.has_master():
            raise PeerGone("no master and no store")
        names = self.pool.names(tenant=self.tenant, deadline_s=LIST_S)
        chosen = [name for name in names if matcher is None or matcher.search(name)]
        codes = self.remove(chosen, force)
        if any(code == RPC_FAIL for code in codes):
            raise PeerGone("a store that may have some of it did not answer")
        return sum(code == OK for code in codes)

    # ------------------------------------------------------------ addresses

    def memory(self, address: int, size: int) -> memoryview:
        """Return the bytes at `address` of this process, registered or not.

        Raises:
            RequestError: they are not mapped, or no numbers.
        """
        if not isinstance(address, int) or not isinstance(size, int):
            raise TypeError(f"an address and a size, not {address!r}, {size!r}")
        if address < 0 or size < 0:
            raise RequestError(f"{size} bytes at {address}: must not be negative")
        buffer = self.started.engine.buffer_at(address)
        if buffer is not None and buffer.view is not None and address + size <= buffer.end:
            return buffer.part(address, size)
        if not size:
            return memoryview(bytearray())
        check_mapped(address, size)
        array: Any = (ctypes.c_ubyte * size).from_address(address)
        return memoryview(array).cast("B")


def _size_code(result: Result) -> int:
    if result.ok:
        return result.size_bytes
    return OBJECT_NOT_FOUND if result.outcome is Outcome.MISSING else RPC_FAIL


def _is_bad(name: str) -> bool:
    return not name or (len(name) > NAME_BYTES_MAX // 4 and len(name.encode()) > NAME_BYTES_MAX)


def texts(keys: Sequence[str]) -> Sequence[str]:
    """Return `keys` if they are texts; raises TypeError as upstream's binding."""
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}")
    return keys
