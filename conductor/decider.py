"""The seam between a gateway's dispatcher and whoever decides: in this process, or over rpc (DESIGN 4).

`LocalDecider` answers at once, by what this process knows; `RemoteCore` asks the cluster's decision core. A
dispatcher never waits for either: what is not answered in the call is answered by a callback, from the loop,
exactly once unless the request is said to be over before.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from conductor.plan import Need, Plan, Rejection, RequestFacts
from conductor.terms import Terms
from mooncake.core.messages import Pulse

Answered = Callable[[Plan | Rejection], None]
"""Takes an answer. A plan's tickets are then the taker's: each is given back once."""
Checked = Callable[[Rejection | None], None]
"""Takes what came of a second check; None: go on."""


class Asked(Protocol):
    """One request, as the policy may know it."""

    @property
    def request_id(self) -> str:
        """Of this answer, where a request has several (n > 1)."""
        ...

    @property
    def client_id(self) -> str:
        """The id in the client's answer."""
        ...

    @property
    def names(self) -> dict[str, str]:
        """What log lines call it: request_id, and trace_id if there is one."""
        ...

    @property
    def trace(self) -> str:
        """The span of its decision (mooncake.core.tracing); "" = it is not traced."""
        ...

    @property
    def terms(self) -> Terms:
        """What it asks of its service."""
        ...

    @property
    def started_s(self) -> float:
        """When it came (monotonic)."""
        ...

    @property
    def is_sibling(self) -> bool:
        """Whether it shares its prompt with one that was taken already (n > 1)."""
        ...

    @property
    def facts(self) -> RequestFacts:
        """As looked at last; before that without keys."""
        ...

    def look(self, root: str, block_size: int) -> RequestFacts:
        """Return its facts for engines of the context `root`, from now on `facts`."""
        ...

    def unnamed(self) -> str:
        """Return why nobody can name its blocks, when its facts have no keys."""
        ...


class Decider(Protocol):
    """What a dispatcher asks and tells. All on its event loop; nothing waits, nothing raises."""

    def offer(self, asked: Asked, later: Answered) -> Plan | Rejection | None:
        """Plan a new request: its answer, or None = `later` gets it.

        One that is rejected here and now is over; every other one is over by `ended`.
        """
        ...

    def hopeless(self, terms: Terms) -> Rejection | None:
        """Return why no prompt at all could be served in time; None: it has to be seen, or nobody knows."""
        ...

    def replan(
        self, asked: Asked, emitted_n: int, exclude: Sequence[str], need: Need, then: Answered
    ) -> None:
        """Place a leg of an accepted request again (Scheduler.replan); `then` always gets an answer."""
        ...

    def second_check(self, asked: Asked, plan: Plan, then: Checked) -> None:
        """Ask again when a plan's prompt is done, before it is decoded; `then` always gets an answer."""
        ...

    def release(self, ticket: int) -> None:
        """Give charged load back."""
        ...

    def ended(self, asked: Asked, tokens: int, *, ran: bool, finished: bool) -> None:
        """A request is over, whether it ran, waits or is being planned. Unknown ones are fine.

        Args:
            asked: the request.
            tokens: that were delivered.
            ran: whether an engine had it.
            finished: its answer is whole.
        """
        ...

    def source(self, facts: RequestFacts, target: str, known: str) -> str:
        """Return the node from whose store `target`'s may fetch the blocks (Scheduler.source); "" = none."""
        ...

    def target(self, prefill: str, decode: str) -> str:
        """Return `decode` if blocks can be handed over from node `prefill` to it, else ""."""
        ...

    def prefilled(self, new_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A prefill was measured."""
        ...

    def started(self, late_s: float) -> None:
        """A first token came so much later than planned; below 0 = sooner."""
        ...

    def stepped(self, requests: int, context_tokens: int, seconds: float) -> None:
        """A step of decoding was measured."""
        ...

    def tenant_label(self, tenant: str) -> str:
        """Return a tenant's name as a metric label."""
        ...

    def on_lost(self, instance_id: str) -> None:
        """An instance is gone."""
        ...

    def on_pulse(self, instance_id: str, pulse: Pulse) -> None:
        """An engine told what it has moved."""
        ...

    def on_tick(self, now_s: float) -> None:
        """PULSE_S have passed (conductor.cluster)."""
        ...
