"""Prompts that are planned and not computed yet: a later one finds their blocks when its turn comes. Pure.

Who asks for what another one is about to compute on an instance waits behind it there anyway, so it will find
the blocks it shares. Without this, a burst behind one new prefix looks as if each had to compute it, queues
are predicted several times too long, and the burst spreads over all instances.

A prompt is found by its first block that nobody holds: one that shares new blocks with it has the same
one there. Keys name whole prefixes, so how much two share is found by halving.
"""

from collections.abc import Sequence

PROMPTS_MAX = 8
"""Remembered per first new block and instance, the newest: of a crowd behind one prefix any will do."""


class Coming:
    """Tell it of every prefill when it is planned and when it is over."""

    def __init__(self) -> None:
        """Nothing comes."""
        self._prompts: dict[bytes, dict[str, dict[int, Sequence[bytes]]]] = {}  # block, instance, ticket
        self._where: dict[int, tuple[bytes, str]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def add(self, ticket: int, instance_id: str, keys: Sequence[bytes], known: int) -> None:
        """A prompt, of which somebody holds the first `known` blocks, will be computed on an instance."""
        if not ticket or known >= len(keys):
            return
        block = keys[known]
        there = self._prompts.setdefault(block, {}).setdefault(instance_id, {})
        there[ticket] = keys
        self._where[ticket] = block, instance_id
        if len(there) > PROMPTS_MAX:
            self.remove(next(iter(there)))

    def remove(self, ticket: int) -> None:
        """A prompt is computed, or given up; unknown ones are ignored."""
        block, instance_id = self._where.pop(ticket, (b"", ""))
        if not instance_id:
            return
        instances = self._prompts[block]
        del instances[instance_id][ticket]
        if not instances[instance_id]:
            del instances[instance_id]
            if not instances:
                del self._prompts[block]

    def match(self, keys: Sequence[bytes], known: int) -> dict[str, int]:
        """Return by instance how many leading blocks will be there, where that is more than `known`."""
        if not self._prompts or known >= len(keys):
            return {}
        instances = self._prompts.get(keys[known], {})
        return {
            instance_id: max(_shared(keys, other, known + 1) for other in prompts.values())
            for instance_id, prompts in instances.items()
        }


def _shared(left: Sequence[bytes], right: Sequence[bytes], begin: int) -> int:
    """Return how many leading keys are the same; the first `begin` are."""
    low, high = begin, min(len(left), len(right))
    step = 1
    while low < high:  # keys may be made as they are looked at: not far beyond the end of what is shared
        at = min(low + step, high) - 1
        if left[at] == right[at]:
            low, step = at + 1, step * 2
        else:
            high, step = at, max(1, (at - low) // 2)
    return low
