"""Whether to take a request, by the load of the decode instances it will meet (arXiv 2407.00079 v3, 7).

Load is 1 where an instance (or the mean one of a pool) reaches the objective of time between tokens, or its
KV room.

    objectives  the chosen instances' predictions, on arrival (FAST'25, Algorithm 1)
    late        time to first token on arrival, decode load when the prompt is done: prefill may be wasted
    early       decode load on arrival too, as it is now: a prefill too early, so both pools' loads see-saw
    predicted   decode load as it will be when the prompt is done. With t_d given, the paper's: the pool, in
                which those done by then have come and those that have decoded for t_d have gone. Without,
                the chosen instance, in which everybody is with the chance that answers so old are known
                to stay so long, and MARGIN deviations of that sum are kept free; see also `prompt_load`

All but `objectives` ask a second time when the prompt is done. What is asked here was charged by tickets
(see ClusterView), so the giving back of tickets is all that has to be told.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from math import ceil, sqrt

from conductor.cost import CostModel
from conductor.stays import Stays

DECODE_S_PRIOR = 10.0
"""Of an answer, until one was measured: 256 tokens at 40 ms."""
MARGIN = 1.0
"""Standard deviations of the predicted KV: of prompts at the edge, one in six finds no room when done."""
SHEDDABLE_ROOM = 0.9
"""Share of the decode room that sheddable classes may fill: the rest is for those who come after them."""
DISPLACED_MAX = 4.0
"""Prompts displaced times prompts waiting that a prompt may cost: behind four, only what is no dearer than
the mean one; behind one, four times as much."""
SCARCE = 0.05
"""Share of requests without decode room from which on what is displaced is lost, not late: less is bursts."""
MEMORY_REQUESTS = 512.0
"""Of what a prompt takes in the mean, and of who is refused: a minute or more, as pools take turns to be
the narrow one for that long."""


class AdmissionMode(StrEnum):
    """When decode load is asked for; see the module."""

    OBJECTIVES = "objectives"
    LATE = "late"
    EARLY = "early"
    PREDICTED = "predicted"


class _Flight:
    """A request between its plan and its end; started_s < 0 until its prompt is done."""

    __slots__ = ("instance_id", "kv_tokens", "ready_s", "refused", "started_s")

    def __init__(self, instance_id: str, ready_s: float, kv_tokens: int) -> None:
        self.instance_id = instance_id
        self.ready_s = ready_s
        self.kv_tokens = kv_tokens
        self.started_s = -1.0
        self.refused = False


class Admission:
    """Pure. Asks about what was planned and is not over; constant work per ticket, linear per question."""

    def __init__(
        self,
        mode: AdmissionMode,
        tbt_slo_s: float | None,
        decode_s: float | None,
        cost: CostModel,
        margin: float = MARGIN,
    ) -> None:
        """`tbt_slo_s` None: only KV room counts. `decode_s` None: how long answers stay is learned."""
        self._mode = mode
        self._tbt_slo_s = tbt_slo_s
        self._given_s = decode_s
        self._margin = margin
        self._stays = Stays(DECODE_S_PRIOR)
        self._cost = cost
        self._asked = 0.0  # up to MEMORY_REQUESTS
        self._work_s = 0.0  # mean of their prompts
        self._refused = 0.0  # share of them that found no decode room
        self._prompts: dict[int, _Flight] = {}  # by prefill ticket, until the prompt is done
        self._flights: dict[int, _Flight] = {}  # by decode ticket
        self._by_instance: dict[str, dict[int, _Flight]] = {}

    def change(
        self, mode: AdmissionMode, tbt_slo_s: float | None, decode_s: float | None, margin: float = MARGIN
    ) -> None:
        """Ask by these from now on, of what is in flight too; what was learned stays."""
        self._mode = mode
        self._tbt_slo_s = tbt_slo_s
        self._given_s = decode_s
        self._margin = margin

    @property
    def decode_s(self) -> float:
        """How long an answer is taken to be decoded (t_d)."""
        return self._stays.mean_s if self._given_s is None else self._given_s

    # ------------------------------------------------------------ what happens

    def planned(
        self, prefill_ticket: int, decode_ticket: int, instance_id: str, ready_s: float, kv_tokens: int
    ) -> None:
        """A request was taken; its prompt should be done at `ready_s`."""
        flight = _Flight(instance_id, ready_s, kv_tokens)
        self._flights[decode_ticket] = flight
        self._by_instance.setdefault(instance_id, {})[decode_ticket] = flight
        self._prompts[prefill_ticket] = flight

    def released(self, now_s: float, ticket: int) -> None:
        """A ticket was given back: the prompt is done, or all is over. Unknown ones are fine."""
        prompt = self._prompts.pop(ticket, None)
        if prompt is not None:
            prompt.started_s = now_s
        flight = self._flights.pop(ticket, None)
        if flight is None:
            return
        own = self._by_instance[flight.instance_id]
        del own[ticket]
        if not own:
            del self._by_instance[flight.instance_id]
        if flight.started_s >= 0 and not flight.refused:
            self._stays.ended(now_s - flight.started_s)

    # ------------------------------------------------------------ questions

    def load_on_arrival(
        self,
        now_s: float,
        ready_s: float,
        instance_id: str,
        kv_tokens: int,
        rooms: Mapping[str, int],
        *,
        sheddable: bool = False,
    ) -> float:
        """Return the decode load with a new request; 0 if this mode does not ask on arrival.

        Args:
            now_s: the time.
            ready_s: when its prompt would be done.
            instance_id: where it would be decoded.
            kv_tokens: it will hold there.
            rooms: KV tokens that each instance holds of those that it could be decoded on.
            sheddable: its class may not fill all of the room.
        """
        share = SHEDDABLE_ROOM if sheddable else 1.0
        if self.prices_prompts:
            requests, tokens = self._forecast(now_s, max(now_s, ready_s), instance_id, kv_tokens)
            load = self._load(requests, tokens, 1, rooms[instance_id]) / share
            self._refused += ((load > 1) - self._refused) / max(self._asked, 1.0)
            return load
        if self._mode is AdmissionMode.EARLY:
            there = [flight for flight in self._flights.values() if flight.started_s >= 0]
        elif self._mode is AdmissionMode.PREDICTED:
            gone_s = ready_s - self.decode_s
            there = [flight for flight in self._flights.values() if gone_s < _start_s(flight) <= ready_s]
        else:
            return 0.0
        tokens = kv_tokens + sum(flight.kv_tokens for flight in there)
        return self._load(len(there) + 1, tokens, len(rooms), max(1, sum(rooms.values()))) / share

    @property
    def prices_prompts(self) -> bool:
        """Whether `prompt_load` has to be asked."""
        return self._mode is AdmissionMode.PREDICTED and self._given_s is None

    def prompt_load(self, work_s: float, queue_s: float) -> float:
        """Return above 1 for a prompt that is too dear for so loaded a pool; learns what the mean one takes.

        While prompts queue, one that takes 20 times the mean's work keeps twenty others from the decode
        instances, whose load falls while that of prefill rises. Those are lost for good if decode room is
        scarce at other times; if it is not, they are only later, and the dear one is as good as they.

        Args:
            work_s: what the prompt takes, without the queue.
            queue_s: of the mean instance that prefills.
        """
        self._asked = min(self._asked + 1, MEMORY_REQUESTS)
        self._work_s += (work_s - self._work_s) / self._asked
        displaced, waiting = work_s / self._work_s, queue_s / self._work_s
        return displaced * waiting / DISPLACED_MAX * min(1.0, self._refused / SCARCE)

    def load_when_ready(self, decode_ticket: int, kv_tokens_max: int) -> float:
        """Return the load of its own decode instance, which has so much room, now that a prompt is done.

        0 if this mode does not ask a second time, or the request is over. Above 1, it is taken to be
        refused: that its tickets come back says nothing of answers.
        """
        own = self._flights.get(decode_ticket)
        if own is None or self._mode is AdmissionMode.OBJECTIVES:
            return 0.0
        there = [
            flight
            for flight in self._by_instance[own.instance_id].values()
            if flight.started_s >= 0 and flight is not own
        ]
        kv_tokens = own.kv_tokens + sum(flight.kv_tokens for flight in there)
        load = self._load(len(there) + 1, kv_tokens, 1, kv_tokens_max)
        if load > 1:
            own.refused = True
            self._refused += (1 - self._refused) / max(self._asked, 1.0)
        return load

    def __len__(self) -> int:
        return len(self._flights)

    def _forecast(
        self, now_s: float, ready_s: float, instance_id: str, kv_tokens: int
    ) -> tuple[float, float]:
        """Return requests and KV tokens on an instance at `ready_s`: the mean, and the margin."""
        if self._stays.is_old(now_s):
            self._stays.refresh(now_s, _ages_s(now_s, self._flights.values()))
        requests, tokens, variance = 1.0, float(kv_tokens), 0.0
        for flight in self._by_instance.get(instance_id, {}).values():
            if flight.started_s >= 0:
                chance = self._stays.chance(now_s - flight.started_s, ready_s - now_s)
            else:
                begin_s = max(flight.ready_s, now_s)
                if begin_s > ready_s:
                    continue  # it comes later, and asks then
                chance = self._stays.chance(0.0, ready_s - begin_s)
            requests += chance
            tokens += flight.kv_tokens * chance
            variance += flight.kv_tokens**2 * chance * (1 - chance)
        high = tokens + self._margin * sqrt(variance)
        return requests * high / tokens, high

    def _load(self, requests: float, kv_tokens: float, instances: int, room_tokens: int) -> float:
        load = kv_tokens / room_tokens
        if self._tbt_slo_s is not None:
            tbt_s = self._cost.tbt_s(ceil(requests / instances), int(kv_tokens) // instances)
            load = max(load, tbt_s / self._tbt_slo_s)
        return load


def _start_s(flight: _Flight) -> float:
    return flight.started_s if flight.started_s >= 0 else flight.ready_s


def _ages_s(now_s: float, flights: Iterable[_Flight]) -> Iterable[float]:
    return (now_s - flight.started_s for flight in flights if flight.started_s >= 0 and not flight.refused)
