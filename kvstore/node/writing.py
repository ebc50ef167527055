"""What writers hold: room for named blocks, room granted ahead, and room that rests after them. Pure.

A lost writer may be stopped, not dead, and write late; a range it may still hit rests in quarantine
before it is used again.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

from kvstore.limits import NodeLimits
from kvstore.node.allocator import OffsetAllocator, aligned
from kvstore.node.blocks import Write


class Writing:
    """Who calls it has done what is due (`tick`), except where it says otherwise."""

    def __init__(self, limits: NodeLimits, allocator: OffsetAllocator) -> None:
        """Nobody writes. What is given back goes to `allocator`."""
        self._limits = limits
        self._allocator = allocator
        self._writes: OrderedDict[int, Write] = OrderedDict()  # by ticket, oldest first
        self._tickets: dict[bytes, int] = {}  # of keys in writing
        self._of_tenant: dict[str, int] = {}  # bytes in writing for tenants
        self._granted: OrderedDict[int, Write] = OrderedDict()  # by ticket, oldest first; without a key
        self._quarantine: deque[tuple[float, int, int]] = deque()  # (until_s, offset, size), ascending
        self.granted_bytes = self.quarantined_bytes = 0
        self.given_up = 0

    def __len__(self) -> int:
        """How many named blocks are being written."""
        return len(self._writes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._tickets

    # ------------------------------------------------------------ named blocks

    @property
    def is_full(self) -> bool:
        """Whether no more blocks may be begun."""
        return len(self._writes) >= self._limits.writes_max

    def key_of(self, ticket: int) -> bytes | None:
        """Return the key that `ticket` was given for, if it can still be committed."""
        write = self._writes.get(ticket)
        return write.key if write else None

    def bytes_of(self, tenant: str) -> int:
        """Return what is being written for a tenant: its quota is charged later, and must hold until then."""
        return self._of_tenant.get(tenant, 0)

    def begin(self, write: Write) -> None:
        """Take in a block that is to be written."""
        self._writes[write.ticket] = write
        self._tickets[write.key] = write.ticket
        if write.tags.tenant:
            self._count(write.tags.tenant, aligned(write.size_bytes))

    def end(self, ticket: int) -> Write | None:
        """Forget a block, which is written; None: the ticket is unknown, expired or used."""
        write = self._writes.pop(ticket, None)
        if write is not None:
            del self._tickets[write.key]
            if write.tags.tenant:
                self._count(write.tags.tenant, -aligned(write.size_bytes))
        return write

    def _count(self, tenant: str, more_bytes: int) -> None:
        self._of_tenant[tenant] = self._of_tenant.get(tenant, 0) + more_bytes
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    # ------------------------------------------------------------ room granted ahead

    @property
    def grants_left(self) -> int:
        """How many more grants there may be."""
        return self._limits.writes_max - len(self._granted)

    def grant(self, room: Write) -> None:
        """Take in room that was granted."""
        self._granted[room.ticket] = room
        self.granted_bytes += aligned(room.size_bytes)

    def end_grant(self, ticket: int) -> Write | None:
        """Forget granted room; None: there is none. Nothing that is due needs to be done before."""
        room = self._granted.pop(ticket, None)
        if room is not None:
            self.granted_bytes -= aligned(room.size_bytes)
        return room

    def give_back(self, writer: str, tickets: Sequence[int]) -> None:
        """Take back granted room in which its writer writes no more; others' is left alone."""
        for ticket in tickets:
            room = self._granted.get(ticket)
            if room is not None and room.writer == writer:
                self.end_grant(ticket)
                self._allocator.free(room.offset, room.size_bytes)

    # ------------------------------------------------------------ what is given up

    def abandon(self, now_s: float, writer: str, tickets: Sequence[int]) -> None:
        """Give up `tickets` of `writer`, or all of them if none are named; others' are left alone."""
        for ticket in list(tickets) or list(self._writes):
            write = self._writes.get(ticket)
            if write is not None and write.writer == writer:
                self._give_up(now_s, write)
        for ticket in list(tickets) or list(self._granted):
            room = self._granted.get(ticket)
            if room is not None and room.writer == writer:
                self.end_grant(ticket)
                self._rest(now_s, room)

    def tick(self, now_s: float) -> None:
        """Do what is due: what was not completed in time enters quarantine, quarantine ends."""
        while self._writes and (write := next(iter(self._writes.values()))).expires_s <= now_s:
            self._give_up(now_s, write)
        while self._granted and (room := next(iter(self._granted.values()))).expires_s <= now_s:
            self.end_grant(room.ticket)
            self._rest(now_s, room)
        while self._quarantine and self._quarantine[0][0] <= now_s:
            _, offset, size_bytes = self._quarantine.popleft()
            self.quarantined_bytes -= aligned(size_bytes)
            self._allocator.free(offset, size_bytes)

    def _give_up(self, now_s: float, write: Write) -> None:
        self.end(write.ticket)
        self.given_up += 1
        self._rest(now_s, write)

    def _rest(self, now_s: float, write: Write) -> None:
        """Use the room of a writer again only when nothing can come there any more."""
        self._quarantine.append((now_s + self._limits.quarantine_s, write.offset, write.size_bytes))
        self.quarantined_bytes += aligned(write.size_bytes)
