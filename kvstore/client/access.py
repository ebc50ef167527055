"""One store, as the pool's client uses it: what is the same for stores of this host and of others."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kvstore.client.model import Hints, Look, Outcome, Result, Sink
from kvstore.limits import KEYS_PER_REQUEST_MAX
from kvstore.node.contract import FULL, OVER_QUOTA, QUOTA_USED_UP
from mooncake.core.errors import PeerTimeout, ProtocolError
from mooncake.core.messages import (
    Commit,
    Committed,
    DropKeys,
    KeysDropped,
    ListNames,
    NamesPage,
    Reserve,
    Stats,
    StoreRecord,
    StoreStats,
)

ASK_S = 2.0
"""For one request: a turn of the store's loop is a millisecond, so this is a store in trouble."""


class Access(ABC):
    """Thread-safe. Calls raise PeerError when the store is away."""

    near: ClassVar[bool]
    """Whether it is a store of this host."""

    def __init__(self, record: StoreRecord, writer: str) -> None:
        """`writer`: who has what it is writing."""
        self.node = record.node
        self.record = record
        self._writer = writer

    @abstractmethod
    def close(self) -> None:
        """Let go of the store."""

    @abstractmethod
    def _ask(self, request: Any, kind: type[Any], wait_s: float) -> Any:
        """Return the answer to `request`, a `kind`."""

    # ------------------------------------------------------------ reading

    @abstractmethod
    def find(self, keys: Sequence[bytes], end_s: float, lease_s: float = 0.0) -> Look:
        """Look for `keys`; with `lease_s`, lease what is there: to be given to `release`.

        Raises:
            PeerError, CapacityError: the store is away, or has no lease left.
        """

    @abstractmethod
    def release(self, look: Look) -> None:
        """Give a lease back, without waiting."""

    @abstractmethod
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

        Raises:
            PeerError: nothing of this call counts then.
        """

    # ------------------------------------------------------------ writing

    @abstractmethod
    def put(
        self, keys: Sequence[bytes], sources: Sequence[Sequence[memoryview]], hints: Hints, end_s: float
    ) -> list[Result]:
        """Write objects of any sizes; one answer each.

        Raises:
            PeerError, CapacityError: the store is away; nothing of this call is visible then, unless the
                answer to the commit itself was lost.
        """

    def _commit(
        self, tickets: Sequence[int], sums: Sequence[bytes], names: Sequence[bytes], end_s: float
    ) -> list[bool]:
        done: list[bool] = []
        for at in range(0, len(tickets), KEYS_PER_REQUEST_MAX):
            part = slice(at, at + KEYS_PER_REQUEST_MAX)
            request = Commit(list(tickets[part]), list(sums[part]), list(names[part]))
            answer: Committed = self._ask(request, Committed, left_s(end_s))
            if len(answer.done) != len(request.tickets):
                raise ProtocolError(f"store {self.node}: {len(answer.done)} results")
            done += answer.done
        return done

    def _result(self, offset: int, committed: bool | None, size_bytes: int) -> Result:
        """Return what the store's answers mean for one object; `committed` None = it gave no room."""
        if committed:
            return Result(Outcome.DONE, size_bytes, (self.node,))
        if committed is not None:
            return Result(Outcome.FAILED, reason=f"{self.node}: written too late")
        if offset == FULL:
            return Result(Outcome.FULL, reason=f"{self.node}: full")
        if offset == OVER_QUOTA:
            return Result(Outcome.FULL, reason=f"{self.node}: {QUOTA_USED_UP}")
        return Result(Outcome.EXISTS, nodes=(self.node,))

    # ------------------------------------------------------------ the rest

    def remove(self, request: DropKeys, end_s: float) -> KeysDropped:
        """Remove objects."""
        answer: KeysDropped = self._ask(request, KeysDropped, left_s(end_s))
        return answer

    def names(self, cursor: int, end_s: float) -> NamesPage:
        """Return a page of what its objects are called."""
        page: NamesPage = self._ask(ListNames(cursor), NamesPage, left_s(end_s))
        return page

    def stats(self, deadline_s: float) -> StoreStats:
        """Return the store's counters."""
        stats: StoreStats = self._ask(Stats(), StoreStats, deadline_s)
        return stats


def left_s(end_s: float) -> float:
    """Return how long one request may take.

    Raises:
        PeerTimeout: no time is left; the store itself is not to blame.
    """
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise PeerTimeout("the deadline passed")
    return min(ASK_S, left_s)


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


def by_size(sizes: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows of each size: a store reserves for one size at a time."""
    rows: dict[int, list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault(size, []).append(row)
    return rows
