"""Removing from the pool: every store that has an object drops its copy, or none does."""

from collections.abc import Sequence

from kvstore.client.access import Access
from kvstore.client.members import Members
from kvstore.client.model import Outcome, Result
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import DropKeys, KeysDropped


class Removal:
    """One call of remove: `look` at every store, then `run`."""

    def __init__(
        self,
        members: Members,
        keys: list[bytes],
        unless_read_s: float,
        end_s: float,
        spared: Sequence[Sequence[str]] = (),
    ) -> None:
        """See Pool.remove; `spared[i]` are nodes that keep `keys[i]`."""
        self._members = members
        self._keys = keys
        self._unless_read_s = unless_read_s
        self._end_s = end_s
        self._found: list[tuple[Access, list[int]]] = []
        self._spared = spared or [()] * len(keys)
        self._copies = [0] * len(keys)
        self._held: set[bytes] = set()
        self._reason = ""

    def look(self, access: Access) -> None:
        """Learn what a store has."""
        try:
            sizes = access.find(self._keys, self._end_s).sizes
        except MooncakeError as error:
            self._lost(access, error)
            return
        rows = [row for row, size in enumerate(sizes) if size and access.node not in self._spared[row]]
        for row in rows:
            self._copies[row] += 1
        if rows:
            self._found.append((access, rows))

    def run(self) -> list[Result]:
        """Remove; return an answer for each key."""
        if self._unless_read_s:  # a copy may go only if no other one has to stay
            for access, rows in self._found:
                if shared := [row for row in rows if self._copies[row] > 1]:
                    self._drop(access, shared, ask_only=True)
        dropped: list[list[str]] = [[] for _ in self._keys]
        for access, rows in self._found:
            free = [row for row in rows if self._keys[row] not in self._held]
            if free and self._drop(access, free) is not None:
                for row in free:
                    dropped[row].append(access.node)
        return [self._result(key, nodes) for key, nodes in zip(self._keys, dropped, strict=True)]

    def _drop(self, access: Access, rows: list[int], *, ask_only: bool = False) -> KeysDropped | None:
        keys = [self._keys[row] for row in rows]
        request = DropKeys(keys, unless_read_s=self._unless_read_s, ask_only=ask_only)
        try:
            answer = access.remove(request, self._end_s)
        except MooncakeError as error:
            self._lost(access, error)
            return None
        self._held.update(answer.kept)
        return answer

    def _lost(self, access: Access, error: MooncakeError) -> None:
        self._members.lost(access, error)
        self._reason = f"{access.node}: {error}"

    def _result(self, key: bytes, nodes: list[str]) -> Result:
        if key in self._held:
            return Result(Outcome.HELD, reason="somebody has just read it")
        outcome = Outcome.DONE if nodes else Outcome.MISSING
        return Result(Outcome.FAILED if self._reason else outcome, nodes=tuple(nodes), reason=self._reason)
