"""Who is there, who is alive, and how much work each was given."""

from enum import StrEnum

import msgspec

from mooncake.core.messages import InstanceRecord, StoreRecord

PULSE_S = 0.25
"""The gateway pings every relay, and calls tick, this often."""


class Health(StrEnum):
    """ALIVE takes work; SUSPECT is silent and may come back; DEAD has no link."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


class Transition(msgspec.Struct, frozen=True):
    """An instance changed health; `lost`: move its requests (RequestMachine.instance_lost)."""

    instance_id: str
    before: Health
    after: Health
    reason: str

    @property
    def lost(self) -> bool:
        """Whether work on the instance has to be moved."""
        return self.before is Health.ALIVE and self.after is not Health.ALIVE


class ClusterView:
    """A new instance is DEAD; link_up makes it SUSPECT; its first pulse makes it ALIVE."""

    def instance_up(self, now_s: float, record: InstanceRecord) -> list[Transition]:
        """A record was put. Another epoch under a known id = the engine restarted: the old one is lost."""
        raise NotImplementedError

    def instance_removed(self, now_s: float, instance_id: str) -> list[Transition]:
        """The record vanished (lease expired or deregistered)."""
        raise NotImplementedError

    def link_up(self, now_s: float, instance_id: str) -> list[Transition]:
        """The relay said WELCOME."""
        raise NotImplementedError

    def link_down(self, now_s: float, instance_id: str) -> list[Transition]:
        """The socket to the relay broke, or the relay said DIED: DEAD at once."""
        raise NotImplementedError

    def pulse(
        self, now_s: float, instance_id: str, engine_age_s: float, epoch: str | None = None
    ) -> list[Transition]:
        """A PONG came. Unknown instances and other epochs are ignored."""
        raise NotImplementedError

    def tick(self, now_s: float) -> list[Transition]:
        """Call every PULSE_S: judges silence."""
        raise NotImplementedError

    def store_up(self, record: StoreRecord) -> None:
        """A store node's record was put."""

    def store_removed(self, node: str) -> None:
        """A store node's record vanished."""

    def record(self, instance_id: str) -> InstanceRecord | None:
        """Return what the instance says of itself, if it is known."""
        raise NotImplementedError

    def health(self, instance_id: str) -> Health:
        """Return an instance's health; unknown ones are DEAD."""
        raise NotImplementedError
