"""A store of another host, as the pool's client uses it.

Requests travel over the engine's control connection; bytes go between the store's segment and registered
memory here, or through the stage where the caller's is not registered. Small objects come with the answer.
"""

from collections.abc import Sequence
from typing import Any

import structlog

from kvstore.client.access import Access, by_size, left_s, reserve_request
from kvstore.client.model import Hints, Look, Outcome, Result, Sink, fill
from kvstore.client.stage import Range, Stage, batches
from kvstore.engine.remote import scattered_checksum
from kvstore.engine.remote_call import RemoteCall
from kvstore.limits import LEASE_S_MAX
from kvstore.node.finding import ELSEWHERE, INLINE
from mooncake.core.errors import MooncakeError, ProtocolError
from mooncake.core.messages import Abandon, Find, Findings, Release, ReportBad, Reserve, Reserved, StoreRecord
from transfer.engine import TransferEngine
from transfer.model import Buffer, Opcode

log = structlog.get_logger(__name__)

INLINE_BYTES = 16 << 10
"""Objects up to here come with the answer: a message more costs what moving them does."""


class DistantStore(Access):
    """One store of another host. Thread-safe as its engine is; holds nothing open of its own."""

    near = False

    def __init__(self, engine: TransferEngine, stage: Stage, record: StoreRecord, writer: str) -> None:
        """`record` has a transfer address."""
        super().__init__(record, writer)
        self._engine = engine
        self._stage = stage
        self._call = RemoteCall(engine, record)

    def close(self) -> None:
        """Hang up; the next call would connect anew."""
        self._engine.forget(self.record.transfer)

    def _ask(self, request: Any, kind: type[Any], wait_s: float) -> Any:
        return self._call.ask(request, kind, wait_s)

    # ------------------------------------------------------------ reading

    def find(self, keys: Sequence[bytes], end_s: float, lease_s: float = 0.0) -> Look:
        """See Access."""
        request = Find(b"".join(keys), min(lease_s, LEASE_S_MAX), INLINE_BYTES)
        look = Look.of(keys, self._ask(request, Findings, left_s(end_s)))
        self._call.check_epoch([look.lease_id] if look.lease_id else [])
        return look

    def release(self, look: Look) -> None:
        """See Access."""
        if look.lease_id:
            self._call.tell(Release(look.lease_id))

    def read(
        self, look: Look, rows: Sequence[int], into: Sequence[int], sink: Sink, verify: bool, end_s: float
    ) -> dict[int, str]:
        """See Access."""
        targets = dict(zip(rows, into, strict=True))
        reasons = self._refused(look, targets, sink)
        self._take_inline(look, targets, sink, verify, reasons)
        here: dict[int, list[Range]] = {}
        staged: list[int] = []
        for row, target in targets.items():
            if row in reasons:
                continue
            if ranges := self._stage.direct(sink.places(target, look.sizes[row])):
                here[row] = ranges
            else:
                staged.append(row)
        if here:
            offsets = [look.offsets[row] for row in here]
            self._call.move(Opcode.READ, offsets, list(here.values()), end_s)
            for row in here:
                parts = sink.places(targets[row], look.sizes[row])
                reasons[row] = self._verdict(look, row, parts) if verify else ""
        for batch in batches(staged, look.sizes):
            with self._stage.room(sum(look.sizes[row] for row in batch), end_s) as buffer:
                ranges_of = _spread(buffer, [look.sizes[row] for row in batch])
                offsets = [look.offsets[row] for row in batch]
                self._call.move(Opcode.READ, offsets, [[one] for one in ranges_of], end_s)
                for row, (address, size) in zip(batch, ranges_of, strict=True):
                    copied = sink.take(targets[row], buffer.part(address, size))
                    reasons[row] = self._verdict(look, row, copied) if verify and copied else ""
        return reasons

    def _refused(self, look: Look, targets: dict[int, int], sink: Sink) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for row, target in targets.items():
            size, offset = look.sizes[row], look.offsets[row]
            if reason := sink.refuses(target, size):
                reasons[row] = reason
            elif offset == ELSEWHERE:
                reasons[row] = "still on its way from the SSD"
            elif offset >= 0 and offset + size > self.record.capacity_bytes:
                raise ProtocolError(f"store {self.node}: {offset}+{size} is not in its segment")
        return reasons

    def _take_inline(
        self, look: Look, targets: dict[int, int], sink: Sink, verify: bool, reasons: dict[int, str]
    ) -> None:
        at = 0
        for row, offset in enumerate(look.offsets) if look.data else ():
            if offset != INLINE:
                continue
            size = look.sizes[row]
            if row in targets and row not in reasons:
                copied = sink.take(targets[row], look.data[at : at + size])
                reasons[row] = self._verdict(look, row, copied) if verify and copied else ""
            at += size

    def _verdict(self, look: Look, row: int, parts: Sequence[memoryview | bytes]) -> str:
        if look.is_sound(row, parts):
            return ""
        log.warning("pool.bad_block", node=self.node, key=look.keys[row].hex()[:16])
        self._call.tell(ReportBad([look.keys[row]]))
        return f"{self.node}: the bytes are not what was committed"

    # ------------------------------------------------------------ writing

    def put(
        self, keys: Sequence[bytes], sources: Sequence[Sequence[memoryview]], hints: Hints, end_s: float
    ) -> list[Result]:
        """See Access."""
        sizes = [sum(part.nbytes for part in source) for source in sources]
        results: list[Result] = [Result(Outcome.FAILED)] * len(keys)
        for size, rows in by_size(sizes).items():
            request = reserve_request(self._writer, [keys[row] for row in rows], size, hints)
            done = self._put_equal(request, [sources[row] for row in rows], hints, end_s)
            for row, result in zip(rows, done, strict=True):
                results[row] = result
        return results

    def _put_equal(
        self, request: Reserve, sources: Sequence[Sequence[memoryview]], hints: Hints, end_s: float
    ) -> list[Result]:
        keys, size = request.keys, request.size_bytes
        room: Reserved = self._ask(request, Reserved, left_s(end_s))
        if not len(room.offsets) == len(room.tickets) == len(keys):
            raise ProtocolError(f"store {self.node}: {len(room.offsets)} slots for {len(keys)} keys")
        mine = [row for row, ticket in enumerate(room.tickets) if ticket]
        tickets = [room.tickets[row] for row in mine]
        try:
            self._call.check_epoch(tickets)
            if any(room.offsets[row] + size > self.record.capacity_bytes for row in mine):
                raise ProtocolError(f"store {self.node}: a slot is not in its segment")
            self._write(mine, sources, room.offsets, size, end_s)
            sums = [scattered_checksum(keys[row], sources[row]) for row in mine]
            names = hints.names_of([keys[row] for row in mine])
            done = self._commit(tickets, sums, names, end_s)
        except MooncakeError:
            if tickets:  # an empty list would mean everything of this writer
                self._call.tell(Abandon(self._writer, tickets))
            raise
        committed = dict(zip(mine, done, strict=True))
        return [self._result(offset, committed.get(row), size) for row, offset in enumerate(room.offsets)]

    def _write(
        self,
        rows: Sequence[int],
        sources: Sequence[Sequence[memoryview]],
        offsets: Sequence[int],
        size: int,
        end_s: float,
    ) -> None:
        here: dict[int, list[Range]] = {}
        staged: list[int] = []
        for row in rows:
            if ranges := self._stage.direct(sources[row]):
                here[row] = ranges
            else:
                staged.append(row)
        if here:
            self._call.move(Opcode.WRITE, [offsets[row] for row in here], list(here.values()), end_s)
        for batch in batches(staged, [size] * len(sources)):
            with self._stage.room(size * len(batch), end_s) as buffer:
                places = _spread(buffer, [size] * len(batch))
                for row, (address, _) in zip(batch, places, strict=True):
                    fill(buffer.part(address, size), sources[row])
                self._call.move(
                    Opcode.WRITE, [offsets[row] for row in batch], [[one] for one in places], end_s
                )


def _spread(buffer: Buffer, sizes: Sequence[int]) -> list[Range]:
    """Return where objects of these sizes go in `buffer`, one behind the other."""
    ranges, address = [], buffer.address
    for size in sizes:
        ranges.append((address, size))
        address += size
    return ranges
