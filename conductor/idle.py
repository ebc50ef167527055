"""What others leave idle: whether batch work may enter engines now. Pure.

What an engine has begun it does not put off: who comes a moment later waits for a whole prompt, and shares
its steps with every answer for as long as those last. So batch work begins only

    prompts   on an instance that does nothing, while SPARE of the others do nothing either
    answers   if all of them together, spread over the pool, make a step at most TBT_MORE longer than it is
              for the others' answers alone; but one of them always
    room      up to ROOM of the seats and of the KV tokens of the pool, and only what is free for certain:
              so engines never have to take KV from one to give it to another (vLLM's preemption)

The first two hold while better classes are active. Jobs that would be late otherwise (`urgent`) ask only for
an idle instance and free room.
"""

from collections.abc import Sequence

from conductor.cluster import ClusterView, Load
from conductor.cost import CostModel
from conductor.plan import Needs
from mooncake.core.messages import InstanceRecord

SPARE = 0.25
"""Share of the instances that prefill, kept for who comes next; of less than four, none."""
TBT_MORE = 0.05
"""Of the time between tokens: what answers of better classes may lose to batch work."""
ROOM = 0.5
"""Of seats and KV tokens: half is free at once for whoever comes after a quiet night."""
URGENT_ROOM = 0.9
"""The same for jobs that would be late."""
ACTIVE_S = 30.0
"""For so long after the last request of a better class was offered, another one is expected."""

PACE_PRIOR = 0.25
"""Of the instances that prefill, batch work is taken to get at first, whatever classes ask for."""
PACE_PRIOR_S = 30.0
"""What that weighs, beside what is measured."""
PACE_MEMORY_S = 240.0
"""Of measuring; beyond it, what was before counts half."""

_Pair = tuple[InstanceRecord, Load]


class Idle:
    """Asks the view of the cluster; remembers only when better classes were heard of last."""

    def __init__(self, cluster: ClusterView, cost: CostModel) -> None:
        """Nobody was heard of."""
        self._cluster = cluster
        self._cost = cost
        self._better_s = -ACTIVE_S

    def heard(self, now_s: float) -> None:
        """A request of a better class was offered."""
        self._better_s = now_s

    def has_room(self, now_s: float, needs: Needs, *, urgent: bool = False) -> bool:
        """Return whether a batch request may go; a cluster without engines has room: others tell best."""
        alive = self._cluster.alive()
        prefills = [pair for pair in alive if pair[0].role != "decode"] or alive
        decodes = [pair for pair in alive if pair[0].role != "prefill"] or alive
        if not alive:
            return True
        answers = _Answers(decodes)
        active = answers.better_requests > 0 or now_s - self._better_s < ACTIVE_S
        spare = int(len(prefills) * SPARE) if active and not urgent else 0
        if sum(not load.prefill_requests for _, load in prefills) <= spare:
            return False
        if not answers.have_room(needs.kv_tokens, URGENT_ROOM if urgent else ROOM):
            return False
        if urgent or not active or not answers.batch_requests:
            return True  # one is always let in: batch work gets on, however little a step has to spare
        return answers.longer(self._cost, needs.kv_tokens) <= 1 + TBT_MORE


class _Answers:
    """What a pool decodes, in all and of batch work."""

    def __init__(self, decodes: Sequence[_Pair]) -> None:
        self.instances = len(decodes)
        self.seats = sum(record.max_num_seqs for record, _ in decodes)
        self.tokens = sum(record.kv_blocks * record.block_size for record, _ in decodes)
        self.requests = sum(load.decode_requests for _, load in decodes)
        self.kv_tokens = sum(load.decode_kv_tokens for _, load in decodes)
        self.batch_requests = sum(load.batch_requests for _, load in decodes)
        self.batch_kv_tokens = sum(load.batch_kv_tokens for _, load in decodes)

    @property
    def better_requests(self) -> int:
        return self.requests - self.batch_requests

    def have_room(self, kv_tokens: int, share: float) -> bool:
        return (
            self.batch_requests + 1 <= share * self.seats
            and self.batch_kv_tokens + kv_tokens <= share * self.tokens
            and self.requests + 1 <= self.seats
            and self.kv_tokens + kv_tokens <= self.tokens
        )

    def longer(self, cost: CostModel, kv_tokens: int) -> float:
        """Return how much longer a step is with all batch work and one more than without any."""
        n = self.instances
        alone_s = cost.tbt_s(self.better_requests // n, (self.kv_tokens - self.batch_kv_tokens) // n)
        return cost.tbt_s(-(-(self.requests + 1) // n), (self.kv_tokens + kv_tokens) // n) / alone_s


class Pace:
    """Seconds of batch work that begin per second, learned while some waits: what better classes leave."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._work_s = 0.0
        self._time_s = 0.0
        self._at_s: float | None = None  # until when time is counted; None: nothing waits

    def began(self, now_s: float, work_s: float, *, more_waits: bool) -> None:
        """A request that waited has begun; or, with no work, look at the time."""
        if self._at_s is not None:
            self._time_s += max(0.0, now_s - self._at_s)
            self._work_s += work_s
        self._at_s = now_s if more_waits else None
        if self._time_s > PACE_MEMORY_S:
            self._time_s /= 2
            self._work_s /= 2

    def per_s(self, servers: int) -> float:
        """Return it, of so many instances."""
        return (self._work_s + PACE_PRIOR * servers * PACE_PRIOR_S) / (self._time_s + PACE_PRIOR_S)
