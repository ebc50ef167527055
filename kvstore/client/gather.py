"""Reading from the pool: this host's stores first, then whoever has the rest, then the next one."""

import time
from collections.abc import Sequence

from kvstore.client.access import Access
from kvstore.client.local import SLACK_S, LocalStore
from kvstore.client.locate import Holders, Locator
from kvstore.client.members import Members
from kvstore.client.model import Look, Outcome, Result, Sink
from kvstore.node.finding import ELSEWHERE
from mooncake.core.errors import MooncakeError

ATTEMPTS_MAX = 4
"""Stores tried for one key; beyond that the pool has other troubles."""
SSD_LOOKS_MAX = 8
"""Times a store is asked again for objects that it is bringing from its SSD."""


class Gather:
    """One call: its deadline, and whether it verifies."""

    def __init__(self, members: Members, locator: Locator, verify: bool, end_s: float) -> None:
        """See Pool.get_into."""
        self._members = members
        self._locator = locator
        self._verify = verify
        self.end_s = end_s

    def read(self, keys: list[bytes], sink: Sink) -> list[Result]:
        """Read what can be read into `sink`; one answer per key."""
        results: list[Result | None] = [None] * len(keys)
        reasons: dict[int, str] = {}
        stores = self._members.stores
        near = [access for access in stores.values() if access.near]
        pending = list(range(len(keys)))
        for access in near:
            ask = pending
            if self._verify and isinstance(access, LocalStore) and access.shown:
                ask = access.shown.read(keys, pending, sink, results, self.end_s)
            if ask:
                self._read_from(access, keys, ask, sink, results, reasons)
            pending = [row for row in pending if results[row] is None]
            if not pending:
                break
        unsure = ""
        if pending and len(near) < len(stores):
            holders = self._locator.locate(
                [keys[row] for row in pending], self.end_s, without=[access.node for access in near]
            )
            unsure = holders.unsure
            self._read_around(keys, pending, holders, sink, results, reasons)
        elif not stores:
            unsure = "the pool has no store"
        return [
            result if result is not None else _not_read(reasons.get(row) or unsure)
            for row, result in enumerate(results)
        ]

    def _read_around(
        self,
        keys: list[bytes],
        pending: list[int],
        holders: Holders,
        sink: Sink,
        results: list[Result | None],
        reasons: dict[int, str],
    ) -> None:
        left = {row: list(nodes) for row, nodes in zip(pending, holders.nodes, strict=True)}
        for _ in range(ATTEMPTS_MAX):
            by_node: dict[str, list[int]] = {}
            for row, nodes in left.items():
                if results[row] is None and nodes:
                    by_node.setdefault(nodes.pop(0), []).append(row)
            if not by_node:
                return
            for node, rows in by_node.items():
                access = self._members.stores.get(node)
                if access is None or self._members.is_away(node):
                    reasons.update(dict.fromkeys(rows, f"{node}: it is away"))
                else:
                    self._read_from(access, keys, rows, sink, results, reasons)

    def _read_from(
        self,
        access: Access,
        keys: list[bytes],
        rows: list[int],
        sink: Sink,
        results: list[Result | None],
        reasons: dict[int, str],
    ) -> None:
        """Read from one store what it has of `rows`; note why it could not."""
        for _ in range(SSD_LOOKS_MAX):
            lease_s = max(0.0, self.end_s - time.monotonic()) + SLACK_S
            try:
                look = access.find([keys[row] for row in rows], self.end_s, lease_s)
                try:
                    rows = self._take(access, look, rows, sink, results, reasons)
                finally:
                    access.release(look)
            except MooncakeError as error:
                self._members.lost(access, error)
                for row in rows:
                    if results[row] is None:
                        reasons[row] = f"{access.node}: {error}"
                return
            if not rows or time.monotonic() > self.end_s:
                return

    def _take(
        self,
        access: Access,
        look: Look,
        rows: list[int],
        sink: Sink,
        results: list[Result | None],
        reasons: dict[int, str],
    ) -> list[int]:
        """Read what was leased; return the rows that are still on the store's SSD."""
        sizes, offsets = look.sizes, look.offsets
        there = [at for at, size in enumerate(sizes) if size and offsets[at] != ELSEWHERE]
        nodes = (access.node,)
        if there:
            said = access.read(look, there, [rows[at] for at in there], sink, self._verify, self.end_s)
            for at in there:
                if reason := said[at]:
                    reasons[rows[at]] = reason
                else:
                    results[rows[at]] = Result(Outcome.DONE, sizes[at], nodes)
        if len(there) == len(rows):
            return []
        late = [rows[at] for at, size in enumerate(sizes) if size and offsets[at] == ELSEWHERE]
        reasons.update(dict.fromkeys(late, f"{access.node}: still on its way from the SSD"))
        return late

    def here(self, keys: list[bytes]) -> list[int] | None:
        """Return the size of each object, 0 = missing, if a store of this host can tell alone, as usual."""
        access = self.nearest()
        if access is None:
            return None
        try:
            found = access.sizes(keys, self.end_s)
        except MooncakeError as error:
            self._members.lost(access, error)
            return None
        return found if len(self._members.stores) == 1 or all(found) else None

    def one(self, key: bytes, target: memoryview) -> Result | None:
        """Read one object from a store of this host, by the shortest way; None: `read` has to do it."""
        access = self.nearest()
        if access is None:
            return None
        try:
            result = access.get_one(key, target, self._verify, self.end_s)
        except MooncakeError as error:
            self._members.lost(access, error)
            return None
        return result if result is None or result.ok or len(self._members.stores) == 1 else None

    def nearest(self) -> LocalStore | None:
        """Return a store of this host."""
        for access in self._members.stores.values():
            if isinstance(access, LocalStore):
                return access
        return None

    def look(self, keys: list[bytes]) -> list[Result]:
        """Return who has what, without reading."""
        results: list[Result | None] = [None] * len(keys)
        unsure = "" if self._members.stores else "the pool has no store"
        pending = list(range(len(keys)))
        stores = self._members.stores
        asked = []
        for access in [one for one in stores.values() if one.near]:
            try:
                sizes = _sizes_at(access, [keys[row] for row in pending], self.end_s)
            except MooncakeError as error:
                unsure = f"{access.node}: {error}"
                continue
            asked.append(access.node)
            nodes = (access.node,)
            for row, size in zip(pending, sizes, strict=True):
                if size:
                    results[row] = Result(Outcome.DONE, size, nodes)
            pending = [row for row in pending if results[row] is None]
            if not pending:
                break
        if pending and len(asked) < len(stores):
            unsure = self._look_around(keys, pending, asked, results) or unsure
        return [result if result is not None else _not_read(unsure) for result in results]

    def _look_around(
        self, keys: list[bytes], pending: list[int], asked: list[str], results: list[Result | None]
    ) -> str:
        holders = self._locator.locate([keys[row] for row in pending], self.end_s, without=asked)
        for at, row in enumerate(pending):
            for node in holders.nodes[at]:
                size = holders.sizes[at] or self._size_at(node, keys[row])
                if size:
                    results[row] = Result(Outcome.DONE, size, tuple(holders.nodes[at]))
                    break
        return holders.unsure

    def _size_at(self, node: str, key: bytes) -> int:
        """Ask the holder itself: a directory knows no sizes, and may be late."""
        access = self._members.stores.get(node)
        try:
            return access.find([key], self.end_s).sizes[0] if access else 0
        except MooncakeError as error:
            assert access
            self._members.lost(access, error)
            return 0


def _sizes_at(access: Access, keys: list[bytes], end_s: float) -> Sequence[int]:
    return access.sizes(keys, end_s) if isinstance(access, LocalStore) else access.find(keys, end_s).sizes


def _not_read(reason: str) -> Result:
    return Result(Outcome.FAILED, reason=reason) if reason else Result(Outcome.MISSING)
