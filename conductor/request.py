"""The two-leg state machine of one client request (DESIGN 2.3, 5 and "Failure").

    PLANNED --start--> PREFILLING --leg 1 done--> DECODING --finish--> DONE
       |                  ^ | leg 1 lost: again      ^ | lost: move with what was emitted
       |                  '-'           place found  | v
       '---- start without leg 1 ----> DECODING    REPLANNING

The shell carries out commands in order; it tells ClusterView first and machines second, so that a
Replan sees the loss. Commands carry request_ids: an event of one child may move its siblings.
Every leg has its own engine-side id (`rid#p1`, `rid#d2`): an output of a leg that was aborted, or of
an instance wrongly taken for dead, is answered with Stale. A lost leg is also aborted, best effort:
an instance that was only stopped finds the abort in its queue when it wakes.
"""

from collections.abc import Sequence
from enum import StrEnum

from conductor.plan import (
    Abort,
    Command,
    Deliver,
    Done,
    Fail,
    Leg,
    Need,
    Outcome,
    Plan,
    Rejection,
    Release,
    Replan,
    RequestFacts,
    Send,
    Stale,
)

PREFILL_ATTEMPTS_MAX = 4
"""Engines one leg 1 may try: a prompt that broke four engines is more likely the cause than they."""
DECODE_ERRORS_MAX = 4
"""Legs 2 that may end in an error (KV load failure), for the same reason."""
MIGRATIONS_MAX = 16
"""Instances a stream may lose: rolling restarts of a large cluster, not an endless chase."""
REPLAN_REJECTIONS_MAX = 20
"""Times a replan may find nobody; with the delays below a stream survives about 10 s of that."""
OVERRUN = "the gateway is overloaded: outputs wait unread"
"""Why a request fails whose front end does not keep up."""
REPLAN_DELAY_MIN_S = 0.1
REPLAN_DELAY_MAX_S = 0.5
"""Bounds of the wait between rejected replans."""
ENGINE_FAILED = frozenset({"error", "abort"})
"""Finish reasons that no request asked for: an abort of ours makes the leg's outputs stale first."""


class State(StrEnum):
    """Where a request stands."""

    PLANNED = "planned"  # made, not started
    PREFILLING = "prefilling"  # leg 1 runs, or is being placed again
    REPLANNING = "replanning"  # no leg runs; waiting for a place for leg 2
    DECODING = "decoding"  # leg 2 (or the whole leg) runs
    DONE = "done"


class _Phase(StrEnum):
    """Where a leg 1 stands."""

    IDLE = "idle"
    RUNNING = "running"
    REPLANNING = "replanning"
    PASSED = "passed"
    SKIPPED = "skipped"  # nobody left to prefill: decode instances do all
    FAILED = "failed"


def request_id_of(eid: str) -> str:
    """Return the request (or group) id inside an engine-side id."""
    return eid.rpartition("#")[0]


def _delay_s(rejection: Rejection) -> float:
    return min(max(rejection.retry_after_s, REPLAN_DELAY_MIN_S), REPLAN_DELAY_MAX_S)


def _releases(request_id: str, *tickets: int) -> list[Command]:
    return [Release(request_id, ticket) for ticket in tickets if ticket]


class PrefillGroup:
    """One leg 1 shared by machines with the same prompt (n>1); engine ids are group_id#p<attempt>.

    Leg 1 is sent with the first child, retried once for all, aborted when the last child goes.
    """

    def __init__(self, group_id: str) -> None:
        """`group_id` is the parent request's id; of a lone request, its own."""
        self.group_id = group_id
        self._phase = _Phase.IDLE
        self._members: list[RequestMachine] = []
        self._eid = ""
        self._instance_id = ""
        self._ticket = 0
        self._tokens: list[int] = []
        self._attempts = 0
        self._rejections = 0
        self._excluded: list[str] = []
        self._failure = ""

    @property
    def eid(self) -> str | None:
        """Engine-side id of the running leg 1."""
        return self._eid if self._phase is _Phase.RUNNING else None

    def join(self, machine: "RequestMachine", plan: Plan) -> list[Command]:
        """A child starts: send leg 1, or wait for the one that runs, or use its result."""
        assert plan.prefill is not None
        rid = machine.facts.request_id
        if self._phase is _Phase.IDLE:
            self._members.append(machine)
            return self._send(rid, plan.prefill, plan.prefill_ticket)
        unused = _releases(rid, plan.prefill_ticket)
        if self._phase in {_Phase.RUNNING, _Phase.REPLANNING}:
            self._members.append(machine)
            return unused
        if self._phase is _Phase.FAILED:
            return unused + machine.fail(self._failure, retryable=True)
        passed = self._phase is _Phase.PASSED
        return unused + (machine.prefill_passed([], None) if passed else machine.next_leg())

    def leave(self, machine: "RequestMachine") -> list[Command]:
        """A child goes; the last one takes leg 1 with it."""
        self._members = [member for member in self._members if member is not machine]
        if self._members or self._phase is not _Phase.RUNNING:
            return []
        self._phase = _Phase.IDLE
        return self._drop_leg(machine.facts.request_id)

    def output(
        self, machine: "RequestMachine", eid: str, tokens: Sequence[int], finish: str | None
    ) -> list[Command]:
        """Leg 1 said something."""
        rid = machine.facts.request_id
        if eid != self.eid:
            return [Stale(rid, eid)]
        if finish is None:
            self._tokens.extend(tokens)
            return []
        commands = _releases(rid, self._ticket)
        if finish in ENGINE_FAILED:
            return commands + self._retry(rid, f"prefill on {self._instance_id} ended with {finish}")
        self._phase = _Phase.PASSED
        self._tokens.extend(tokens)
        for member in self._part():
            commands += member.prefill_passed(self._tokens, finish)
        return commands

    def instance_lost(self, machine: "RequestMachine", instance_id: str) -> list[Command]:
        """An instance went: retry if leg 1 ran there. Every child may report it; the first counts."""
        if self._phase is not _Phase.RUNNING or self._instance_id != instance_id:
            return []
        rid = machine.facts.request_id
        return self._drop_leg(rid) + self._retry(rid, f"prefill instance {instance_id} was lost")

    def plan_result(self, machine: "RequestMachine", answer: Plan | Rejection) -> list[Command]:
        """Answer to the group's Replan, through whichever child asked."""
        rid, waiting = machine.facts.request_id, self._phase is _Phase.REPLANNING
        if waiting and not self._members:  # all left meanwhile
            self._phase, waiting = _Phase.IDLE, False
        if isinstance(answer, Rejection):
            if not waiting:
                return []
            self._rejections += 1
            if self._rejections > REPLAN_REJECTIONS_MAX:
                return self._fail(str(answer.reason))
            return [self._replan(_delay_s(answer))]
        if not waiting:
            return _releases(rid, answer.prefill_ticket, answer.decode_ticket)
        commands = _releases(rid, answer.decode_ticket)  # the children have their own places
        if answer.prefill is not None:
            return commands + self._send(rid, answer.prefill, answer.prefill_ticket)
        self._phase = _Phase.SKIPPED
        commands += _releases(rid, answer.prefill_ticket)
        for member in self._part():
            commands += member.next_leg()  # on its own decode instance, which does all
        return commands

    def _send(self, rid: str, instance_id: str, ticket: int) -> list[Command]:
        self._attempts += 1
        self._phase = _Phase.RUNNING
        self._eid = f"{self.group_id}#p{self._attempts}"
        self._instance_id, self._ticket = instance_id, ticket
        self._tokens = []
        return [Send(rid, self._eid, Leg.PREFILL, instance_id, 0)]

    def _drop_leg(self, rid: str) -> list[Command]:
        return [Abort(rid, self._eid, self._instance_id), *_releases(rid, self._ticket)]

    def _retry(self, rid: str, why: str) -> list[Command]:
        assert self._members, f"{rid}: leg 1 ran for nobody"
        self._excluded.append(self._instance_id)
        if self._attempts >= PREFILL_ATTEMPTS_MAX:
            return self._fail(f"{why}, after {self._attempts} attempts")
        self._phase = _Phase.REPLANNING
        return [self._replan(0.0)]

    def _replan(self, delay_s: float) -> Replan:
        asks = self._members[0].facts.request_id
        return Replan(asks, Need.PREFILL, 0, tuple(self._excluded), delay_s)

    def _fail(self, reason: str) -> list[Command]:
        self._phase = _Phase.FAILED
        self._failure = reason
        commands: list[Command] = []
        for member in self._part():
            commands += member.fail(reason, retryable=True)
        return commands

    def _part(self) -> "list[RequestMachine]":
        members, self._members = self._members, []
        return members


class RequestMachine:
    """One client request. Every event returns commands; every path ends in one Done."""

    def __init__(self, facts: RequestFacts, group: PrefillGroup | None = None) -> None:
        """`group`: share leg 1 with siblings (never together with facts.first_token)."""
        # siblings need different samples: one leg 1 has only one token to give
        assert group is None or not facts.first_token
        self.facts = facts
        self.state = State.PLANNED
        self.emitted_n = 0
        self._group = group or PrefillGroup(facts.request_id)
        self._prefilled = False
        self._eid = ""
        self._place: str | None = None  # where leg 2 is to run, or runs
        self._decode_ticket = 0
        self._work_ticket = 0  # prefill work of leg 2 itself, until its first token
        self._legs = 0
        self._errors = 0
        self._migrations = 0
        self._rejections = 0
        self._excluded: list[str] = []

    # ------------------------------------------------------------ events

    def start(self, plan: Plan) -> list[Command]:
        """Begin with an accepted plan. On a machine already DONE, only gives its load back."""
        if self.state is State.DONE:
            return _releases(self.facts.request_id, plan.prefill_ticket, plan.decode_ticket)
        assert self.state is State.PLANNED
        self._place, self._decode_ticket = plan.decode, plan.decode_ticket
        if plan.prefill is None:
            self._work_ticket = plan.prefill_ticket
            return self.next_leg()
        self.state = State.PREFILLING
        return self._group.join(self, plan)

    def prefill_output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Leg 1 said something. Feed it to ONE machine of a group: it moves all."""
        return self._group.output(self, eid, new_tokens, finish)

    def decode_output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Leg 2 or a whole leg said something; new_tokens are those after what was emitted."""
        if self.state is not State.DECODING or eid != self._eid:
            return [Stale(self.facts.request_id, eid)]
        if finish in ENGINE_FAILED:
            return self._decode_failed(str(finish))
        if not new_tokens and finish is None:
            return []
        commands = self._release_work()
        self.emitted_n += len(new_tokens)
        commands.append(Deliver(self.facts.request_id, list(new_tokens), finish, self._leg))
        if finish is not None:
            commands += self._end(Outcome.FINISHED)
        return commands

    def output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Route by eid to prefill_output or decode_output."""
        if eid == self._group.eid:
            return self.prefill_output(eid, new_tokens, finish)
        return self.decode_output(eid, new_tokens, finish)

    def instance_lost(self, instance_id: str) -> list[Command]:
        """An instance is suspect or dead (Transition.lost)."""
        if self.state is State.PREFILLING:
            return self.leave_place(instance_id) + self._group.instance_lost(self, instance_id)
        if self.state is not State.DECODING or self._place != instance_id:
            return []
        commands = [Abort(self.facts.request_id, self._eid, instance_id), *self._release_place()]
        self._excluded.append(instance_id)
        self._migrations += 1
        if self._migrations > MIGRATIONS_MAX:
            return commands + self.fail(f"lost {self._migrations} instances", retryable=True)
        return commands + self.next_leg()

    def leave_place(self, instance_id: str) -> list[Command]:
        """Give up a place for leg 2 that is not used yet: the instance takes nothing new."""
        if self.state is not State.PREFILLING or self._place != instance_id:
            return []
        # leg 2 gets another place when leg 1 is done, since by then the load is known better
        self._excluded.append(instance_id)
        return self._release_place()

    def plan_result(self, need: Need, answer: Plan | Rejection) -> list[Command]:
        """Answer to a Replan, also to one that nobody waits for any more."""
        if need is Need.PREFILL:
            return self._group.plan_result(self, answer)
        waiting = self.state is State.REPLANNING
        if isinstance(answer, Rejection):
            if not waiting:
                return []
            self._rejections += 1
            if self._rejections > REPLAN_REJECTIONS_MAX:
                return self.fail(str(answer.reason), retryable=True)
            return [self._replan(_delay_s(answer))]
        if not waiting:
            return _releases(self.facts.request_id, answer.prefill_ticket, answer.decode_ticket)
        assert answer.prefill is None
        assert answer.decode is not None
        self._place, self._decode_ticket = answer.decode, answer.decode_ticket
        self._work_ticket = answer.prefill_ticket
        return self.next_leg()

    def abort(self) -> list[Command]:
        """The client left."""
        return [] if self.state is State.DONE else self._stop_legs() + self._end(Outcome.ABORTED)

    def deadline(self) -> list[Command]:
        """The request's time is up: Fail."""
        return self._give_up("deadline exceeded", retryable=False)

    def overrun(self) -> list[Command]:
        """An output was dropped because nobody reads them: a stream with a hole must not go on."""
        return self._give_up(OVERRUN, retryable=True)

    # ------------------------------------------------------------ steps, some taken by the group

    def prefill_passed(self, tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Leg 1 is done: the prompt's KV is in the pool."""
        self._prefilled = True
        if not self.facts.first_token or not tokens:
            return self.next_leg()
        self.emitted_n += len(tokens)
        # leg 1 always ends by length at one token; that is the request's own end only at max_tokens
        over = finish != "length" or self.emitted_n >= self.facts.max_tokens
        deliver = Deliver(self.facts.request_id, list(tokens), finish if over else None, Leg.PREFILL)
        return [deliver, *(self._end(Outcome.FINISHED) if over else self.next_leg())]

    @property
    def _leg(self) -> Leg:
        return Leg.DECODE if self._prefilled else Leg.WHOLE

    def next_leg(self) -> list[Command]:
        """Send leg 2 (or the whole leg), or ask where to."""
        rid = self.facts.request_id
        if self.emitted_n and self.emitted_n >= self.facts.max_tokens:
            # the engine was lost between the last token and its finish: nothing is left to compute
            return [Deliver(rid, [], "length", self._leg), *self._end(Outcome.FINISHED)]
        if self._place is None:
            self.state = State.REPLANNING
            return [self._replan(0.0)]
        self.state = State.DECODING
        self._legs += 1
        self._eid = f"{rid}#d{self._legs}"
        return [Send(rid, self._eid, self._leg, self._place, self.emitted_n)]

    def _decode_failed(self, finish: str) -> list[Command]:
        assert self._place is not None
        failed = self._place
        commands = self._release_place()
        self._excluded.append(failed)
        self._errors += 1
        if self._errors >= DECODE_ERRORS_MAX:
            why = f"{self._leg} on {failed} ended with {finish}, after {self._errors} attempts"
            return commands + self.fail(why, retryable=True)
        return commands + self.next_leg()

    def _replan(self, delay_s: float) -> Replan:
        rid, exclude = self.facts.request_id, tuple(self._excluded)
        return Replan(rid, Need.DECODE, self.emitted_n, exclude, delay_s)

    def _stop_legs(self) -> list[Command]:
        if self.state is State.PREFILLING:
            return self._group.leave(self)
        if self.state is State.DECODING:
            assert self._place is not None
            return [Abort(self.facts.request_id, self._eid, self._place)]
        return []

    def _give_up(self, reason: str, *, retryable: bool) -> list[Command]:
        if self.state is State.DONE:
            return []
        return self._stop_legs() + self.fail(reason, retryable=retryable)

    def _release_work(self) -> list[Command]:
        ticket, self._work_ticket = self._work_ticket, 0
        return _releases(self.facts.request_id, ticket)

    def _release_place(self) -> list[Command]:
        ticket, self._decode_ticket = self._decode_ticket, 0
        self._place = None
        return self._release_work() + _releases(self.facts.request_id, ticket)

    def fail(self, reason: str, *, retryable: bool) -> list[Command]:
        """End here; what is charged is given back."""
        return [Fail(self.facts.request_id, reason, retryable), *self._end(Outcome.FAILED)]

    def _end(self, outcome: Outcome) -> list[Command]:
        commands = self._release_place()
        self.state = State.DONE
        return [*commands, Done(self.facts.request_id, outcome)]
