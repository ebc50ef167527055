"""Copies of blocks from one simulated host to another, over the link that leaves the first. Pure."""

from benchmarks.sim.host import Host
from benchmarks.sim.nouns import Running
from benchmarks.sim.timeline import Timeline
from conductor.cost import CostModel
from kvstore.limits import ANSWER_S


class Copies:
    """What has been copied, and what is under way."""

    def __init__(self, time: Timeline, cost: CostModel, block_bytes: int) -> None:
        """`cost` is the Conductor's, and hears how long copies take."""
        self._time = time
        self._cost = cost
        self._block_bytes = block_bytes
        self.count = 0
        self.size_bytes = 0

    def fetch(self, running: Running, source: Host, keys: list[bytes]) -> None:
        """Copy those of a prompt's blocks that its host lacks; what is under way is only waited for."""
        host, now_s = running.instance.host, self._time.now_s
        lease, there = source.lease(now_s, keys)
        depth = host.held(keys[:there])
        wanted = keys[depth:there]
        missing = [key for key in wanted if key not in host.arriving]
        ready_s = max((host.arriving[key] for key in wanted if key in host.arriving), default=now_s)
        if not source.up:  # nobody has noticed yet
            ready_s = now_s + ANSWER_S
        elif missing:
            ready_s = max(ready_s, self.copy(host, source, missing, depth))
        running.job.blocked = True
        life = source.lives

        def ready() -> None:
            source.release(self._time.now_s, lease)
            if host.node is None and source.lives == life:
                running.staged_blocks = there
            running.job.blocked = False
            running.engine.kick()

        self._time.at(ready_s, ready)

    def copy(self, host: Host, source: Host, keys: list[bytes], depth: int) -> float:
        """Return when blocks of `depth` of a prompt will be there, if both hosts still live then."""
        lives, begun_s = (host.lives, source.lives), self._time.now_s
        size_bytes = len(keys) * self._block_bytes
        arrived_s = source.egress.book(begun_s, size_bytes)
        self.count += 1
        self.size_bytes += size_bytes
        if host.node is None:
            return arrived_s
        host.arriving.update(dict.fromkeys(keys, arrived_s))

        def arrived() -> None:
            if host.lives != lives[0]:
                return
            for key in keys:
                del host.arriving[key]
            if source.lives == lives[1]:
                host.store(self._time.now_s, keys, depth)
                self._cost.observe_transfer(size_bytes, self._time.now_s - begun_s, remote=True)

        self._time.at(arrived_s, arrived)
        return arrived_s
