"""Changes of roles in the simulated world: the production Planner decides, instances drain and come back."""

from collections.abc import Callable, Mapping

import msgspec

from benchmarks.sim.nouns import Instance
from benchmarks.sim.timeline import Timeline
from conductor.cluster import ClusterView
from conductor.planner import Member, Planner, Switch

DRAINING = "draining"
"""Role of an instance on its way to another one: neither pool has it."""
DRAIN_POLL_S = 0.5


class Roles:
    """Asks the planner at its own pace, and carries out what it says."""

    def __init__(
        self,
        time: Timeline,
        cluster: ClusterView,
        planner: Planner | None,
        instances: Mapping[str, Instance],
        going: Callable[[], bool],
    ) -> None:
        """`planner` None = nobody changes roles. `going`: whether there is work still, or to come."""
        self._time = time
        self._cluster = cluster
        self._planner = planner
        self._instances = instances
        self._going = going
        self.switches: list[tuple[float, str, str]] = []  # when, who, to which role

    def replan(self) -> None:
        """Ask now, and again at each of the planner's intervals."""
        if self._planner is None:
            return
        now_s = self._time.now_s
        for switch in self._planner.step([self._member(one) for one in self._instances.values() if one.up]):
            self._switch(switch)
        if self._going():
            self._time.at(now_s + self._planner.interval_s, self.replan)

    def _member(self, instance: Instance) -> Member:
        record = instance.record
        load = self._cluster.load(record.instance_id)
        return Member(
            instance_id=record.instance_id,
            role=record.role,
            queue_s=load.queue_s(self._time.now_s),
            decode_requests=load.decode_requests,
            kv_tokens_max=record.kv_blocks * record.block_size,
            sequences_max=record.max_num_seqs,
        )

    def _switch(self, switch: Switch) -> None:
        """Give it nothing new; when it has finished, it comes back in its other role."""
        instance = self._instances[switch.instance_id]
        instance.next_role = switch.role
        self._set_role(instance, DRAINING)
        self._drained(instance)

    def _drained(self, instance: Instance) -> None:
        load = self._cluster.load(instance.record.instance_id)
        if load.decode_requests or load.prefill_requests:
            self._time.at(self._time.now_s + DRAIN_POLL_S, lambda: self._drained(instance))
            return
        self._set_role(instance, instance.next_role)
        self.switches.append((self._time.now_s, instance.record.instance_id, instance.next_role))
        instance.next_role = ""

    def _set_role(self, instance: Instance, role: str) -> None:
        instance.record = msgspec.structs.replace(instance.record, role=role)
        self._cluster.instance_up(self._time.now_s, instance.record)
