"""The Conductor's nouns: facts of a request, plans, rejections, and commands of request machines.

Everything here is frozen and holds no behaviour. `ticket` numbers stand for load charged to an
instance when a plan was made; each is given back exactly once (`Scheduler.release`). 0 = none.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

# ---------------------------------------------------------------- into the scheduler


class RequestFacts(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What the policy may know of one client request (or of one of its n>1 children).

    keys: 32-byte keys of the prompt's full blocks, in order; tail_key: of a prompt shorter than a block.
    context_root: hex root the keys were made from; only instances with that root are considered.
        Empty = not known: any instance will do, and prefill and decode are still paired by root.
    single_leg: one leg is the whole answer (max_tokens == 1, pooling, prompt embeddings, ...).
    first_token: leg 1's token is exact and is delivered at once; leg 2 goes on from prompt + 1.
    ttft_slo_s, tbt_slo_s: the request's own objectives; None = the Conductor's.
    session: what the client says it belongs to; "" = nothing.
    tenant, slo_class: whose it is, and its class of service; "" = not known.
    """

    request_id: str
    prompt_len: int
    max_tokens: int
    keys: Sequence[bytes]
    arrival_s: float
    tail_key: bytes | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    context_root: str = ""
    session: str = ""
    single_leg: bool = False
    first_token: bool = False
    tenant: str = ""
    slo_class: str = ""


class Needs(msgspec.Struct, frozen=True, gc=False):
    """What a request takes once it is begun: seconds of its prompt and of its answer, KV of a long answer."""

    prefill_s: float
    answer_s: float = 0.0
    kv_tokens: int = 0


class Need(StrEnum):
    """What a replan has to find."""

    PREFILL = "prefill"  # another instance for leg 1; the decode side is untouched
    DECODE = "decode"  # an instance for leg 2, for a migration, or for a whole (one-leg) answer


# ---------------------------------------------------------------- out of the scheduler


class Decision(StrEnum):
    """How a plan came about: a metric label, so that no fall-back is silent."""

    KVCACHE_CENTRIC = "kvcache_centric"
    CACHE_AWARE = "cache_aware"
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    INLINED = "inlined"  # a decode instance does both legs: the prompt fits into one step of its batch
    APPENDED = "appended"  # the same, for what is new of a prompt that it holds most of
    AGGREGATED = "aggregated"  # one instance does both, by configuration
    SINGLE_TOKEN = "single_token"  # one leg on a prefill instance is the whole answer
    NO_PREFILL_ALIVE = "no_prefill_alive"  # a decode instance does both legs
    NO_DECODE_ALIVE = "no_decode_alive"  # a prefill instance does both legs, or resumes
    MIGRATED = "migrated"  # leg 2 was placed (again) after the first plan


BESIDE_ANSWERS = (Decision.INLINED, Decision.APPENDED)
"""These take nothing of the instances that prefill."""


class Plan(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Where a request runs. Load is charged already: start it or give its tickets back.

    prefill: instance of leg 1; None = no leg 1.
    decode: instance of leg 2, or of the only leg when `prefill` is None. None only in the answer to
        Need.PREFILL, which leaves the decode side as it is (there, `prefill` None = skip leg 1).
    hit_blocks: leading blocks expected from the pool, of which fetch_blocks come from `fetch_node`.
    promoted: batch work that has waited until its job would be late: engines are to put it off no more.
    """

    request_id: str
    prefill: str | None
    decode: str | None
    decision: Decision
    hit_blocks: int = 0
    fetch_blocks: int = 0
    fetch_node: str | None = None
    predicted_ttft_s: float = 0.0
    predicted_prefill_s: float = 0.0
    predicted_tbt_s: float = 0.0
    prefill_ticket: int = 0
    decode_ticket: int = 0
    promoted: bool = False


def revised(plan: Plan, answer: Plan) -> Plan:
    """Return what holds of a request after a replan: of the leg that was placed again, the answer's."""
    plan = msgspec.structs.replace(plan, fetch_node=answer.fetch_node, fetch_blocks=answer.fetch_blocks)
    if answer.decode is None:
        return msgspec.structs.replace(plan, prefill=answer.prefill, prefill_ticket=answer.prefill_ticket)
    return msgspec.structs.replace(plan, decode=answer.decode, decode_ticket=answer.decode_ticket)


class Reason(StrEnum):
    """Why a request was turned away: a metric label."""

    NO_INSTANCE_ALIVE = "no instance alive"
    NO_COMMON_CONTEXT = "no prefill and decode instance share a context"
    NO_INSTANCE_FITS = "prompt exceeds every instance's context length"
    QUEUE_FULL = "queue full"
    QUEUE_TIME = "waited in the queue until its deadline"
    TTFT_SLO = "predicted time to first token exceeds its objective"
    TBT_SLO = "predicted time between tokens exceeds its objective"
    PREFILL_LOAD = "prefill instances are too loaded for a prompt that takes so long"
    JOB_TIME = "the job cannot be done in its time"
    DECODE_LOAD = "decode instances are loaded beyond their objective or KV room"
    QUOTA = "the tenant's quota is used up"


class Rejection(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Nothing was charged. `detail` is for people; retry_after_s for the Retry-After header."""

    request_id: str
    reason: Reason
    retry_after_s: float
    detail: str = ""


# ---------------------------------------------------------------- out of a request machine


class Leg(StrEnum):
    """Which half of a request an engine runs; the same words as KvParams.leg."""

    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "whole"


class Outcome(StrEnum):
    """How a request ended: a metric label."""

    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send a leg to an engine under id `eid`: prompt + the first resume_n emitted tokens."""

    request_id: str
    eid: str
    leg: Leg
    instance_id: str
    resume_n: int


class Abort(msgspec.Struct, frozen=True, gc=False):
    """Stop a leg. Best effort: its instance may be gone; late outputs are stale by their eid."""

    request_id: str
    eid: str
    instance_id: str


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Hand these tokens to the client, with `finish` (which overrides the engine's finish).

    tokens may be empty when finish is set. `leg` says which leg produced them.
    """

    request_id: str
    tokens: list[int]
    finish: str | None
    leg: Leg


class Replan(msgspec.Struct, frozen=True, gc=False):
    """Ask Scheduler.replan after delay_s and answer with plan_result(need, answer), always.

    Also when the machine is DONE by then: it gives the tickets of an unused plan back.
    """

    request_id: str
    need: Need
    emitted_n: int
    exclude: tuple[str, ...]
    delay_s: float


class Release(msgspec.Struct, frozen=True, gc=False):
    """Give charged load back: Scheduler.release(ticket)."""

    request_id: str
    ticket: int


class Fail(msgspec.Struct, frozen=True, gc=False):
    """Tell the client. `retryable`: the same request may succeed later."""

    request_id: str
    reason: str
    retryable: bool


class Stale(msgspec.Struct, frozen=True, gc=False):
    """The output belongs to a leg that is over (aborted, lost, finished): drop it."""

    request_id: str
    eid: str


class Done(msgspec.Struct, frozen=True, gc=False):
    """The last command of a machine, exactly once: forget it (but see Replan)."""

    request_id: str
    outcome: Outcome


Command = Send | Abort | Deliver | Replan | Release | Fail | Stale | Done
