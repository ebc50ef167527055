"""What a leader knows of the followers of its engine. Pure.

nobody --beat--> there --silent--> nobody            before the engine starts
there --silent | gone | another life--> lost         after: an engine cannot exchange a node
"""

from mooncake.core.errors import CapacityError, ConfigError, PeerGone
from mooncake.worker.node_messages import NodeBeat

SILENT_S = 10.0
"""A node that was not heard for so long is gone: twenty beats, more than a busy machine holds one up."""


class _Seen:
    def __init__(self, life: str) -> None:
        self.life = life
        self.heard_s = 0.0
        self.leaves = False
        self.gone = ""


class Roster:
    """Followers by rank, 1 to count - 1."""

    def __init__(self, count: int, version: str) -> None:
        """`count`: nodes with the leader; `version`: of our package, which all have to share."""
        self._count = count
        self._version = version
        self._seen: dict[int, _Seen] = {}
        self._lost = ""
        self._epoch = ""  # of the engine that runs

    def beat(self, now_s: float, beat: NodeBeat) -> None:
        """Take what a follower says.

        Raises:
            ConfigError: it is none of this engine.
            PeerGone: it runs ranks of another engine, or this one runs already with another in its place.
            CapacityError: there is another one in its place; it may be gone soon.
        """
        if not 1 <= beat.rank < self._count:
            raise ConfigError(
                f"node_rank = {beat.rank}: an engine of {self._count} nodes has followers 1 to "
                f"{self._count - 1}"
            )
        if beat.version != self._version:
            raise ConfigError(
                f"follower {beat.rank} has version {beat.version}, its leader {self._version}: update one"
            )
        if beat.epoch and beat.epoch != self._epoch:
            raise PeerGone(f"follower {beat.rank} runs ranks of an engine that has ended: start it again")
        seen = self._seen.get(beat.rank)
        if seen is None or seen.life != beat.life:
            if self._epoch:
                self._lose(f"follower {beat.rank} has started again")
                raise PeerGone("the engine runs with another life of this follower, and has to start again")
            if seen is not None and not seen.gone and now_s - seen.heard_s <= SILENT_S:
                raise CapacityError(f"node_rank = {beat.rank}: another follower has it: give each its own")
            seen = self._seen[beat.rank] = _Seen(beat.life)
        seen.heard_s, seen.leaves, seen.gone = now_s, beat.leaves, beat.gone
        if beat.gone:
            self._lose(f"follower {beat.rank} {beat.gone}")

    def missing(self, now_s: float) -> list[int]:
        """Return the ranks that are not there (yet)."""
        return [rank for rank in range(1, self._count) if not self._is_there(now_s, rank)]

    def _is_there(self, now_s: float, rank: int) -> bool:
        seen = self._seen.get(rank)
        return seen is not None and not seen.gone and now_s - seen.heard_s <= SILENT_S

    def seal(self, epoch: str) -> None:
        """Hold on to those who are there: the engine starts with them."""
        self._epoch = epoch

    def lost(self, now_s: float) -> str:
        """Return who is lost and how, for people; "" = the engine is whole, or has not started."""
        if self._epoch and not self._lost:
            for rank in self.missing(now_s):
                self._lose(f"follower {rank} has been silent for {SILENT_S:g} s")
        return self._lost

    def _lose(self, why: str) -> None:
        if self._epoch and not self._lost:
            self._lost = why

    @property
    def leaves(self) -> str:
        """Which follower was told to go, for people; "" = none."""
        told = [rank for rank, seen in sorted(self._seen.items()) if seen.leaves]
        return f"follower {told[0]} was told to go" if told else ""
