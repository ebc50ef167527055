"""Carries failures out: what breaks, when the Conductor notices, and what comes back. Pure.

A dead process breaks its sockets, so that its relay's link goes down within LINK_LOSS_S. A dead host says
nothing any more: ClusterView, given pulses and ticks as in the gateway, judges its silence, and the records
of its store and engine end with their leases. What comes back does so in another epoch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from benchmarks.sim.failures import Failure
from benchmarks.sim.nouns import Instance
from benchmarks.sim.timeline import Timeline
from conductor.cluster import PULSE_S, ClusterView, Transition

LINK_LOSS_S = 0.08
"""Measured: so late comes the event of a killed peer's socket."""
RECORD_TTL_S = 2.0
"""As mooncake.core.metadata_registration.TTL_S: a dead host's records end with their lease."""


class Shell(Protocol):
    """What the world does about it."""

    def crashed(self, instance: Instance) -> None:
        """The engine is no more; nobody knows yet."""

    def lost(self, instance_id: str) -> None:
        """The Conductor knows: move its requests."""

    def revived(self, instance: Instance) -> None:
        """There is another engine, and the host's store if it was gone, too."""


class Faults:
    """Nothing happens, and nothing is watched, without failures."""

    def __init__(
        self,
        time: Timeline,
        cluster: ClusterView,
        instances: Mapping[str, Instance],
        failures: Sequence[Failure],
        going: Callable[[], bool],
        shell: Shell,
    ) -> None:
        """`failures` in order of time; one of an instance that is down is left out."""
        self._time = time
        self._cluster = cluster
        self._instances = instances
        self._failures = failures
        self._going = going
        self._shell = shell
        self.happened: list[Failure] = []

    def start(self) -> None:
        """Begin to watch, and wait for the first failure."""
        if self._failures:
            self._watch()
            self._wait(0)

    def _wait(self, number: int) -> None:
        if number < len(self._failures):
            self._time.at(self._failures[number].at_s, lambda: self._next(number))

    def _next(self, number: int) -> None:
        if self._going():
            self._break(self._failures[number])
            self._wait(number + 1)

    def _watch(self) -> None:
        """As the gateway does: every engine that lives says so, then silence is judged."""
        now_s = self._time.now_s
        for instance in self._instances.values():
            if instance.up:
                self._apply(
                    self._cluster.pulse(now_s, instance.record.instance_id, 0.0, instance.record.epoch)
                )
        self._apply(self._cluster.tick(now_s))
        if self._going():
            self._time.at(now_s + PULSE_S, self._watch)

    def _break(self, failure: Failure) -> None:
        instance = self._instances[failure.name]
        if not instance.up:
            return
        self.happened.append(failure)
        instance.up = False
        self._shell.crashed(instance)
        epoch, now_s = instance.record.epoch, self._time.now_s

        def unlinked() -> None:
            record = self._cluster.record(failure.name)
            if record is not None and record.epoch == epoch:
                self._apply(self._cluster.link_down(self._time.now_s, failure.name))

        def expired() -> None:
            if not instance.host.up:
                self._cluster.store_removed(instance.host.name)
                instance.feed.stop()
                self._apply(self._cluster.instance_removed(self._time.now_s, failure.name))

        if failure.host:
            instance.host.lose()
            self._time.at(now_s + RECORD_TTL_S, expired)
        else:
            self._time.at(now_s + LINK_LOSS_S, unlinked)
        if failure.back_s != math.inf:
            self._time.at(now_s + failure.back_s, lambda: self._back(instance))

    def _back(self, instance: Instance) -> None:
        if not self._going():
            return
        now_s = self._time.now_s
        epoch = str(int(instance.record.epoch) + 1)
        instance.record = msgspec.structs.replace(instance.record, epoch=epoch)
        instance.up = True
        self._shell.revived(instance)
        name = instance.record.instance_id
        self._apply(self._cluster.instance_up(now_s, instance.record))
        self._apply(self._cluster.link_up(now_s, name))
        self._apply(self._cluster.pulse(now_s, name, 0.0, epoch))

    def _apply(self, transitions: Sequence[Transition]) -> None:
        for change in transitions:
            if change.lost:
                self._shell.lost(change.instance_id)
