"""Conditional disaggregation: a prefill runs beside a decode instance's batch (arXiv v3, 5). Pure.

Short ones: "a request's prefill is inlined into the decoding batch only when it can be forwarded without
chunking and without compromising the TBT SLO": it fits into one step with the batch, and that step, with the
prompts that were inlined there and have not begun, keeps the objective.

Appends (PPD, arXiv 2603.13358): where an instance, or the store beside it, holds most of a prompt, as after a
turn of a conversation, what is new may also take several steps, if each of them keeps the objective. So an
engine that computes few tokens per step (max_num_batched_tokens) takes longer ones.

Either is worth it when the first token then comes sooner than from a prefill instance, whose queue holds long
prompts, and which has to fetch what decode holds. Nothing is handed over.
"""

from collections.abc import Sequence

import msgspec

from conductor.plan import RequestFacts
from conductor.pricing import Decode, Hits, Prefill, Pricing, Worker, split

STRETCH_MAX = 3.0
"""Where no objective is set: the longest step, as a multiple of the one without the prompt."""


class Inlined(msgspec.Struct, frozen=True):
    """Both halves on one decode instance. appends: it holds most of the prompt."""

    work: Prefill
    answer: Decode
    appends: bool


def inlined(
    now_s: float,
    facts: RequestFacts,
    pricing: Pricing,
    hits: Hits,
    decodes: Sequence[Worker],
    two_legs: tuple[Prefill, Decode],
    tbt_slo_s: float | None,
    *,
    only_appends: bool = False,
) -> Inlined | None:
    """Return the best way to run a request on one of `decodes` alone, if it beats `two_legs`.

    `only_appends`: on those that hold most of its prompt; see the module.
    """
    work, answer = two_legs
    limit_s = work.ttft_s
    if not facts.first_token:
        # the first token then is decode's: it comes after the hand-over, with a step
        limit_s += pricing.handover_s(facts, answer.worker, work.worker.record.node, hits) + answer.tbt_s
    left = pricing.left(facts)
    best: tuple[float, str, Inlined] | None = None
    for worker in decodes:
        appends = _holds_most(facts, worker, hits)
        if only_appends and not appends:
            continue
        own = _on(now_s, facts, pricing, hits, worker, tbt_slo_s, appends=appends)
        if own is None or own.work.ttft_s >= limit_s:
            continue
        score = own.work.ttft_s + own.answer.tbt_s * left, worker.id
        if best is None or score < best[:2]:
            best = *score, own
    return None if best is None else best[2]


def _holds_most(facts: RequestFacts, worker: Worker, hits: Hits) -> bool:
    """Whether most of a prompt is in the engine's own cache, or in the store beside it."""
    held = max(hits.on_gpu(worker.id), hits.blocks.get(worker.record.node, 0))
    return 2 * held * worker.record.block_size > facts.prompt_len


def _on(
    now_s: float,
    facts: RequestFacts,
    pricing: Pricing,
    hits: Hits,
    worker: Worker,
    tbt_slo_s: float | None,
    *,
    appends: bool,
) -> Inlined | None:
    """Price it on one instance; None = it may not run there."""
    record, load = worker.record, worker.load
    answer = pricing.decode(facts, worker)
    room = record.max_num_batched_tokens - load.decode_requests
    if answer.is_full or room <= 0:
        return None
    work = pricing.prefill(now_s, facts, worker, hits)
    new_tokens, known_tokens = split(facts.prompt_len, work.hit_blocks, record.block_size)
    steps = -(-new_tokens // room)
    if steps > 1 and not appends:
        return None
    last = min(new_tokens, room)
    # those that wait there may run in the same step
    queue_s = load.queue_s(now_s) if steps == 1 else 0.0
    step_s = answer.tbt_s + queue_s + pricing.cost.prefill_s(last, known_tokens + new_tokens - last)
    if step_s > (answer.tbt_s * STRETCH_MAX if tbt_slo_s is None else tbt_slo_s):
        return None
    # the step that is under way has to end first, and its own steps decode the batch too
    waits_s = (steps + 0.5) * answer.tbt_s
    return Inlined(msgspec.structs.replace(work, ttft_s=work.ttft_s + waits_s), answer, appends)
