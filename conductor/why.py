"""Why a request runs where it runs, or does not: what the scheduler compared, in numbers. Pure.

No prompt, no token, no block key is in it: names of instances, counts and seconds only.
"""

from collections import deque
from collections.abc import Callable
from heapq import nsmallest

import msgspec

from conductor.plan import Plan, Rejection, RequestFacts
from conductor.pricing import Decode, Prefill, Trail

DECISIONS_MAX = 256
"""Records that are kept: the last seconds of a busy gateway, some 2 MB with OPTIONS_MAX instances each."""
OPTIONS_MAX = 32
"""Instances listed per record, the best ones: who was 33rd explains nothing, and a log line stays short."""


class PrefillOption(msgspec.Struct, frozen=True):
    """What prefilling on one instance would take: ttft_s = queue_s + work_s, a fetch overlapping the queue.

    hit_blocks: leading blocks expected without computing, of which fetch_blocks come from fetch_node and
    gpu_blocks are in the engine's own cache, so that nothing loads them.
    """

    instance: str
    queue_s: float
    hit_blocks: int
    fetch_blocks: int
    fetch_node: str
    work_s: float
    ttft_s: float
    gpu_blocks: int = 0


class DecodeOption(msgspec.Struct, frozen=True):
    """What decoding on one instance would be like, this request included, and the room there is."""

    instance: str
    tbt_s: float
    requests: int
    requests_max: int
    kv_tokens: int
    kv_tokens_max: int


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the Conductor's. Its numbers are predictions, as they were then.

    at_s: seconds since 1970. waited_s: since the request came. client_id: the id in the client's answer.
    kind: how a plan came about (plan.Decision), or "rejected"; then `reason` and `detail` say why.
    prefill, decode: the instances chosen; decode alone does both legs.
    output_tokens: the answer's expected length. emitted_tokens: of it the client has (a leg placed again).
    prefills, decodes: what was compared, best first, at most OPTIONS_MAX of *_count; empty where nothing was.
    """

    request_id: str
    client_id: str
    at_s: float
    waited_s: float
    kind: str
    reason: str
    detail: str
    prefill: str | None
    decode: str | None
    ttft_s: float
    tbt_s: float
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    slo_class: str
    tenant: str
    prompt_tokens: int
    prompt_blocks: int
    output_tokens: int
    emitted_tokens: int
    index_mode: str
    prefills: list[PrefillOption]
    prefill_count: int
    decodes: list[DecodeOption]
    decode_count: int


REJECTED = "rejected"


def explain(
    at_s: float,
    facts: RequestFacts,
    answer: Plan | Rejection,
    trail: Trail,
    *,
    client_id: str = "",
    waited_s: float = 0.0,
    output_tokens: int = 0,
    emitted_tokens: int = 0,
    index_mode: str = "",
    prompt_blocks: int | None = None,
) -> Why:
    """Return the record of `answer`, to a question since which `trail` was not cleared; others: see Why."""
    plan = answer if isinstance(answer, Plan) else None
    rejection = answer if isinstance(answer, Rejection) else None
    prefills = list({one.worker.id: _prefill_option(one) for one in trail.prefills}.values())
    decodes = list({one.worker.id: _decode_option(one, *load) for one, *load in trail.decodes}.values())
    return Why(
        request_id=facts.request_id,
        client_id=client_id,
        at_s=at_s,
        waited_s=waited_s,
        kind=REJECTED if plan is None else str(plan.decision),
        reason="" if rejection is None else str(rejection.reason),
        detail="" if rejection is None else rejection.detail,
        prefill=None if plan is None else plan.prefill,
        decode=None if plan is None else plan.decode,
        ttft_s=0.0 if plan is None else plan.predicted_ttft_s,
        tbt_s=0.0 if plan is None else plan.predicted_tbt_s,
        ttft_slo_s=facts.ttft_slo_s,
        tbt_slo_s=facts.tbt_slo_s,
        slo_class=facts.slo_class,
        tenant=facts.tenant,
        prompt_tokens=facts.prompt_len,
        prompt_blocks=len(facts.keys) if prompt_blocks is None else prompt_blocks,
        output_tokens=output_tokens,
        emitted_tokens=emitted_tokens,
        index_mode=index_mode,
        prefills=nsmallest(OPTIONS_MAX, prefills, key=lambda one: (one.ttft_s, one.instance)),
        prefill_count=len(prefills),
        decodes=nsmallest(OPTIONS_MAX, decodes, key=lambda one: (one.tbt_s, one.instance)),
        decode_count=len(decodes),
    )


def _prefill_option(one: Prefill) -> PrefillOption:
    queue_s = max(0.0, one.ttft_s - one.work_s)
    fetched = one.fetch_blocks, one.fetch_node or ""
    times = one.work_s, one.ttft_s
    return PrefillOption(one.worker.id, queue_s, one.hit_blocks, *fetched, *times, gpu_blocks=one.gpu_blocks)


def _decode_option(one: Decode, requests: int, kv_tokens: int) -> DecodeOption:
    record = one.worker.record
    room = kv_tokens + one.kv_tokens, record.kv_blocks * record.block_size
    return DecodeOption(one.worker.id, one.tbt_s, requests + 1, record.max_num_seqs, *room)


def attributes(answer: Plan | Rejection) -> dict[str, str | int | float]:
    """Return an answer as a span has it (conductor.spans)."""
    if isinstance(answer, Rejection):
        return {"mooncake.decision": "rejected", "mooncake.reason": str(answer.reason)}
    about: dict[str, str | int | float] = {
        "mooncake.decision": str(answer.decision),
        "mooncake.hit_blocks": answer.hit_blocks,
        "mooncake.predicted_ttft_s": answer.predicted_ttft_s,
        "mooncake.predicted_tbt_s": answer.predicted_tbt_s,
    }
    for key, name in (("prefill", answer.prefill), ("decode", answer.decode)):
        if name is not None:
            about[f"mooncake.{key}"] = name
    if answer.fetch_blocks:
        about["mooncake.fetch_blocks"] = answer.fetch_blocks
        about["mooncake.fetch_node"] = answer.fetch_node or ""
    return about


class Decided:
    """A record that is written out when somebody reads it: few are."""

    __slots__ = ("client_id", "names", "request_id", "why")

    def __init__(
        self, request_id: str, client_id: str, why: Callable[[], Why], names: dict[str, str] | None = None
    ) -> None:
        """`why` makes the record; it holds no block keys either. `names`: as log lines call the request."""
        self.names = names or {"request_id": client_id or request_id}
        self.request_id = request_id
        self.client_id = client_id
        self.why = why


class Decisions:
    """The last records, newest first."""

    def __init__(self, records_max: int = DECISIONS_MAX) -> None:
        """Keep at most `records_max`."""
        self._records: deque[Decided] = deque(maxlen=records_max)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, one: Decided) -> None:
        """Keep a record; the oldest goes when there are too many."""
        self._records.appendleft(one)

    def last(self, request_id: str = "") -> list[Why]:
        """Return the records, newest first; only those of `request_id` (ours or the client's), if given."""
        found = (
            one for one in self._records if not request_id or request_id in (one.request_id, one.client_id)
        )
        return [one.why() for one in found]
