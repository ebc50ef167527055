"""Whether to take a request, by the load of the decode instances it will meet (arXiv 2407.00079 v3, 7).

Load of the pool is 1 where its mean instance reaches the objective of time between tokens, or its KV room.

    objectives  the chosen instances' predictions, on arrival (FAST'25, Algorithm 1)
    late        time to first token on arrival, decode load when the prompt is done: prefill may be wasted
    early       decode load on arrival too, as it is now: a prefill too early, so both pools' loads see-saw
    predicted   decode load as it will be when the prompt is done: those done by then come, and those that
                have decoded for t_d go. t_d is given, or the moving mean of what was measured

All but `objectives` ask a second time when the prompt is done. What is asked here was charged by tickets
(see ClusterView), so the giving back of tickets is all that has to be told.
"""

from enum import StrEnum

import msgspec

from conductor.cost import EWMA_WEIGHT, CostModel

DECODE_S_PRIOR = 10.0
"""Of an answer, until one was measured: 256 tokens at 40 ms."""


class AdmissionMode(StrEnum):
    """When decode load is asked for; see the module."""

    OBJECTIVES = "objectives"
    LATE = "late"
    EARLY = "early"
    PREDICTED = "predicted"


class Room(msgspec.Struct, frozen=True):
    """What decodes: so many instances with so many tokens of KV in all."""

    instances: int
    kv_tokens: int


class _Flight:
    """A request between its plan and its end; started_s < 0 until its prompt is done."""

    __slots__ = ("instance_id", "kv_tokens", "ready_s", "started_s")

    def __init__(self, instance_id: str, ready_s: float, kv_tokens: int) -> None:
        self.instance_id = instance_id
        self.ready_s = ready_s
        self.kv_tokens = kv_tokens
        self.started_s = -1.0


class Admission:
    """Pure. Asks about what was planned and is not over; constant work per ticket, linear per question."""

    def __init__(
        self, mode: AdmissionMode, tbt_slo_s: float | None, decode_s: float | None, cost: CostModel
    ) -> None:
        """`tbt_slo_s` None: only KV room counts. `decode_s` None: t_d is learned."""
        self._mode = mode
        self._tbt_slo_s = tbt_slo_s
        self._given_s = decode_s
        self._learned_s = DECODE_S_PRIOR
        self._cost = cost
        self._prompts: dict[int, _Flight] = {}  # by prefill ticket, until the prompt is done
        self._flights: dict[int, _Flight] = {}  # by decode ticket

    @property
    def decode_s(self) -> float:
        """How long an answer is taken to be decoded (t_d)."""
        return self._learned_s if self._given_s is None else self._given_s

    # ------------------------------------------------------------ what happens

    def planned(
        self, prefill_ticket: int, decode_ticket: int, instance_id: str, ready_s: float, kv_tokens: int
    ) -> None:
        """A request was taken; its prompt should be done at `ready_s`."""
        if self._mode is AdmissionMode.OBJECTIVES:
            return  # nobody asks
        flight = _Flight(instance_id, ready_s, kv_tokens)
        self._flights[decode_ticket] = flight
        self._prompts[prefill_ticket] = flight

    def released(self, now_s: float, ticket: int) -> None:
        """A ticket was given back: the prompt is done, or all is over. Unknown ones are fine."""
        prompt = self._prompts.pop(ticket, None)
        if prompt is not None:
            prompt.started_s = now_s
        flight = self._flights.pop(ticket, None)
        if flight is not None and flight.started_s >= 0:
            self._learned_s += (now_s - flight.started_s - self._learned_s) * EWMA_WEIGHT

    # ------------------------------------------------------------ questions

    def load_on_arrival(self, ready_s: float, kv_tokens: int, room: Room) -> float:
        """Return the decode pool's load with a new request whose prompt would be done at `ready_s`.

        0 if this mode does not ask on arrival.
        """
        if self._mode is AdmissionMode.EARLY:
            there = [flight for flight in self._flights.values() if flight.started_s >= 0]
        elif self._mode is AdmissionMode.PREDICTED:
            gone_s = ready_s - self.decode_s
            there = [flight for flight in self._flights.values() if gone_s < _start_s(flight) <= ready_s]
        else:
            return 0.0
        return self._load(len(there) + 1, sum(flight.kv_tokens for flight in there) + kv_tokens, room)

    def load_when_ready(self, decode_ticket: int, kv_tokens_max: int) -> float:
        """Return the load of its own decode instance, which has so much room, now that a prompt is done.

        0 if this mode does not ask a second time, or the request is over.
        """
        own = self._flights.get(decode_ticket)
        if own is None or self._mode is AdmissionMode.OBJECTIVES:
            return 0.0
        there = [
            flight
            for flight in self._flights.values()
            if flight.instance_id == own.instance_id and flight.started_s >= 0 and flight is not own
        ]
        kv_tokens = own.kv_tokens + sum(flight.kv_tokens for flight in there)
        return self._load(len(there) + 1, kv_tokens, Room(1, kv_tokens_max))

    def __len__(self) -> int:
        return len(self._flights)

    def _load(self, requests: int, kv_tokens: int, room: Room) -> float:
        load = kv_tokens / room.kv_tokens
        if self._tbt_slo_s is not None:
            tbt_s = self._cost.tbt_s(-(-requests // room.instances), kv_tokens // room.instances)
            load = max(load, tbt_s / self._tbt_slo_s)
        return load


def _start_s(flight: _Flight) -> float:
    return flight.started_s if flight.started_s >= 0 else flight.ready_s
