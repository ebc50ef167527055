"""Who is there, who is alive, and how much work each was given (DESIGN 4, 5 "Failure").

    record put -> DEAD --link_up--> SUSPECT --pulse--> ALIVE --silence--> SUSPECT --pulse--> ALIVE
    link_down, another epoch, or the record's removal -> DEAD / gone at once

Pulses come from a thread of the engine's relay, so a long prefill step still pulses: silence is
real. What silence may also be is *our own*: a gateway whose loop was blocked, or whose process was
stopped, has not listened. Its late tick forgives silence and peers get a full limit to answer.
An instance that is not ALIVE takes no new work and the shell moves its requests (`lost`); should
it have been alive all along, its late outputs carry engine ids that nobody waits for.
"""

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from mooncake.core.messages import InstanceRecord, StoreRecord

PULSE_S = 0.25
"""The gateway pings every relay, and calls tick, this often."""
SILENCE_S = 1.5
"""Silent this long = SUSPECT: six lost pulses in a row. A client waits about this long for a move."""
ENGINE_SILENCE_S = 1.5
"""The same limit for the engine behind a relay that answers by itself."""
TICK_LATE_S = 0.3
"""A tick this much later than PULSE_S means we did not listen: more than one pulse was missed."""
FORGIVEN_MAX = 4
"""Late ticks in a row that one silent peer is forgiven: a gateway that is always late must judge
in the end, or a dead peer would keep its requests for ever."""


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
    at_s: float

    @property
    def lost(self) -> bool:
        """Whether work on the instance has to be moved."""
        return self.before is Health.ALIVE and self.after is not Health.ALIVE


class Load:
    """Work charged to one start of an instance and not yet given back."""

    def __init__(self) -> None:
        """Idle."""
        self._prefill_s: dict[int, float] = {}  # ticket -> predicted seconds, in queue order
        self._head_start_s = 0.0
        self._sum_s: float | None = 0.0  # of _prefill_s; None = not added up since it changed
        self.prefill_tokens = 0
        self.decode_requests = 0
        self.decode_kv_tokens = 0
        self.batch_requests = 0  # of these
        self.batch_kv_tokens = 0

    @property
    def prefill_requests(self) -> int:
        """Prefills that wait or run."""
        return len(self._prefill_s)

    def queue_s(self, now_s: float) -> float:
        """Return predicted seconds until a prefill charged now would start (paper 1.2, `tq`).

        Engines serve prefills first come, first served, so what has run since the head of the
        queue began is taken off the head, never more than the head's own prediction.
        """
        if not self._prefill_s:
            return 0.0
        if self._sum_s is None:
            self._sum_s = sum(self._prefill_s.values())
        head_s = next(iter(self._prefill_s.values()))
        return self._sum_s - min(head_s, max(0.0, now_s - self._head_start_s))

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._prefill_s or self.decode_requests)

    def overdue_s(self, now_s: float) -> float:
        """Return for how long the prefill at the head has run beyond its prediction."""
        if not self._prefill_s:
            return 0.0
        return max(0.0, now_s - self._head_start_s - next(iter(self._prefill_s.values())))

    def add_prefill(self, now_s: float, ticket: int, seconds: float, tokens: int) -> None:
        """Queue a prefill."""
        if not self._prefill_s:
            self._head_start_s = now_s
        self._prefill_s[ticket] = seconds
        self._sum_s = None
        self.prefill_tokens += tokens

    def remove_prefill(self, now_s: float, ticket: int, tokens: int) -> None:
        """Take a prefill off; when it was the head, the next one starts now."""
        if next(iter(self._prefill_s)) == ticket:
            self._head_start_s = now_s
        del self._prefill_s[ticket]
        self._sum_s = None
        self.prefill_tokens -= tokens


class Charge(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one ticket stands for. tokens: of the prompt, or of KV; seconds: of a prefill, predicted.

    is_batch: of the class that uses what others leave idle.
    """

    ticket: int
    instance_id: str
    is_prefill: bool
    seconds: float
    tokens: int
    is_batch: bool = False


class _Charged(msgspec.Struct, frozen=True):
    """Holds the Load itself: after a restart the instance has a fresh one, this one is nobody's."""

    load: Load
    charge: Charge


class _Instance:
    def __init__(self, record: InstanceRecord) -> None:
        self.record = record
        self.health = Health.DEAD
        self.linked = False
        self.heard_s = 0.0
        self.forgiven = 0
        self.load = Load()


class ClusterView:
    """A new instance is DEAD; link_up makes it SUSPECT; its first pulse makes it ALIVE."""

    def __init__(self) -> None:
        """Empty."""
        self._instances: dict[str, _Instance] = {}
        self._stores: dict[str, StoreRecord] = {}
        self._alive: list[tuple[InstanceRecord, Load]] | None = None  # None = to be looked for
        self._charges: dict[int, _Charged] = {}
        self._tickets = 0
        self._tick_s: float | None = None

    # ------------------------------------------------------------ events: membership and links

    def instance_up(self, now_s: float, record: InstanceRecord) -> list[Transition]:
        """A record was put. Another epoch under a known id = the engine restarted: the old one is lost.

        The same epoch again updates the record (a switched role) and keeps health and load.
        """
        known = self._instances.get(record.instance_id)
        if known is not None and known.record.epoch == record.epoch:
            known.record = record
            self._alive = None
            return []
        transitions = [] if known is None else self._set(now_s, known, Health.DEAD, "restarted")
        self._instances[record.instance_id] = _Instance(record)
        return transitions

    def instance_removed(self, now_s: float, instance_id: str) -> list[Transition]:
        """The record vanished (lease expired or deregistered)."""
        known = self._instances.pop(instance_id, None)
        return [] if known is None else self._set(now_s, known, Health.DEAD, "record removed")

    def link_up(self, now_s: float, instance_id: str) -> list[Transition]:
        """The relay said WELCOME."""
        known = self._instances.get(instance_id)
        if known is None or known.linked:
            return []
        known.linked = True
        known.heard_s = now_s
        return self._set(now_s, known, Health.SUSPECT, "link up")

    def link_down(self, now_s: float, instance_id: str) -> list[Transition]:
        """The socket to the relay broke, or the relay said DIED: DEAD at once."""
        known = self._instances.get(instance_id)
        if known is None:
            return []
        known.linked = False
        return self._set(now_s, known, Health.DEAD, "link down")

    def pulse(
        self, now_s: float, instance_id: str, engine_age_s: float, epoch: str | None = None
    ) -> list[Transition]:
        """A PONG came. Unknown instances, other epochs and unlinked instances are ignored.

        Args:
            now_s: when it was read.
            instance_id: who sent it.
            engine_age_s: age of the engine's own last sign of life, as its relay measured it.
            epoch: engine start it speaks of; None = of the current one.
        """
        known = self._instances.get(instance_id)
        if known is None or not known.linked or epoch not in {None, known.record.epoch}:
            return []
        known.heard_s = now_s
        known.forgiven = 0
        if engine_age_s > ENGINE_SILENCE_S:
            return self._set(now_s, known, Health.SUSPECT, f"engine silent for {engine_age_s:.2f} s")
        return self._set(now_s, known, Health.ALIVE, "pulse")

    def tick(self, now_s: float) -> list[Transition]:
        """Call every PULSE_S: judges silence, unless our own tick was late."""
        late = self._tick_s is not None and now_s - self._tick_s - PULSE_S > TICK_LATE_S
        self._tick_s = now_s
        transitions: list[Transition] = []
        for known in self._instances.values():
            if known.health is not Health.ALIVE:
                continue
            if late and known.forgiven < FORGIVEN_MAX:
                known.heard_s = now_s
                known.forgiven += 1
            silence_s = now_s - known.heard_s
            if silence_s > SILENCE_S:
                transitions += self._set(now_s, known, Health.SUSPECT, f"silent for {silence_s:.2f} s")
        return transitions

    def store_up(self, record: StoreRecord) -> None:
        """A store node's record was put."""
        self._stores[record.node] = record

    def store_removed(self, node: str) -> None:
        """A store node's record vanished."""
        self._stores.pop(node, None)

    # ------------------------------------------------------------ questions

    def record(self, instance_id: str) -> InstanceRecord | None:
        """Return what the instance says of itself, if it is known."""
        known = self._instances.get(instance_id)
        return None if known is None else known.record

    def health(self, instance_id: str) -> Health:
        """Return an instance's health; unknown ones are DEAD."""
        known = self._instances.get(instance_id)
        return Health.DEAD if known is None else known.health

    def load(self, instance_id: str) -> Load:
        """Return an instance's load; of unknown ones, an idle one."""
        known = self._instances.get(instance_id)
        return Load() if known is None else known.load

    def instances(self) -> Iterator[tuple[InstanceRecord, Health, Load]]:
        """Iterate over all known instances in the order they came."""
        for known in self._instances.values():
            yield known.record, known.health, known.load

    def alive(self) -> list[tuple[InstanceRecord, Load]]:
        """Return the instances that take work, sorted by id; the same list until that changes."""
        if self._alive is None:
            found = [(i.record, i.load) for i in self._instances.values() if i.health is Health.ALIVE]
            self._alive = sorted(found, key=lambda pair: pair[0].instance_id)
        return self._alive

    def stores(self) -> list[StoreRecord]:
        """Return the known store nodes, sorted by node."""
        return sorted(self._stores.values(), key=lambda record: record.node)

    def is_open(self, node: str) -> bool:
        """Return whether the node's store copies blocks from and to those of other hosts."""
        store = self._stores.get(node)
        return store is not None and bool(store.transfer)

    @property
    def charged(self) -> int:
        """Tickets not yet given back."""
        return len(self._charges)

    # ------------------------------------------------------------ load

    def charge_prefill(self, now_s: float, instance_id: str, seconds: float, tokens: int) -> int:
        """Queue a predicted prefill on a known instance; returns its ticket (> 0)."""
        self._tickets += 1
        return self.adopt(now_s, Charge(self._tickets, instance_id, True, seconds, tokens))

    def charge_decode(self, instance_id: str, kv_tokens: int, *, is_batch: bool = False) -> int:
        """Count a running request and the KV tokens it will hold; returns its ticket (> 0)."""
        self._tickets += 1
        return self.adopt(0.0, Charge(self._tickets, instance_id, False, 0.0, kv_tokens, is_batch))

    def adopt(self, now_s: float, charge: Charge) -> int:
        """Charge what somebody else has planned on a known instance, under its ticket, which is returned."""
        load = self._instances[charge.instance_id].load
        self._charges[charge.ticket] = _Charged(load, charge)
        if charge.is_prefill:
            load.add_prefill(now_s, charge.ticket, charge.seconds, charge.tokens)
        else:
            load.decode_requests += 1
            load.decode_kv_tokens += charge.tokens
            if charge.is_batch:
                load.batch_requests += 1
                load.batch_kv_tokens += charge.tokens
        return charge.ticket

    def take_over(self, now_s: float, charge: Charge) -> int:
        """Charge the same under a ticket of our own; 0 where the instance is not known."""
        if charge.instance_id not in self._instances:
            return 0
        self._tickets += 1
        return self.adopt(now_s, msgspec.structs.replace(charge, ticket=self._tickets))

    def number_from(self, ticket: int) -> None:
        """Let tickets be greater than `ticket` from now on."""
        self._tickets = max(self._tickets, ticket)

    def charge(self, ticket: int) -> Charge | None:
        """Return what a ticket stands for that is not given back."""
        held = self._charges.get(ticket)
        return None if held is None else held.charge

    def charges(self) -> list[Charge]:
        """Return what is charged to current starts of instances, in the order in which it came."""
        found = []
        for held in self._charges.values():
            known = self._instances.get(held.charge.instance_id)
            if known is not None and known.load is held.load:
                found.append(held.charge)
        return found

    def release(self, now_s: float, ticket: int) -> None:
        """Give charged load back; 0 and tickets given back before are ignored (idempotent)."""
        held = self._charges.pop(ticket, None)
        if held is None:
            return
        if held.charge.is_prefill:
            held.load.remove_prefill(now_s, ticket, held.charge.tokens)
        else:
            held.load.decode_requests -= 1
            held.load.decode_kv_tokens -= held.charge.tokens
            if held.charge.is_batch:
                held.load.batch_requests -= 1
                held.load.batch_kv_tokens -= held.charge.tokens

    def _set(self, now_s: float, known: _Instance, health: Health, reason: str) -> list[Transition]:
        before, known.health = known.health, health
        if before is health:
            return []
        self._alive = None
        return [Transition(known.record.instance_id, before, health, reason, now_s)]
