"""The two-leg state machine of one client request (DESIGN 2.3, 5 and "Failure").

    machine = RequestMachine(facts)                # n>1: RequestMachine(facts, group) per child
    for command in machine.start(plan): ...        # the shell carries out commands in order

The shell tells ClusterView first and the machines second, so that a Replan sees the loss. Commands
carry their request_id: with a shared PrefillGroup an event of one child may move its siblings.
"""

from collections.abc import Sequence
from enum import StrEnum

from conductor.plan import Command, Need, Plan, Rejection, RequestFacts


class State(StrEnum):
    """Where a request stands."""

    PLANNED = "planned"  # made, not started
    PREFILLING = "prefilling"  # leg 1 runs, or is being placed again
    REPLANNING = "replanning"  # no leg runs; waiting for a place for leg 2
    DECODING = "decoding"  # leg 2 (or the whole leg) runs
    DONE = "done"


def request_id_of(eid: str) -> str:
    """Return the request (or group) id inside an engine-side id."""
    return eid.rpartition("#")[0]


class PrefillGroup:
    """One leg 1 shared by machines with the same prompt (n>1); engine ids are group_id#p<attempt>.

    Leg 1 is sent with the first child, retried once for all, aborted when the last child goes.
    """

    def __init__(self, group_id: str) -> None:
        """`group_id` is the parent request's id; of a lone request, its own."""
        self.group_id = group_id


class RequestMachine:
    """One client request. Every event returns commands; every path ends in one Done."""

    def __init__(self, facts: RequestFacts, group: PrefillGroup | None = None) -> None:
        """`group`: share leg 1 with siblings (never together with facts.first_token)."""
        self.facts = facts
        self.state = State.PLANNED
        self.emitted_n = 0

    def start(self, plan: Plan) -> list[Command]:
        """Begin with an accepted plan. Once."""
        raise NotImplementedError

    def prefill_output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Leg 1 said something. Feed it to ONE machine of a group: it moves all."""
        raise NotImplementedError

    def decode_output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Leg 2 or a whole leg said something."""
        raise NotImplementedError

    def output(self, eid: str, new_tokens: Sequence[int], finish: str | None) -> list[Command]:
        """Route by eid to prefill_output or decode_output."""
        raise NotImplementedError

    def instance_lost(self, instance_id: str) -> list[Command]:
        """An instance is suspect or dead (Transition.lost)."""
        raise NotImplementedError

    def plan_result(self, need: Need, answer: Plan | Rejection) -> list[Command]:
        """Answer to a Replan."""
        raise NotImplementedError

    def abort(self) -> list[Command]:
        """The client left."""
        raise NotImplementedError

    def deadline(self) -> list[Command]:
        """The request's time is up: Fail."""
        raise NotImplementedError
