"""Takes in what writers of the host put by rings: before any answer, and every few milliseconds meanwhile."""

import asyncio
import time
from collections.abc import Callable

import structlog

from kvstore.node.contract import CHECKSUM_BYTES
from kvstore.node.finding import split_keys
from kvstore.node.names import Names
from kvstore.node.node import Node
from kvstore.rings import Fill, Rings
from mooncake.core.errors import MooncakeError, ProtocolError, RequestError

log = structlog.get_logger(__name__)

EVERY_S = 0.005
"""How late an object that was put by a ring may come into the table and the events, while rings are used."""
WATCH_S = 1.0
"""So long after the last one; then a writer has to wake the store."""


class RingReader:
    """On the loop of its store."""

    def __init__(self, memory: memoryview, node: Node, names: Names, changed: Callable[[], None]) -> None:
        """Lend nothing yet.

        Args:
            memory: RINGS_BYTES of zeros, shared with the host.
            node: where objects come to.
            names: what they are called.
            changed: called when some were taken in.
        """
        self._rings = Rings(memory, _on_nonsense)
        self._node = node
        self._names = names
        self._changed = changed
        self._watch_until_s = 0.0
        self._watching: asyncio.TimerHandle | None = None
        self._closed = False

    def lend(self, writer: str) -> int:
        """Return the number of a ring for `writer`; -1: all are taken, or nothing is put any more."""
        return -1 if self._closed else self._rings.lend(writer, time.monotonic())

    def end(self, writer: str) -> None:
        """Take back the ring of a writer that has started anew."""
        self._rings.end(writer)

    def read(self) -> None:
        """Take in what is there."""
        if self._closed or self._rings.is_read:
            return
        for fill in self._rings.read(time.monotonic()):
            try:
                self._fill(fill)
            except MooncakeError as error:
                log.warning("store.not_filled", error=str(error))
        self._rings.done()
        self._changed()
        self._watch_until_s = time.monotonic() + WATCH_S
        if self._watching is None:
            self._rings.watch(on=True)
            self._watch_soon()

    def close(self) -> None:
        """Take in what is there, and nothing more (idempotent)."""
        self.read()
        self._closed = True
        if self._watching:
            self._watching.cancel()

    def _watch(self) -> None:
        """Look into the rings every few milliseconds, as long as they are used."""
        self.read()
        if time.monotonic() < self._watch_until_s:
            self._watch_soon()
        else:
            self._watching = None
            self._rings.watch(on=False)
            self.read()  # what was written before the writer could see that

    def _watch_soon(self) -> None:
        self._watching = asyncio.get_running_loop().call_later(EVERY_S, self._watch)

    def _fill(self, fill: Fill) -> None:
        rows = len(fill.tickets)
        keys = split_keys(fill.keys)
        if len(keys) != rows or len(fill.checksums) != CHECKSUM_BYTES * rows:
            raise RequestError(f"{len(keys)} keys for {rows} tickets")
        Names.check(fill.names, rows)
        for row, (ticket, key) in enumerate(zip(fill.tickets, keys, strict=True)):
            checksum = fill.checksums[CHECKSUM_BYTES * row : CHECKSUM_BYTES * (row + 1)]
            if self._node.fill(ticket, key, checksum) and fill.names and fill.names[row]:
                self._names.add(key, fill.names[row])


def _on_nonsense(writer: str, error: ProtocolError) -> None:
    log.warning("rings.nonsense", writer=writer, error=str(error))
