"""A store of this host, as the pool's client uses it: its memory is mapped here, bytes are copied once.

Every batch is one message there and one back; what was leased is given back without waiting.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import structlog

from kvstore.client.access import Access, by_size, left_s, reserve_request
from kvstore.client.lanes import Lanes
from kvstore.client.model import Hints, Look, Outcome, Result, Sink, copy
from kvstore.client.shown import Shown
from kvstore.engine.client import PoolClient
from kvstore.engine.link import StoreLink
from kvstore.limits import LEASE_S_MAX
from kvstore.node.finding import INLINE
from mooncake.core.errors import MooncakeError, PeerTimeout, ProtocolError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Abandon, Find, Findings, Release, ReportBad, Reserved, StoreRecord

log = structlog.get_logger(__name__)

INLINE_BYTES = 16 << 10
"""Objects up to here come with the answer when few are asked for: one message less than a lease."""
INLINE_KEYS_MAX = 4
SLACK_S = 1.0
"""A lease lasts a little longer than the call that reads under it."""


class LocalStore(Access):
    """One attached store. Thread-safe."""

    near = True

    def __init__(self, client: PoolClient, record: StoreRecord, writer: str) -> None:
        """`client` is attached to the store of `record`; it is this object's from now on, also to close."""
        super().__init__(record, writer)
        self._client = client
        self.lanes = Lanes()
        self.shown = Shown.open(client, record, writer, self.lanes)
        """What it shows in shared memory, which is tried first; None: it is asked for everything."""

    def close(self) -> None:
        """Let go of the store; views that are in use stay valid."""
        if self.shown:
            self.shown.close()
        self._client.close()
        self.lanes.close()

    def _ask(self, request: Any, kind: type[Any], wait_s: float) -> Any:
        return self._client.call(request, kind, wait_s)[1]

    # ------------------------------------------------------------ reading

    def find(self, keys: Sequence[bytes], end_s: float, lease_s: float = 0.0) -> Look:
        """See Access."""
        inline = INLINE_BYTES if len(keys) <= INLINE_KEYS_MAX else 0
        request = Find(b"".join(keys), min(lease_s, LEASE_S_MAX), inline)
        link, found = self._client.call(request, Findings, left_s(end_s))
        look = Look.of(keys, found, link)
        if look.lease_id and not link.is_mine(look.lease_id):
            raise ProtocolError(f"store {self.node}: a lease of another start")
        return look

    def sizes(self, keys: Sequence[bytes], end_s: float) -> list[int]:
        """Return the size of each of `keys`, 0 for what is not there, by the shortest way; raises as find."""
        if self.shown and (shown := self.shown.sizes(keys)) is not None:
            return shown
        sizes = self._ask(Find(b"".join(keys)), Findings, left_s(end_s)).sizes
        return [int(size) for size in np.frombuffer(sizes, "<i8")]

    def get_one(self, key: bytes, target: memoryview, verify: bool, end_s: float) -> Result | None:
        """Read one object into `target`, by the shortest way; None: it takes the whole procedure.

        What follows the answer is all that a small object costs besides the message.

        Raises:
            PeerError, CapacityError: as find.
        """
        if verify and self.shown and (shown := self.shown.get(key, target)) is not None:
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
        return Result(Outcome.DONE, size, (self.node,))

    def release(self, look: Look) -> None:
        """See Access."""
        if look.lease_id:
            assert isinstance(look.where, StoreLink)
            self._client.tell(look.where, Release(look.lease_id))

    def read(
        self, look: Look, rows: Sequence[int], into: Sequence[int], sink: Sink, verify: bool, end_s: float
    ) -> dict[int, str]:
        """See Access."""
        pairs = list(zip(rows, into, strict=True))
        total = sum(look.sizes[row] for row in rows) if len(rows) > 1 else 0
        reasons: dict[int, str] = {}
        for said in self.lanes.run(lambda some: self._read(look, some, sink, verify, end_s), pairs, total):
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
        """See Access."""
        sizes = [sum(part.nbytes for part in source) for source in sources]
        if self.shown and (shown := self.shown.put(keys, sources, sizes, hints, end_s)) is not None:
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
            sums = self.lanes.write(link, keys, sources, sizes, offsets, mine, end_s)
            names = hints.names_of([keys[row] for row in mine])
            done = self._commit([tickets[row] for row in mine], sums, names, end_s)
        except MooncakeError:
            if link is not None and any(tickets):
                self._client.tell(link, Abandon(self._writer, [ticket for ticket in tickets if ticket]))
            raise
        committed = dict(zip(mine, done, strict=True))
        return [
            self._result(offset, committed.get(row), size)
            for row, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        ]


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
