"""Conditional disaggregation: a short prefill runs inside a decode instance's batch (arXiv v3, 5). Pure.

"A request's prefill is inlined into the decoding batch only when it can be forwarded without chunking and
without compromising the TBT SLO": it fits into one step with the batch, and that step, with the prompts that
were inlined there and have not begun, keeps the objective. It is worth it when the first token then comes
sooner than from a prefill instance, whose queue holds long prompts. Nothing is handed over.
"""

from collections.abc import Sequence

import msgspec

from conductor.plan import RequestFacts
from conductor.pricing import Decode, Hits, Prefill, Pricing, Worker, split

STRETCH_MAX = 3.0
"""Where no objective is set: the longest step, as a multiple of the one without the prompt."""


class Inlined(msgspec.Struct, frozen=True):
    """Both halves on one decode instance."""

    work: Prefill
    answer: Decode


def inlined(
    now_s: float,
    facts: RequestFacts,
    pricing: Pricing,
    hits: Hits,
    decodes: Sequence[Worker],
    two_legs: tuple[Prefill, Decode],
    tbt_slo_s: float | None,
) -> Inlined | None:
    """Return the best way to run a request on one of `decodes` alone, if it beats `two_legs`."""
    work, answer = two_legs
    limit_s = work.ttft_s
    if not facts.first_token:
        # the first token then is decode's: it comes after the hand-over, with a step
        limit_s += pricing.handover_s(facts, answer.worker, work.worker.record.node, hits) + answer.tbt_s
    left = pricing.left(facts)
    best: tuple[float, str, Inlined] | None = None
    for worker in decodes:
        own = _on(now_s, facts, pricing, hits, worker, tbt_slo_s)
        if own is None or own.work.ttft_s >= limit_s:
            continue
        score = own.work.ttft_s + own.answer.tbt_s * left, worker.id
        if best is None or score < best[:2]:
            best = *score, own
    return None if best is None else best[2]


def _on(
    now_s: float, facts: RequestFacts, pricing: Pricing, hits: Hits, worker: Worker, tbt_slo_s: float | None
) -> Inlined | None:
    """Price it on one instance; None = it may not run there."""
    record, load = worker.record, worker.load
    answer = pricing.decode(facts, worker)
    if answer.is_full:
        return None
    work = pricing.prefill(now_s, facts, worker, hits)
    new_tokens, known_tokens = split(facts.prompt_len, work.hit_blocks, record.block_size)
    if new_tokens + load.decode_requests > record.max_num_batched_tokens:
        return None
    # those that wait there may run in the same step
    step_s = answer.tbt_s + load.queue_s(now_s) + pricing.cost.prefill_s(new_tokens, known_tokens)
    if step_s > (answer.tbt_s * STRETCH_MAX if tbt_slo_s is None else tbt_slo_s):
        return None
    # the step that is under way has to end first, and its own step decodes the batch too
    return Inlined(msgspec.structs.replace(work, ttft_s=work.ttft_s + 1.5 * answer.tbt_s), answer)
