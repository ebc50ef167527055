"""Writing to the pool: what it has already stays, the rest goes where the placer says, once per node."""

import time
from collections.abc import Sequence

from kvstore.client.access import Access
from kvstore.client.gather import Gather
from kvstore.client.locate import Locator
from kvstore.client.members import NEAR, Members
from kvstore.client.model import Hints, Outcome, Result
from kvstore.client.removal import Removal
from mooncake.core.errors import MooncakeError

WRITING = "somebody else is writing it"
BUSY_S = 0.005
BUSY_S_MAX = 5.0
"""What replaces an object waits so long, in such steps, for somebody else who is just writing it."""
ROUNDS_MAX = 3
"""Nodes tried for one copy: the chosen one, and two others when it is full or gone."""


class Scatter:
    """One call of put."""

    def __init__(
        self,
        members: Members,
        locator: Locator,
        replicas: int,
        preferred: Sequence[str],
        hints: Hints,
        end_s: float,
    ) -> None:
        """See Pool.put."""
        self._members = members
        self._locator = locator
        self._replicas = replicas
        self._preferred = preferred
        self._hints = hints
        self._end_s = end_s
        self._holders: dict[bytes, tuple[str, ...]] = {}

    def put(self, keys: list[bytes], sources: Sequence[Sequence[memoryview]]) -> list[Result]:
        """Write; one answer per key. Of a key that comes twice, the first one counts."""
        return self._replace(keys, sources) if self._hints.replace else self._put_each(keys, sources)

    def _replace(self, keys: list[bytes], sources: Sequence[Sequence[memoryview]]) -> list[Result]:
        """Write where the old bytes are, if nobody prefers another node; then drop them elsewhere.

        A reader that asks store after store could miss an object that goes from one to another.
        """
        if len(self._members.stores) > 1 and not self._preferred:
            looked = Gather(self._members, self._locator, True, self._end_s).look(keys)
            self._holders = {key: found.nodes for key, found in zip(keys, looked, strict=True) if found.ok}
        results = self._put_each(keys, sources)
        end_s = min(self._end_s, time.monotonic() + BUSY_S_MAX)
        while rows := [row for row, one in enumerate(results) if not one.ok and WRITING in one.reason]:
            if time.monotonic() >= end_s:
                break
            time.sleep(BUSY_S)
            again = self._put_each([keys[row] for row in rows], [sources[row] for row in rows])
            for row, result in zip(rows, again, strict=True):
                results[row] = result
        return self._drop_old(keys, results)

    def _drop_old(self, keys: list[bytes], results: list[Result]) -> list[Result]:
        rows = [row for row, one in enumerate(results) if one.ok]
        stores = self._members.stores
        if len(stores) < 2 or not rows:
            return results
        old = Removal(
            self._members, [keys[row] for row in rows], 0.0, self._end_s, [results[row].nodes for row in rows]
        )
        for access in stores.values():
            old.look(access)
        for row, removed in zip(rows, old.run(), strict=True):
            if removed.outcome is Outcome.FAILED:
                reason = f"the old bytes may be there, too: {removed.reason}"
                results[row] = Result(Outcome.FAILED, results[row].size_bytes, results[row].nodes, reason)
        return results

    def _put_each(self, keys: list[bytes], sources: Sequence[Sequence[memoryview]]) -> list[Result]:
        if len(first := dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))) < len(keys):
            rows = list(first.values())
            results = self._put([keys[row] for row in rows], [sources[row] for row in rows])
            by_key = dict(zip(first, results, strict=True))
            return [_again(by_key[key]) if first[key] < row else by_key[key] for row, key in enumerate(keys)]
        return self._put(keys, sources)

    def _put(self, keys: list[bytes], sources: Sequence[Sequence[memoryview]]) -> list[Result]:
        sizes = [sum(part.nbytes for part in source) for source in sources]
        done: list[Result | None] = [None if size else _EMPTY for size in sizes]
        stores = self._members.stores
        if not stores:
            return [one or Result(Outcome.FAILED, reason="the pool has no store") for one in done]
        if len(stores) > 1 and not self._hints.replace:  # one store sees for itself that it has a key
            self._skip_known(keys, done)
        copies = [_Copies() for _ in keys]
        for _ in range(ROUNDS_MAX):
            rows = [row for row, one in enumerate(done) if one is None and self._wants(copies[row])]
            by_node = self._placed(keys, sizes, copies, rows)
            if not by_node:
                break
            for node, some in by_node.items():
                self._put_to(self._members.stores.get(node), node, keys, sources, some, copies)
        return [one or self._result(copies[row], sizes[row]) for row, one in enumerate(done)]

    def _skip_known(self, keys: list[bytes], done: list[Result | None]) -> None:
        rows = [row for row, one in enumerate(done) if one is None]
        looked = Gather(self._members, self._locator, True, self._end_s).look([keys[row] for row in rows])
        for row, found in zip(rows, looked, strict=True):
            if found.ok:
                done[row] = Result(Outcome.EXISTS, found.size_bytes, found.nodes)

    def _wants(self, copies: "_Copies") -> bool:
        return not copies.there and len(copies.nodes) < self._replicas

    def _placed(
        self, keys: list[bytes], sizes: Sequence[int], copies: Sequence["_Copies"], rows: list[int]
    ) -> dict[str, list[int]]:
        """Return which rows each node shall take now."""
        stores = self._members.stores
        by_node: dict[str, list[int]] = {}
        if len(stores) == 1:
            ((only, access),) = stores.items()
            limit = access.record.capacity_bytes
            some = [row for row in rows if not copies[row].tried and sizes[row] <= limit]
            return {only: some} if some else {}
        away = [node for node in stores if self._members.is_away(node)]
        with self._members.placing:
            for row in rows:
                choice = self._members.placer.choose(
                    keys[row],
                    sizes[row],
                    self._replicas - len(copies[row].nodes),
                    preferred=self._preferred or self._holders.get(keys[row], ()),
                    near=NEAR,
                    exclude=[*copies[row].tried, *away],
                )
                for node in choice.nodes:
                    by_node.setdefault(node, []).append(row)
        return by_node

    def _put_to(
        self,
        access: Access | None,
        node: str,
        keys: list[bytes],
        sources: Sequence[Sequence[memoryview]],
        rows: list[int],
        copies: Sequence["_Copies"],
    ) -> None:
        try:
            results = self._ask(access, node, [keys[row] for row in rows], [sources[row] for row in rows])
        except MooncakeError as error:
            if access is not None:
                self._members.lost(access, error)
            results = [Result(Outcome.FAILED, reason=f"{node}: {error}")] * len(rows)
        for row, result in zip(rows, results, strict=True):
            copies[row].add(node, result)

    def _ask(
        self, access: Access | None, node: str, keys: list[bytes], sources: list[Sequence[memoryview]]
    ) -> list[Result]:
        if access is None:
            return [Result(Outcome.FAILED, reason=f"{node}: it has left")] * len(keys)
        results = access.put(keys, sources, self._hints, self._end_s)
        there = [at for at, result in enumerate(results) if result.outcome is Outcome.EXISTS]
        if there:  # or somebody is just writing it, and may never finish
            sizes = access.find([keys[at] for at in there], self._end_s).sizes
            for at, size in zip(there, sizes, strict=True):
                if size and not self._hints.replace:
                    results[at] = Result(Outcome.EXISTS, size, (node,))
                else:
                    results[at] = Result(Outcome.FAILED, reason=f"{node}: {WRITING}")
        return results

    def _result(self, copies: "_Copies", size: int) -> Result:
        reason = "; ".join(copies.reasons)
        if copies.nodes:
            missing = self._replicas - len(copies.nodes)
            why = (reason or "no other node") if missing else ""
            return Result(Outcome.DONE, size, tuple(copies.nodes), why)
        if copies.there:
            return copies.there
        if not copies.tried:
            return Result(Outcome.FAILED, reason="no store can take it: too large, draining, or away")
        full = copies.full and copies.full == len(copies.tried)
        return Result(Outcome.FULL if full else Outcome.FAILED, reason=reason)


class _Copies:
    """How far one object is."""

    __slots__ = ("full", "nodes", "reasons", "there", "tried")

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.tried: list[str] = []
        self.reasons: list[str] = []
        self.there: Result | None = None
        self.full = 0

    def add(self, node: str, result: Result) -> None:
        self.tried.append(node)
        if result.outcome is Outcome.DONE:
            self.nodes.append(node)
        elif result.outcome is Outcome.EXISTS:
            self.there = result
        else:
            self.full += result.outcome is Outcome.FULL
            self.reasons.append(result.reason)


def _again(result: Result) -> Result:
    """Return the answer to a second put of what was just put."""
    return Result(Outcome.EXISTS, result.size_bytes, result.nodes) if result.ok else result


_EMPTY = Result(Outcome.FAILED, reason="an object of 0 bytes")
