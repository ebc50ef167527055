"""A store of this host, as the pool's client uses it: its memory is mapped here, bytes are copied once.

Every batch is one message there and one back; what was leased is given back without waiting.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import structlog

from kvstore.client.desk import Desk
from kvstore.client.lookup import Lookup
from kvstore.client.model import Hints, Look, Outcome, Result, Sink, checksum_of, copy
from kvstore.engine.client import PoolClient
from kvstore.engine.link import StoreLink
from kvstore.limits import KEYS_PER_REQUEST_MAX, LEASE_S_MAX
from kvstore.node.finding import INLINE
from kvstore.node.node import FULL, OVER_QUOTA, QUOTA_USED_UP
from kvstore.table import Row, TableReader
from mooncake.core.errors import MooncakeError, PeerTimeout, ProtocolError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import (
    Abandon,
    Commit,
    Committed,
    DropKeys,
    Find,
    Findings,
    KeysDropped,
    ListNames,
    NamesPage,
    Release,
    ReportBad,
    Reserve,
    Reserved,
    Stats,
    StoreRecord,
    StoreStats,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

ASK_S = 2.0
"""For one request: a turn of the store's loop is a millisecond, so this is a store in trouble."""
INLINE_BYTES = 16 << 10
"""Objects up to here come with the answer when few are asked for: one message less than a lease."""
INLINE_KEYS_MAX = 4
SLACK_S = 1.0
"""A lease lasts a little longer than the call that reads under it."""
LANE_BYTES = 2 << 20
"""Work for one more thread: less is done sooner than handed over."""
LANES_MAX = 4


class LocalStore:
    """One attached store. Thread-safe."""

    near = True

    def __init__(self, client: PoolClient, record: StoreRecord, writer: str) -> None:
        """`client` is attached to the store of `record`; it is this object's from now on, also to close."""
        self.node = record.node
        self.nodes = (record.node,)
        self.record = record
        self._client = client
        self._writer = writer
        self._lanes = min(LANES_MAX, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._lanes, thread_name_prefix="pool-copy")
        link = client.link
        known = link is not None and link.record.epoch == record.epoch
        self._link = link if known else None
        self._lookup = Lookup.open(link.record, link.segment) if link is not None and known else None
        self.desk = Desk(client, link, writer, self._lookup.rings) if link and self._lookup else None
        if link and self.desk:
            link.when_idle(self.desk.give_back)

    def close(self) -> None:
        """Let go of the store; views that are in use stay valid."""
        if self.desk:
            self.desk.give_back()
        if self._lookup:
            self._lookup.close()
        self._client.close()
        self._threads.shutdown(wait=False)

    def stats(self, deadline_s: float) -> StoreStats:
        """Return the store's counters; raises PeerError."""
        stats: StoreStats = self._client.call(Stats(), StoreStats, deadline_s)[1]
        return stats

    # ------------------------------------------------------------ reading

    def find(self, keys: Sequence[bytes], end_s: float, lease_s: float = 0.0) -> Look:
        """Look for `keys`; with `lease_s`, lease what is there: to be given to `release`.

        Raises:
            PeerError, CapacityError: the store is away, or has no lease left.
        """
        inline = INLINE_BYTES if len(keys) <= INLINE_KEYS_MAX else 0
        request = Find(b"".join(keys), min(lease_s, LEASE_S_MAX), inline)
        link, found = self._client.call(request, Findings, left_s(end_s))
        look = Look.of(keys, found, link)
        if look.lease_id and not link.is_mine(look.lease_id):
            raise ProtocolError(f"store {self.node}: a lease of another start")
        return look

    def sizes(self, keys: Sequence[bytes], end_s: float) -> list[int]:
        """Return the size of each of `keys`, 0 for what is not there, by the shortest way; raises as find."""
        if (rows := self._rows()) is not None:
            whole, found = rows.is_whole, rows.sizes(keys)
            if whole or 0 not in found:
                return found
        sizes = self._client.call(Find(b"".join(keys)), Findings, left_s(end_s))[1].sizes
        return [int(size) for size in np.frombuffer(sizes, "<i8")]

    def _rows(self) -> TableReader | None:
        """Return the store's table if it can be believed now."""
        return self._lookup.rows if self._lookup is not None else None

    def shown(self) -> tuple[TableReader, StoreLink, memoryview] | None:
        """Return the store's table, its link and its memory, if the table can be believed now."""
        if (table := self._rows()) is None or self._lookup is None or self._link is None:
            return None
        return table, self._link, self._lookup.memory

    def read_shown(
        self,
        keys: Sequence[bytes],
        rows: list[int],
        sink: Sink,
        results: list[Result | None],
        end_s: float,
    ) -> list[int]:
        """Read what the table shows, without a call or a lease: only what verifies counts.

        Args:
            keys: of the whole call.
            rows: of `keys`, `sink` and `results`, that are wanted.
            sink: where they go.
            results: DONE is entered for those that were read.
            end_s: rows that are not begun by then are not.

        Returns:
            Rows that the store has to be asked for.
        """
        table, link = self._rows(), self._link
        if table is None or link is None:
            return rows
        whole = table.is_whole
        places = table.find_all(keys if len(rows) == len(keys) else [keys[row] for row in rows])
        found = [(row, place) for row, place in zip(rows, places, strict=True) if place is not None]
        ask: list[int] = []
        if len(found) == len(rows):
            pass
        elif whole:
            link.used([b""] * (len(rows) - len(found)))
        else:
            ask = [row for row, place in zip(rows, places, strict=True) if place is None]
        total = sum(place[2] for _, place in found) if len(found) > 1 else 0
        for failed in self.in_lanes(lambda some: self._take(keys, some, sink, results, end_s), found, total):
            ask += failed
        if read := [keys[row] for row, _ in found if results[row] is not None]:
            link.used(read)
        return ask

    def _take(
        self,
        keys: Sequence[bytes],
        places: Sequence[tuple[int, Row]],
        sink: Sink,
        results: list[Result | None],
        end_s: float,
    ) -> list[int]:
        """Copy and verify; return the rows that did not."""
        assert self._lookup is not None
        memory, nodes, take = self._lookup.memory, self.nodes, sink.take
        failed = []
        for row, (checksum, offset, size) in places:
            source = memory[offset : offset + size]
            if source.nbytes == size and time.monotonic() < end_s:
                copied = take(row, source)
                if copied is not None and checksum_of(keys[row], copied) == checksum:
                    results[row] = Result(Outcome.DONE, size, nodes)
                    continue
            failed.append(row)
        return failed

    def get_one(self, key: bytes, target: memoryview, verify: bool, end_s: float) -> Result | None:
        """Read one object into `target`, by the shortest way; None: it takes the whole procedure.

        What follows the answer is all that a small object costs besides the message.

        Raises:
            PeerError, CapacityError: as find.
        """
        if verify and (shown := self._get_shown(key, target)) is not None:
            return shown
        request = Find(key, min(max(0.0, end_s - time.monotonic()) + SLACK_S, LEASE_S_MAX), INLINE_BYTES)
        link, found = self._client.call(request, Findings, left_s(end_s))
        size, data = int.from_bytes(found.sizes, "little"), found.data
        if not size:
            return Result(Outcome.MISSING)
        if data:
            if len(data) != target.nbytes:
                return None
            target[:] = data
        elif not found.lease_id:
            return None
        else:
            offset = int.from_bytes(found.offsets, "little", signed=True)
            try:
                if size != target.nbytes or offset < 0 or not link.is_mine(found.lease_id):
                    return None
                copy(target, link.segment.view(offset, size))
            finally:
                self._client.tell(link, Release(found.lease_id))
        if verify and block_checksum(key, target) != found.checksums:
            return None
        return Result(Outcome.DONE, size, self.nodes)

    def _get_shown(self, key: bytes, target: memoryview) -> Result | None:
        """Read one object by the table alone; None: it takes more."""
        table, link, lookup = self._rows(), self._link, self._lookup
        if table is None or link is None or lookup is None:
            return None
        whole, place = table.is_whole, table.find(key)
        if place is None:
            if not whole:
                return None
            link.used((b"",))
            return Result(Outcome.MISSING)
        checksum, offset, size = place
        source = lookup.memory[offset : offset + size]
        if size != target.nbytes or source.nbytes != size:
            return None
        copy(target, source)
        if block_checksum(key, target) != checksum:
            return None
        link.used((key,))
        return Result(Outcome.DONE, size, self.nodes)

    def release(self, look: Look) -> None:
        """Give a lease back, without waiting."""
        if look.lease_id:
            assert isinstance(look.where, StoreLink)
            self._client.tell(look.where, Release(look.lease_id))

    def read(
        self, look: Look, rows: Sequence[int], into: Sequence[int], sink: Sink, verify: bool, end_s: float
    ) -> dict[int, str]:
        """Copy leased rows out; return why for each that was not, "" for those that were.

        Args:
            look: of `find` with a lease.
            rows: of `look`.
            into: rows of `sink`, one for each.
            sink: where they go.
            verify: compare checksums of the copies.
            end_s: rows that are not begun by then are not.
        """
        pairs = list(zip(rows, into, strict=True))
        total = sum(look.sizes[row] for row in rows) if len(rows) > 1 else 0
        reasons: dict[int, str] = {}
        for said in self.in_lanes(lambda some: self._read(look, some, sink, verify, end_s), pairs, total):
            reasons |= said
        return reasons

    def _read(
        self, look: Look, pairs: Sequence[tuple[int, int]], sink: Sink, verify: bool, end_s: float
    ) -> dict[int, str]:
        link = look.where
        assert isinstance(link, StoreLink)
        reasons: dict[int, str] = {}
        inline_at = _inline_places(look)
        memory = link.segment.view(0, link.segment.size_bytes)
        for row, into in pairs:
            size, offset = look.sizes[row], look.offsets[row]
            if time.monotonic() > end_s:
                reasons[row] = "the deadline passed"
                continue
            if offset >= 0:
                source = memory[offset : offset + size]
                if len(source) != size:
                    raise ProtocolError(f"store {self.node}: {offset}+{size} is not in its segment")
            elif offset == INLINE:
                at = inline_at[row]
                source = look.data[at : at + size]
            else:
                reasons[row] = "still on its way from the SSD"
                continue
            copied = sink.take(into, source)
            if copied is None:
                reasons[row] = sink.refuses(into, size)
            elif verify and not look.is_sound(row, copied):
                reasons[row] = f"{self.node}: the bytes are not what was committed"
                self.report_bad(look, row)
            else:
                reasons[row] = ""
        return reasons

    def report_bad(self, look: Look, row: int) -> None:
        """Have the store look for itself at a block that did not verify."""
        assert isinstance(look.where, StoreLink)
        log.warning("pool.bad_block", node=self.node, key=look.keys[row].hex()[:16])
        self._client.tell(look.where, ReportBad([look.keys[row]]))

    def views(self, look: Look) -> list[memoryview | None]:
        """Return the bytes of leased rows where they lie, read-only; None where there is nothing."""
        assert isinstance(look.where, StoreLink)
        view, inline_at = look.where.segment.view, _inline_places(look)
        found: list[memoryview | None] = []
        for row, (offset, size) in enumerate(zip(look.offsets, look.sizes, strict=True)):
            if offset == INLINE:
                found.append(look.data[inline_at[row] : inline_at[row] + size])
            else:
                found.append(view(offset, size).toreadonly() if offset >= 0 and size else None)
        return found

    # ------------------------------------------------------------ writing

    def put(
        self, keys: Sequence[bytes], sources: Sequence[Sequence[memoryview]], hints: Hints, end_s: float
    ) -> list[Result]:
        """Write objects of any sizes; one answer each.

        Raises:
            PeerError, CapacityError: the store is away; nothing of this call is visible then, unless the
                answer to the commit itself was lost.
        """
        sizes = [sum(part.nbytes for part in source) for source in sources]
        if (shown := self._put_shown(keys, sources, sizes, hints, end_s)) is not None:
            return shown
        tickets: list[int] = [0] * len(keys)
        offsets: list[int] = [0] * len(keys)
        link = None
        try:
            for size, rows in by_size(sizes).items():
                request = reserve_request(self._writer, [keys[row] for row in rows], size, hints)
                used, room = self._client.call(request, Reserved, left_s(end_s))
                link = link or used
                used.check_reserved(room, len(rows), size)
                for row, offset, ticket in zip(rows, room.offsets, room.tickets, strict=True):
                    offsets[row], tickets[row] = offset, ticket
                if used is not link:
                    raise PeerTimeout(f"store {self.node} was restarted meanwhile")
            if link is None:
                return []
            mine = [row for row, ticket in enumerate(tickets) if ticket]
            sums = self._write(link, keys, sources, sizes, offsets, mine, end_s)
            names = hints.names_of([keys[row] for row in mine])
            done = self._commit([tickets[row] for row in mine], sums, names, end_s)
        except MooncakeError:
            if link is not None and any(tickets):
                self._client.tell(link, Abandon(self._writer, [ticket for ticket in tickets if ticket]))
            raise
        committed = dict(zip(mine, done, strict=True))
        return [
            put_result(self.node, offset, committed.get(row), size)
            for row, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        ]

    def _put_shown(
        self,
        keys: Sequence[bytes],
        sources: Sequence[Sequence[memoryview]],
        sizes: Sequence[int],
        hints: Hints,
        end_s: float,
    ) -> list[Result] | None:
        """Put objects of one size that are new, by room that was granted before; None: it takes more."""
        desk, link, table = self.desk, self._link, self._rows()
        if desk is None or link is None or table is None or not hints.are_plain or not keys:
            return None
        size = sizes[0]
        fits = 0 < size <= link.segment.size_bytes and sizes.count(size) == len(sizes)
        if not fits or any(table.sizes(keys)):
            return None
        slots = desk.take(size, len(keys), left_s(end_s))
        if slots is None:
            return None
        filled = False
        try:
            offsets = [slot.offset for slot in slots]
            sums = self._write(link, keys, sources, sizes, offsets, range(len(keys)), end_s)
            filled = desk.fill(slots, keys, sums, hints.names_of(keys), left_s(end_s))
        finally:
            if not filled:
                desk.put_back(size, slots)
        return [Result(Outcome.DONE, size, self.nodes)] * len(keys) if filled else None

    def _write(
        self,
        link: StoreLink,
        keys: Sequence[bytes],
        sources: Sequence[Sequence[memoryview]],
        sizes: Sequence[int],
        offsets: Sequence[int],
        rows: Sequence[int],
        end_s: float,
    ) -> list[bytes]:
        def fill(some: Sequence[int]) -> list[bytes]:
            sums = []
            memory = link.segment.view(0, link.segment.size_bytes)
            for row in some:
                if time.monotonic() > end_s:
                    raise PeerTimeout(f"store {self.node}: the deadline passed while writing")
                target = memory[offsets[row] : offsets[row] + sizes[row]]
                if len(sources[row]) == 1:
                    copy(target, sources[row][0])
                else:
                    at = 0
                    for part in sources[row]:
                        copy(target[at : at + part.nbytes], part)
                        at += part.nbytes
                sums.append(block_checksum(keys[row], target))
            return sums

        parts = self.in_lanes(fill, rows, sum(sizes[row] for row in rows))
        return [one for part in parts for one in part]

    def in_lanes(self, work: Callable[[Sequence[T]], R], items: Sequence[T], total_bytes: int) -> list[R]:
        """Return what `work` answers to parts of `items`, in order; several at once where that pays.

        Nothing is under way any more when this returns or raises: memory may be given up then.
        """
        lanes = min(self._lanes, total_bytes // LANE_BYTES, len(items))
        if lanes < 2:
            return [work(items)]
        step = -(-len(items) // lanes)
        waits = [self._threads.submit(work, items[at : at + step]) for at in range(step, len(items), step)]
        try:
            first = work(items[:step])
        finally:
            wait(waits)
        return [first, *(one.result() for one in waits)]

    def _commit(self, tickets: list[int], sums: list[bytes], names: list[bytes], end_s: float) -> list[bool]:
        done: list[bool] = []
        for at in range(0, len(tickets), KEYS_PER_REQUEST_MAX):
            part = slice(at, at + KEYS_PER_REQUEST_MAX)
            request = Commit(tickets[part], sums[part], names[part])
            answer: Committed = self._client.call(request, Committed, left_s(end_s))[1]
            if len(answer.done) != len(tickets[part]):
                raise ProtocolError(f"store {self.node}: {len(answer.done)} results")
            done += answer.done
        return done

    def remove(self, request: DropKeys, end_s: float) -> KeysDropped:
        """Remove objects; raises PeerError."""
        answer: KeysDropped = self._client.call(request, KeysDropped, left_s(end_s))[1]
        return answer

    def names(self, cursor: int, end_s: float) -> NamesPage:
        """Return a page of what its objects are called; raises PeerError."""
        page: NamesPage = self._client.call(ListNames(cursor), NamesPage, left_s(end_s))[1]
        return page


def left_s(end_s: float) -> float:
    """Return how long one request may take.

    Raises:
        PeerTimeout: no time is left; the store itself is not to blame.
    """
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise PeerTimeout("the deadline passed")
    return min(ASK_S, left_s)


def _inline_places(look: Look) -> dict[int, int]:
    """Return where in `look.data` the rows begin that are there."""
    places: dict[int, int] = {}
    if look.data:
        at = 0
        for row, offset in enumerate(look.offsets):
            if offset == INLINE:
                places[row] = at
                at += look.sizes[row]
    return places


def by_size(sizes: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows of each size: a store reserves for one size at a time."""
    rows: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault(size, []).append(row)
    return rows


def reserve_request(writer: str, keys: list[bytes], size_bytes: int, hints: Hints) -> Reserve:
    """Return the request for room."""
    return Reserve(
        writer,
        keys,
        size_bytes,
        tenant=hints.tenant,
        group=hints.group,
        soft_pin_s=hints.soft_pin_s,
        hard_pin=hints.hard_pin,
        replace=hints.replace,
        keep=True,
    )


def put_result(node: str, offset: int, committed: bool | None, size_bytes: int) -> Result:
    """Return what a store's answers mean for one object; `committed` None = it gave no room."""
    if committed:
        return Result(Outcome.DONE, size_bytes, (node,))
    if committed is not None:
        return Result(Outcome.FAILED, reason=f"{node}: written too late")
    if offset == FULL:
        return Result(Outcome.FULL, reason=f"{node}: full")
    if offset == OVER_QUOTA:
        return Result(Outcome.FULL, reason=f"{node}: {QUOTA_USED_UP}")
    return Result(Outcome.EXISTS, nodes=(node,))
