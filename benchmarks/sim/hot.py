"""Hot prefixes in the simulated world: the Conductor's Heat wishes, the directory's Tasks carry it out. Pure.

Copies leave their source over the same link as fetches and hand-overs. What is simulated of the directory is
its clock (a look per TICK_S, where production looks ten times a second) and that its index lags by nothing.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.sim.host import Host
from benchmarks.sim.timeline import Timeline
from benchmarks.sim.trace import BLOCK_TOKENS
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.heat import COPIES_MIN, ROUND_S, SHARE_MAX, TTL_S, Heat, candidates, placed
from conductor.index import PrefixIndex
from conductor.plan import Plan
from kvstore.leader.placement import Placer, Room
from kvstore.leader.task_types import Command, Copy
from kvstore.leader.tasks import Tasks

TICK_S = 1.0
RUNNING_MAX = 16
"""Copies at once: blocks here are 16 times as long as those that kvstore.leader.tasks has its limit for."""


class _Held:
    """What the directory knows, read from the Conductor's index: here both are in step."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def replicas(self, keys: Sequence[bytes], *, exact_only: bool = False) -> list[tuple[str, ...]]:  # noqa: ARG002
        return [self._index.holders(key) for key in keys]

    def keys_of(self, node: str) -> list[bytes]:
        raise AssertionError(f"nobody drains {node} here")

    def is_exact(self, node: str) -> bool:  # noqa: ARG002
        return True


class HotCopies:
    """Stands for a gateway's sender and the leading directory. `copied_bytes`: what their copies took."""

    def __init__(
        self,
        time: Timeline,
        cluster: ClusterView,
        index: PrefixIndex,
        cost: CostModel,
        hosts: Mapping[str, Host],
        block_bytes: int,
        going: Callable[[], bool],
        copies_max: int,
    ) -> None:
        """`hosts` by node; nothing happens before `start`, and nothing at all if copies_max is below 2."""
        self.heat = Heat(cost, copies_max)
        self.copies_max = copies_max
        self.copied_bytes = 0
        self.wished_max = 0
        self._time, self._cluster, self._index, self._hosts = time, cluster, index, hosts
        self._block_bytes, self._going = block_bytes, going
        self._placer = Placer()
        self._tasks = Tasks(_Held(index), self._placer, RUNNING_MAX)

    def start(self) -> None:
        """Begin."""
        if self.copies_max < COPIES_MIN:
            return
        for node, host in self._hosts.items():
            if host.node is not None:
                capacity_bytes = host.capacity_blocks * self._block_bytes
                self._placer.update(Room(node, capacity_bytes, 0))
        self._round()
        self._tick()

    def planned(self, keys: Sequence[bytes], plan: Plan) -> None:
        """As the gateway's dispatcher: a request is sent."""
        self.heat.planned(self._time.now_s, keys, plan.hit_blocks, self._block_bytes, BLOCK_TOKENS)

    def _round(self) -> None:
        now_s = self._time.now_s
        nodes = candidates(self._cluster)
        if len(nodes) >= COPIES_MIN:
            room = min(self._hosts[node].capacity_blocks for node in nodes) // SHARE_MAX
            wishes = self.heat.step(now_s, len(nodes), room)
            self.wished_max = max(self.wished_max, sum(len(wish.keys) for wish in wishes))
            for wish, order in placed(wishes, nodes, self._index):
                self._tasks.keep_hot(wish.keys, wish.copies, wish.size_bytes, order, now_s + TTL_S)
        if self._going():
            self._time.at(now_s + ROUND_S, self._round)

    def _tick(self) -> None:
        self._perform(self._tasks.tick(self._time.now_s))
        if self._going():
            self._time.at(self._time.now_s + TICK_S, self._tick)

    def _perform(self, commands: Sequence[Command]) -> None:
        for command in commands:
            assert isinstance(command, Copy)
            self._copy(command)

    def _copy(self, command: Copy) -> None:
        now_s, key = self._time.now_s, command.key
        source, target = self._hosts[command.source], self._hosts[command.target]
        lease, there = source.lease(now_s, [key])
        arrives_s = target.arriving.get(key)
        own = arrives_s is None and there > 0
        if own:
            arrives_s = target.arriving[key] = source.egress.book(now_s, self._block_bytes)
            self.copied_bytes += self._block_bytes
        lives = source.lives, target.lives

        def arrived() -> None:
            source.release(self._time.now_s, lease)
            if own and target.lives == lives[1]:  # else nothing is under way to it any more
                del target.arriving[key]
                if source.lives == lives[0]:
                    target.store(self._time.now_s, [key], 0)
            error = "" if target.held([key]) else f"{target.name} did not get it"
            self._perform(self._tasks.on_result(self._time.now_s, command.command_id, error))

        self._time.at(now_s if arrives_s is None else arrives_s, arrived)
