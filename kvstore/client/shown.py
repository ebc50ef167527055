"""What a store of this host shows in shared memory: read, and put by room granted before, without a message.

Only what verifies counts, and only what the table can be believed about: the rest is asked for.
"""

import time
from collections.abc import Sequence

from kvstore.client.access import left_s
from kvstore.client.desk import Desk
from kvstore.client.lanes import Lanes
from kvstore.client.lookup import Lookup
from kvstore.client.model import Hints, Outcome, Result, Sink, checksum_of, copy
from kvstore.engine.client import PoolClient
from kvstore.engine.link import StoreLink
from kvstore.table import Row, TableReader
from mooncake.core.keys import block_checksum
from mooncake.core.messages import StoreRecord


class Shown:
    """Of one start of a store. Thread-safe."""

    def __init__(self, link: StoreLink, lookup: Lookup, desk: Desk, lanes: Lanes) -> None:
        """Use `open`."""
        self.link = link
        self.desk = desk
        self.memory = lookup.memory
        """The store's segment."""
        self._lookup = lookup
        self._lanes = lanes
        self._nodes = (link.record.node,)
        link.when_idle(desk.give_back)

    @classmethod
    def open(cls, client: PoolClient, record: StoreRecord, writer: str, lanes: Lanes) -> "Shown | None":
        """Map what `record`'s store shows; None: nothing, or `client` is attached to another start of it."""
        link = client.link
        if link is None or link.record.epoch != record.epoch:
            return None
        lookup = Lookup.open(link.record, link.segment)
        return cls(link, lookup, Desk(client, link, writer, lookup.rings), lanes) if lookup else None

    @property
    def table(self) -> TableReader | None:
        """The store's table, if it can be believed now."""
        return self._lookup.rows

    def close(self) -> None:
        """Let go (idempotent); the store is still there."""
        self.desk.give_back()
        self._lookup.close()

    # ------------------------------------------------------------ reading

    def sizes(self, keys: Sequence[bytes]) -> list[int] | None:
        """Return the size of each of `keys`, 0 for what is not there; None: the store has to be asked."""
        if (table := self.table) is None:
            return None
        whole, found = table.is_whole, table.sizes(keys)
        return found if whole or 0 not in found else None

    def get(self, key: bytes, target: memoryview) -> Result | None:
        """Read one object; None: the store has to be asked."""
        if (table := self.table) is None:
            return None
        whole, place = table.is_whole, table.find(key)
        if place is None:
            if not whole:
                return None
            self.link.used((b"",))
            return Result(Outcome.MISSING)
        checksum, offset, size = place
        source = self.memory[offset : offset + size]
        if size != target.nbytes or source.nbytes != size:
            return None
        copy(target, source)
        if block_checksum(key, target) != checksum:
            return None
        self.link.used((key,))
        return Result(Outcome.DONE, size, self._nodes)

    def read(
        self,
        keys: Sequence[bytes],
        rows: list[int],
        sink: Sink,
        results: list[Result | None],
        end_s: float,
    ) -> list[int]:
        """Read several.

        Args:
            keys: of the whole call.
            rows: of `keys`, `sink` and `results`, that are wanted.
            sink: where they go.
            results: DONE is entered for those that were read.
            end_s: rows that are not begun by then are not.

        Returns:
            Rows that the store has to be asked for.
        """
        if (table := self.table) is None:
            return rows
        whole = table.is_whole
        places = table.find_all(keys if len(rows) == len(keys) else [keys[row] for row in rows])
        found = [(row, place) for row, place in zip(rows, places, strict=True) if place is not None]
        ask: list[int] = []
        if len(found) < len(rows):
            if whole:
                self.link.used([b""] * (len(rows) - len(found)))
            else:
                ask = [row for row, place in zip(rows, places, strict=True) if place is None]
        total = sum(place[2] for _, place in found) if len(found) > 1 else 0
        for failed in self._lanes.run(
            lambda some: self._take(keys, some, sink, results, end_s), found, total
        ):
            ask += failed
        if read := [keys[row] for row, _ in found if results[row] is not None]:
            self.link.used(read)
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
        memory, nodes, take = self.memory, self._nodes, sink.take
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

    # ------------------------------------------------------------ writing

    def put(
        self,
        keys: Sequence[bytes],
        sources: Sequence[Sequence[memoryview]],
        sizes: Sequence[int],
        hints: Hints,
        end_s: float,
    ) -> list[Result] | None:
        """Put objects of one size that are new; None: the store has to be asked.

        Raises:
            PeerError: the store is away; nothing was put.
        """
        table, desk = self.table, self.desk
        if table is None or not hints.are_plain or not keys:
            return None
        size = sizes[0]
        fits = 0 < size <= self.link.segment.size_bytes and sizes.count(size) == len(sizes)
        if not fits or any(table.sizes(keys)):
            return None
        slots = desk.take(size, len(keys), left_s(end_s))
        if slots is None:
            return None
        filled = False
        try:
            offsets = [slot.offset for slot in slots]
            sums = self._lanes.write(self.link, keys, sources, sizes, offsets, range(len(keys)), end_s)
            filled = desk.fill(slots, keys, sums, hints.names_of(keys), left_s(end_s))
        finally:
            if not filled:
                desk.put_back(size, slots)
        return [Result(Outcome.DONE, size, self._nodes)] * len(keys) if filled else None
