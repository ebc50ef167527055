"""What gateways and the decision core tell each other (DESIGN 4). One ZMQ connection per gateway and leader.

Frames: [number, 8 bytes][message]. A question's answer carries its number; 0 = no answer is expected. On one
connection messages keep their order, and that is counted on: what was charged is handed in (Join) before
anything of it is given back.
A core answers while it leads; what it decides carries its Term, and gateways refuse what comes from an
earlier one. Clocks differ between hosts: times are told as ages.
"""

from typing import Annotated, Any

import msgspec

from conductor.cluster import Charge
from conductor.plan import Need, Plan, Rejection, RequestFacts
from conductor.terms import Terms
from mooncake.core.messages import Term

CORE_KEY = "/mooncake/conductor/leader"
"""Of the metadata store: who leads, with the address where gateways reach it (election.LeaderRecord)."""
CORE_PROTOCOL = 1
"""Both sides must agree; there is no negotiation."""
NUMBER_BYTES = 8
CONTEXTS_MAX = 4
"""Kinds of engines that a prompt's blocks are named for: a cluster has one, or two while it is upgraded."""
NAMES_BYTES_MAX = 1 << 20
"""Of one prompt and context: 131,072 blocks, 4 M tokens in blocks of 32."""
NAMES_MAX = 4
"""Of a request in log lines: request_id and trace_id, and room."""
TEXT_MAX = 1024
"""Characters of ids and names. A longer id of a client's is the gateway's to decide on."""
CHARGES_MAX = 65_536
"""Handed in at once: eight engines' queues of a gateway, twice."""
TOLD_MAX = 8_192
"""Of each kind in one message: those of a loop turn. What is more goes in the next message."""
EXCLUDED_MAX = 64
"""Instances that failed one request: its machine gives up long before."""

Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tagged by its name."""


class _Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of a message."""


# ---------------------------------------------------------------- parts


class Running(_Part, frozen=True):
    """A request that was accepted and has not ended: what quotas count."""

    request_id: Text
    tenant: Text
    slo_class: Text
    prompt_tokens: Count
    max_tokens: int


class Context(_Part, frozen=True):
    """A prompt's blocks as engines of one context name them: keys.NAME_BYTES each."""

    root: Text
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    names: Annotated[bytes, msgspec.Meta(max_length=NAMES_BYTES_MAX)]
    has_tail: bool = False


class Question(_Part, frozen=True, gc=True):
    """A request: what RequestFacts (without keys) and Terms say of it. sibling: of n > 1, not the first.

    age_s: since it came, which is what its facts' arrival_s means elsewhere. unnamed: why it has no contexts.
    names: what log lines call it. trace: its decision's span, a W3C traceparent.
    """

    facts: RequestFacts
    terms: Terms
    client_id: Text
    age_s: Seconds
    sibling: bool
    unnamed: Text
    contexts: Annotated[list[Context], msgspec.Meta(max_length=CONTEXTS_MAX)]
    names: Annotated[dict[Text, Text], msgspec.Meta(max_length=NAMES_MAX)] = {}
    trace: Text = ""


class Ended(_Part, frozen=True):
    """A request is over. ran: an engine had it; finished: its answer is whole, its length means something."""

    request_id: Text
    tenant: Text
    slo_class: Text
    max_tokens: int
    tokens: Count
    ran: bool
    finished: bool


class Prefilled(_Part, frozen=True):
    """A measured prefill."""

    new_tokens: Count
    cached_tokens: Count
    seconds: Seconds


class Stepped(_Part, frozen=True):
    """A measured step of decoding."""

    requests: Count
    context_tokens: Count
    seconds: Seconds


# ---------------------------------------------------------------- gateway -> core


class Join(_Message, frozen=True):
    """A gateway comes, or comes again: this is all that it has in flight; what was known before is void.

    more: this is only what it has planned by itself since; nothing is void, and there is no answer.
    """

    gateway_id: Text
    charges: Annotated[list[Charge], msgspec.Meta(max_length=CHARGES_MAX)]
    running: Annotated[list[Running], msgspec.Meta(max_length=CHARGES_MAX)]
    more: bool = False
    protocol: int = CORE_PROTOCOL


class Ask(_Message, frozen=True):
    """Plan a new request. Answer: Answer, or Waiting and an Answer later."""

    question: Question


class Replan(_Message, frozen=True):
    """Place a leg again (Scheduler.replan). Answer: Answer."""

    question: Question
    emitted_n: Count
    exclude: Annotated[list[Text], msgspec.Meta(max_length=EXCLUDED_MAX)]
    need: Need


class SecondCheck(_Message, frozen=True):
    """A prompt is done: may it be decoded (Scheduler.second_check)? Answer: Checked."""

    question: Question
    decode: Text
    decode_ticket: int


class Told(_Message, frozen=True):
    """What a gateway saw since the last one: tickets given back, requests over, measurements. No answer.

    late_s: of first tokens, after they were planned to come.
    """

    released: Annotated[list[int], msgspec.Meta(max_length=TOLD_MAX)] = []
    ended: Annotated[list[Ended], msgspec.Meta(max_length=TOLD_MAX)] = []
    prefilled: Annotated[list[Prefilled], msgspec.Meta(max_length=TOLD_MAX)] = []
    stepped: Annotated[list[Stepped], msgspec.Meta(max_length=TOLD_MAX)] = []
    late_s: Annotated[list[float], msgspec.Meta(max_length=TOLD_MAX)] = []


class Ping(_Message, frozen=True):
    """Sign of life, a few times a second. Answer: Pong."""


class ListInstances(_Message, frozen=True):
    """Answer: Listed."""


class ListDecisions(_Message, frozen=True):
    """Of one request, "" = the last ones. Answer: Listed."""

    request_id: Text = ""


class ChangeRole(_Message, frozen=True):
    """Answer: Listed, of nothing; or Refused."""

    instance_id: Text
    role: Text


FromGateway = Join | Ask | Replan | SecondCheck | Told | Ping | ListInstances | ListDecisions | ChangeRole

# ---------------------------------------------------------------- core -> gateway


class Joined(_Message, frozen=True):
    """The core leads, in this term, and has taken over what the gateway has in flight."""

    term: Term


class NotLeader(_Message, frozen=True):
    """Not now, or not known here: find the leader and join."""


class Waiting(_Message, frozen=True):
    """The request waits in the core's gate; an Answer follows within the request's own limits."""

    term: Term


class Answer(_Message, frozen=True):
    """plan or rejection; of a plan, the root of its context and what it charged."""

    term: Term
    plan: Plan | None
    rejection: Rejection | None
    root: str = ""
    charges: list[Charge] = []


class Checked(_Message, frozen=True):
    """None: go on."""

    term: Term
    rejection: Rejection | None


class Pong(_Message, frozen=True):
    """The core leads still."""

    term: Term


class Listed(_Message, frozen=True):
    """JSON-ready: what was asked to be listed."""

    entries: list[dict[str, Any]] = []


class Refused(_Message, frozen=True):
    """The message cannot be served: code and text of an error of mooncake.core.errors."""

    code: str
    message: str


FromCore = Joined | NotLeader | Waiting | Answer | Checked | Pong | Listed | Refused
