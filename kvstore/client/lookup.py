"""The table of a store of this host, mapped: who reads by it asks nobody.

Besides the store's sign of life there is a connection that nothing is ever sent on: the kernel closes it at
once when the store's process ends, so nobody reads on from the memory of a dead store beside its successor.
"""

import functools
import os
import platform
import select
import socket
import struct
import time

import structlog

from kvstore.rings import COUNTERS_READ, RINGS_BYTES
from kvstore.table import TableReader, table_bytes
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import StoreRecord
from transfer.fdpass import fetch_segment, peer_uid
from transfer.segment import Segment

log = structlog.get_logger(__name__)

FETCH_S = 2.0
"""To get the table: without one the store is asked, as ever."""
IN_ORDER = ("x86_64", "amd64")
"""Machines on which others see what one processor writes in the order in which it was written."""


class Lookup:
    """Of one start of a store. Thread-safe."""

    def __init__(self, table: Segment, memory: memoryview, watch: socket.socket) -> None:
        """Use `open`."""
        self.memory = memory
        rows = table_bytes(memory.nbytes)
        self.rings = table.view(rows, RINGS_BYTES)
        self._reader = TableReader(table.view(0, rows), self.rings[:COUNTERS_READ])
        self._table = table
        self._watch = watch
        # a store of this very process ends with us; to ask the kernel would let go of the interpreter
        self._own = _pid_behind(watch) == os.getpid()
        self._ended = select.epoll()
        self._ended.register(watch, select.EPOLLIN | select.EPOLLRDHUP)

    @classmethod
    def open(cls, record: StoreRecord, segment: Segment) -> "Lookup | None":
        """Map the table of `record`'s store; None: it has none, or is another start by now, or not IN_ORDER.

        Args:
            record: a store on this host.
            segment: its memory.
        """
        if not record.table or not record.door or not _in_order(platform.machine().lower()):
            return None
        try:
            table = fetch_segment(record.table, FETCH_S)
        except MooncakeError as error:
            log.info("pool.no_table", node=record.node, error=str(error))
            return None
        watch = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            watch.settimeout(FETCH_S)
            watch.connect(record.door)
            fits = table.size_bytes == table_bytes(segment.size_bytes) + RINGS_BYTES
            if table.name == record.epoch and fits and peer_uid(watch) == os.getuid():
                return cls(table, segment.view(0, segment.size_bytes), watch)
        except OSError as error:
            log.info("pool.no_table", node=record.node, error=str(error))
        watch.close()
        table.close()
        return None

    @property
    def rows(self) -> TableReader | None:
        """The table; None: the store does not live, or is stuck."""
        reader = self._reader
        try:
            if not self._own and self._ended.poll(0, 1):
                return None
            return reader if reader.is_fresh(time.monotonic()) else None
        except (ValueError, OSError):  # closed before, or while the kernel was asked
            return None

    def close(self) -> None:
        """Let go (idempotent)."""
        self._ended.close()
        self._watch.close()
        self._table.close()


@functools.cache
def _in_order(machine: str) -> bool:
    """Whether shared memory can be relied on; said once if not."""
    if machine not in IN_ORDER:
        log.warning("pool.no_table", machine=machine, reason="its writes may be seen out of order")
    return machine in IN_ORDER


def _pid_behind(connection: socket.socket) -> int:
    """Return the process at the other end, by the name that it has here; 0 = it has none."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])
