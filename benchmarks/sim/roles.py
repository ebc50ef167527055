"""Changes of roles in the simulated world: the production Planner decides, production Changes drain."""

from collections.abc import Callable, Mapping

import msgspec

from benchmarks.sim.nouns import Instance
from benchmarks.sim.timeline import Timeline
from conductor.cluster import ClusterView
from conductor.planner import Member, Planner, Switch, member_of
from conductor.roles import Changes, Order

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
        leave: Callable[[str], None],
    ) -> None:
        """`planner` None = nobody changes roles. `going`: whether there is work still, or to come.

        `leave`: place requests anew that only count on an instance.
        """
        self._time = time
        self._cluster = cluster
        self._planner = planner
        self._instances = instances
        self._going = going
        self._leave = leave
        self._changes = Changes()
        self._polling = False
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
        return member_of(self._time.now_s, record, self._cluster.load(record.instance_id))

    def _switch(self, switch: Switch) -> None:
        """Give it nothing new; when it has finished, or after long enough, it comes back in its new role."""
        instance_id = switch.instance_id
        if instance_id in self._changes:
            return
        self._set_role(self._changes.begin(self._time.now_s, instance_id, switch.role))
        self._leave(instance_id)
        self._poll()

    def _poll(self) -> None:
        for order in self._changes.step(self._time.now_s, lambda one: self._cluster.load(one).is_busy):
            self._set_role(order)
            self.switches.append((self._time.now_s, order.instance_id, order.role))
        if len(self._changes) and not self._polling:
            self._polling = True
            self._time.at(self._time.now_s + DRAIN_POLL_S, self._poll_again)

    def _poll_again(self) -> None:
        self._polling = False
        self._poll()

    def _set_role(self, order: Order) -> None:
        instance = self._instances[order.instance_id]
        instance.record = msgspec.structs.replace(instance.record, role=order.role)
        self._cluster.instance_up(self._time.now_s, instance.record)
