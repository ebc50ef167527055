"""Chooses where a request runs (paper 1.2: Mooncake's Algorithm 1, KVCache-centric scheduling).

Per prefill instance the predicted time to first token is the better of
    queue + load of the blocks its own node holds and its own cache does not + compute of the rest
    max(queue, fetch of the deepest prefix from another node) + load + compute of the rest
The paper adds fetch and queue although they overlap, and decides to fetch by a hand-tuned ratio;
taking the minimum of both honest sums per instance needs no such knob and is never worse than
either alone. The decode instance is the one with the least predicted seconds for the hand-over and
the whole answer. Load is charged when a plan is made, so a burst does not pile up on one instance.
Ties go to the instance with fewer streams, then to the lower id. Prefill and decode must share a
context_root: block keys commit to it, so across two roots no hand-over could ever hit.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from conductor.admission import MARGIN, Admission, AdmissionMode
from conductor.cluster import ClusterView, Load
from conductor.coming import Coming
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.inline import inlined
from conductor.plan import Decision, Need, Needs, Plan, Reason, Rejection, RequestFacts
from conductor.pricing import Decode, Hits, Prefill, Pricing, Trail, Worker, known
from conductor.sessions import Sessions
from conductor.terms import CLASSES, Terms
from mooncake.core.context import differences
from mooncake.core.messages import InstanceRecord

RETRY_AFTER_S = 1.0
"""Told to clients when nobody is alive: an engine is back in seconds, or not soon."""
RETRY_AFTER_MAX_S = 30.0
"""Longest wait suggested to a client: beyond it, predictions are not worth much."""

LATE_SHARE_MAX = 0.5
"""Of an objective, usual lateness may take: who is well before it is let in whatever was measured last, or
nobody would measure that it is over."""

_WORD = (1 << 64) - 1


def retry_after(seconds: float) -> float:
    """Return what a client is told of a wait that is predicted."""
    return min(max(seconds, RETRY_AFTER_S), RETRY_AFTER_MAX_S)


class Mode(StrEnum):
    """Two legs, or each instance does both."""

    DISAGGREGATED = "disaggregated"
    AGGREGATED = "aggregated"


class Policy(StrEnum):
    """How instances are chosen."""

    KVCACHE = "kvcache"  # predicted time to first token, counting fetches from other nodes
    CACHE_AWARE = "cache_aware"  # the same without fetches
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


_DECISIONS = {
    Policy.KVCACHE: Decision.KVCACHE_CENTRIC,
    Policy.CACHE_AWARE: Decision.CACHE_AWARE,
    Policy.LEAST_LOAD: Decision.LEAST_LOAD,
    Policy.ROUND_ROBIN: Decision.ROUND_ROBIN,
    Policy.RANDOM: Decision.RANDOM,
}


_PREDICTING = frozenset({Policy.KVCACHE, Policy.CACHE_AWARE})


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`None` objectives are not enforced.

    waiting_max: prefills that one instance may hold, and decode requests beyond max_num_seqs; new
        requests are rejected beyond it. Requests already accepted are never dropped for it.
    admission, decode_s, admission_margin: see conductor.admission; decode_s is its t_d, None = learned.
    inline: short prefills may run on decode instances (policies that predict; see conductor.inline).
    append: and those of which a decode instance holds most, whether or not they are short.
    session_bonus_s: the instances that served a session last count as so much sooner.
    """

    mode: Mode = Mode.DISAGGREGATED
    policy: Policy = Policy.KVCACHE
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    waiting_max: int = 1024
    seed: int = 0
    admission: AdmissionMode = AdmissionMode.OBJECTIVES
    decode_s: float | None = None
    admission_margin: float = MARGIN
    inline: bool = False
    append: bool = False
    session_bonus_s: float = 0.0


class Scheduler:
    """Pure: the same events give the same plans."""

    def __init__(
        self, config: SchedulerConfig, index: PrefixIndex, cost: CostModel, cluster: ClusterView
    ) -> None:
        """The three views are shared with the shell, which feeds them."""
        self._config = config
        self._coming = Coming()
        fetches = config.policy is Policy.KVCACHE
        self._pricing = Pricing(index, cost, cluster, self._coming, fetches=fetches)
        self._cluster = cluster
        self._sessions = Sessions()
        self._turns = {"prefill": 0, "decode": 0}  # one each: a shared one would alternate between roles
        self._draws = 0
        self._alive: Sequence[tuple[InstanceRecord, Load]] = ()
        self._workers: list[Worker] = []  # the same as _alive
        self._admission = Admission(
            config.admission, config.tbt_slo_s, config.decode_s, cost, config.admission_margin
        )

    def change(self, config: SchedulerConfig) -> None:
        """Decide by these from now on. The mode stays, and all that is charged and known."""
        self._config = msgspec.structs.replace(config, mode=self._config.mode)
        self._pricing.fetches = config.policy is Policy.KVCACHE
        self._admission.change(config.admission, config.tbt_slo_s, config.decode_s, config.admission_margin)

    def listen(self, trail: Trail) -> None:
        """Leave the price of everything that is compared in `trail`; who asked clears it."""
        self._pricing.trail = trail

    def on_request(self, now_s: float, facts: RequestFacts) -> Plan | Rejection:
        """Plan a new request and charge its load; a Rejection charges nothing."""
        workers = self._eligible(facts)
        if isinstance(workers, Rejection):
            return workers
        prefills, decodes = _by_role(workers, "prefill"), _by_role(workers, "decode")
        if self._config.mode is Mode.AGGREGATED:
            return self._one_leg(now_s, facts, workers, Decision.AGGREGATED)
        if not prefills:
            return self._one_leg(now_s, facts, decodes, Decision.NO_PREFILL_ALIVE)
        if facts.single_leg:
            return self._one_leg(now_s, facts, prefills, Decision.SINGLE_TOKEN)
        if not decodes:
            return self._one_leg(now_s, facts, prefills, Decision.NO_DECODE_ALIVE)
        roots = {w.record.context_root: None for w in decodes}  # a dict: order is not to depend on hashes
        paired = [w for w in prefills if w.record.context_root in roots]
        if not paired:
            return _no_common_context(facts, prefills, decodes)
        return self._two_legs(now_s, facts, paired, decodes)

    def hopeless(self, now_s: float, terms: Terms) -> Rejection | None:
        """Return why no prompt at all would begin in time, however short or known; None: ask with it."""
        ttft_slo_s = self._config.ttft_slo_s if terms.ttft_slo_s is None else terms.ttft_slo_s
        if ttft_slo_s is None or terms.slo_class.sheddable or self._config.inline or self._config.append:
            return None  # nothing is promised, batch work waits, decode instances may take it
        is_aggregated = self._config.mode is Mode.AGGREGATED
        loads = [load for one, load in self._cluster.alive() if is_aggregated or one.role != "decode"]
        if not loads:
            return None
        cost = self._pricing.cost
        least_s = min(load.queue_s(now_s) for load in loads) + cost.prefill_s(1, 0)
        least_s += min(cost.late_s, ttft_slo_s * LATE_SHARE_MAX)
        if least_s <= ttft_slo_s:
            return None
        detail = f"predicted {least_s:.3f} s at least, objective {ttft_slo_s:.3f} s"
        retry_after_s = retry_after(least_s - ttft_slo_s)
        return Rejection(request_id="", reason=Reason.TTFT_SLO, retry_after_s=retry_after_s, detail=detail)

    def replan(
        self, now_s: float, facts: RequestFacts, emitted_n: int, exclude: Sequence[str], need: Need
    ) -> Plan | Rejection:
        """Place a leg of an accepted request again (retry or migration) and charge its load.

        Objectives and queue bounds do not apply: the request is served already.

        Args:
            now_s: the time.
            facts: the request's.
            emitted_n: tokens the client has; they are part of the new leg's context.
            exclude: instances that failed it; avoided unless nobody else is alive.
            need: the leg. PREFILL leaves the decode side alone (Plan.decode is None).
        """
        workers = self._eligible(facts)
        if isinstance(workers, Rejection):
            return workers
        workers = [w for w in workers if w.id not in exclude] or workers
        prefills, decodes = _by_role(workers, "prefill"), _by_role(workers, "decode")
        if need is Need.PREFILL:
            if not prefills:
                return Plan(
                    request_id=facts.request_id,
                    prefill=None,
                    decode=None,
                    decision=Decision.NO_PREFILL_ALIVE,
                )
            return self._prefill_plan(now_s, facts, prefills)
        decision = Decision.MIGRATED
        if self._config.mode is Mode.AGGREGATED:
            decodes = workers
        elif not decodes:
            decodes, decision = prefills, Decision.NO_DECODE_ALIVE
        hits = self._pricing.hits(facts)
        chosen = self._choose_decode(facts, emitted_n, decodes, hits)
        work = self._pricing.prefill(now_s, facts, chosen.worker, hits, emitted_n)
        return self._plan(now_s, facts, decision, None, work, chosen, hits)

    def needs(self, facts: RequestFacts, block_size: int) -> Needs:
        """Predict what a request takes on the node that has most of its blocks, queues left out."""
        return self._pricing.needs(facts, block_size)

    def source(self, facts: RequestFacts, target: str, known: str) -> str:
        """Return the node from whose store that of `target` may fetch the request's blocks; "" = none.

        Args:
            facts: the request's.
            target: node that is going to run it.
            known: node that has its blocks for certain: planned so, or of its own leg 1, of which the
                index may not have heard yet.
        """
        if known == target or not self._cluster.is_open(target):
            return ""
        if self._cluster.is_open(known):
            return known
        if self._config.policy is not Policy.KVCACHE:
            return ""
        hits = self._pricing.hits(facts)
        depth, node = hits.deepest
        return node if depth > hits.blocks.get(target, 0) else ""

    def target(self, prefill: str, decode: str) -> str:
        """Return `decode` if blocks can be handed over from node `prefill` to it, else ""."""
        both = self._cluster.is_open(prefill) and self._cluster.is_open(decode)
        return decode if both and prefill != decode else ""

    def release(self, now_s: float, ticket: int) -> None:
        """Give charged load back; 0 and tickets given back before are ignored."""
        self._cluster.release(now_s, ticket)
        self._coming.remove(ticket)
        self._admission.released(now_s, ticket)

    def second_check(self, plan: Plan) -> Rejection | None:
        """Ask again when a plan's prompt is done, before it is decoded; None = go on (paper 1.3)."""
        record = None if plan.decode is None else self._cluster.record(plan.decode)
        if record is None:
            return None
        load = self._admission.load_when_ready(plan.decode_ticket, record.kv_blocks * record.block_size)
        return _over_load(plan.request_id, load, self._admission.decode_s)

    # ------------------------------------------------------------ who may serve

    def _eligible(self, facts: RequestFacts) -> list[Worker] | Rejection:
        known = self._cluster.alive()
        if known is not self._alive:
            self._alive, self._workers = known, [Worker(record, load) for record, load in known]
        alive = self._workers
        if not alive:
            return _reject(facts, Reason.NO_INSTANCE_ALIVE, "")
        if facts.context_root:
            same = [w for w in alive if w.record.context_root == facts.context_root]
            if not same:
                return _no_common_context(facts, alive, [])
            alive = same
        fitting = [w for w in alive if w.record.max_model_len > facts.prompt_len]
        if not fitting:
            longest = max(w.record.max_model_len for w in alive)
            detail = f"prompt of {facts.prompt_len} tokens, longest context {longest}"
            return _reject(facts, Reason.NO_INSTANCE_FITS, detail, retry_after_s=0.0)
        return fitting

    def _room(self, facts: RequestFacts, workers: list[Worker], *, leg: str) -> list[Worker] | Rejection:
        limit = self._config.waiting_max
        if leg == "prefill":
            free = [w for w in workers if w.load.prefill_requests < limit]
        else:
            free = [w for w in workers if w.load.decode_requests < limit + w.record.max_num_seqs]
        if free:
            return free
        detail = f"every {leg} instance ({len(workers)}) has {limit} requests waiting"
        return _reject(facts, Reason.QUEUE_FULL, detail)

    # ------------------------------------------------------------ plans

    def _one_leg(
        self, now_s: float, facts: RequestFacts, workers: list[Worker], decision: Decision
    ) -> Plan | Rejection:
        free = self._room(facts, workers, leg="prefill")
        if not isinstance(free, Rejection):
            free = self._room(facts, free, leg="decode")
        if isinstance(free, Rejection):
            return free
        hits = self._pricing.hits(facts)
        work = self._choose_prefill(now_s, facts, free, hits)
        chosen = self._pricing.decode(facts, work.worker)
        rejected = self._refused(now_s, facts, work, chosen, free, [work.worker])
        return rejected or self._plan(now_s, facts, decision, None, work, chosen, hits)

    def _two_legs(
        self, now_s: float, facts: RequestFacts, prefills: list[Worker], decodes: list[Worker]
    ) -> Plan | Rejection:
        free_prefills = self._room(facts, prefills, leg="prefill")
        if isinstance(free_prefills, Rejection):
            return free_prefills
        free_decodes = self._room(facts, decodes, leg="decode")
        if isinstance(free_decodes, Rejection):
            return free_decodes
        roots = {w.record.context_root: None for w in free_decodes}
        free_prefills = [w for w in free_prefills if w.record.context_root in roots]
        if not free_prefills:
            detail = "no context has both a prefill and a decode instance with room"
            return _reject(facts, Reason.QUEUE_FULL, detail)
        hits = self._pricing.hits(facts)
        work = self._choose_prefill(now_s, facts, free_prefills, hits)
        root, node = work.worker.record.context_root, work.worker.record.node
        same_root = [w for w in free_decodes if w.record.context_root == root]
        chosen = self._choose_decode(facts, 0, same_root, hits, node)
        decision: Decision = _DECISIONS[self._config.policy]
        prefill: str | None = work.worker.id
        if chosen.worker.id == work.worker.id:  # role "both": handing over to itself is one leg
            decision, prefill = Decision.AGGREGATED, None
        elif (self._config.inline or self._config.append) and self._config.policy in _PREDICTING:
            limit_s, only_appends = self._tbt_slo_s(facts), not self._config.inline
            found = inlined(
                now_s, facts, self._pricing, hits, same_root, (work, chosen), limit_s,
                only_appends=only_appends,
            )  # fmt: skip
            if found is not None:
                decision = Decision.APPENDED if found.appends else Decision.INLINED
                work, chosen, prefill = found.work, found.answer, None
        rejected = self._refused(now_s, facts, work, chosen, free_prefills, same_root)
        if rejected:
            return rejected
        return self._plan(now_s, facts, decision, prefill, work, chosen, hits)

    def _prefill_plan(self, now_s: float, facts: RequestFacts, prefills: list[Worker]) -> Plan:
        hits = self._pricing.hits(facts)
        work = self._choose_prefill(now_s, facts, prefills, hits)
        return self._plan(now_s, facts, _DECISIONS[self._config.policy], work.worker.id, work, None, hits)

    def _plan(
        self,
        now_s: float,
        facts: RequestFacts,
        decision: Decision,
        prefill: str | None,
        work: Prefill,
        chosen: Decode | None,
        hits: Hits,
    ) -> Plan:
        decode_ticket = 0
        if chosen is not None:
            decode_ticket = self._cluster.charge_decode(
                chosen.worker.id, chosen.kv_tokens, is_batch=_is_batch(facts)
            )
            self._sessions.served(facts.session, work.worker.id, chosen.worker.id)
        prefill_ticket = self._cluster.charge_prefill(now_s, work.worker.id, work.work_s, facts.prompt_len)
        self._coming.add(prefill_ticket, work.worker.id, facts.keys, known(hits.blocks))
        if chosen is not None:
            ready_s = now_s + work.ttft_s
            self._admission.planned(
                prefill_ticket, decode_ticket, chosen.worker.id, ready_s, chosen.kv_tokens
            )
        return Plan(
            request_id=facts.request_id,
            prefill=prefill,
            decode=None if chosen is None else chosen.worker.id,
            decision=decision,
            hit_blocks=work.hit_blocks,
            fetch_blocks=work.fetch_blocks,
            fetch_node=work.fetch_node,
            predicted_ttft_s=work.ttft_s,
            predicted_prefill_s=work.work_s,
            predicted_tbt_s=0.0 if chosen is None else chosen.tbt_s,
            prefill_ticket=prefill_ticket,
            decode_ticket=decode_ticket,
        )

    def _refused(
        self,
        now_s: float,
        facts: RequestFacts,
        work: Prefill,
        chosen: Decode,
        prefills: list[Worker],
        decodes: list[Worker],
    ) -> Rejection | None:
        """Judge a new request's predictions by the objectives, and who may serve it by their load."""
        ttft_s = max(0.0, now_s - facts.arrival_s) + work.ttft_s  # it may have waited in the gate
        if self._config.admission is AdmissionMode.OBJECTIVES:
            return self._over_objectives(facts, ttft_s, chosen.tbt_s)
        if rejected := self._over_objectives(facts, ttft_s, 0.0):
            return rejected
        if rejected := self._too_dear(now_s, facts, work, prefills):
            return rejected
        rooms = {w.id: max(1, w.record.kv_blocks * w.record.block_size) for w in decodes}
        load = self._admission.load_on_arrival(
            now_s, now_s + work.ttft_s, chosen.worker.id, chosen.kv_tokens, rooms, sheddable=_is_batch(facts)
        )
        return _over_load(facts.request_id, load, self._admission.decode_s)

    def _too_dear(
        self, now_s: float, facts: RequestFacts, work: Prefill, prefills: list[Worker]
    ) -> Rejection | None:
        if not self._admission.prices_prompts:
            return None
        queue_s = sum(w.load.queue_s(now_s) for w in prefills) / len(prefills)
        load = self._admission.prompt_load(work.work_s, queue_s)
        if load <= 1:
            return None
        # a queue drains by one second each second
        retry_after_s = retry_after(queue_s * (1 - 1 / load))
        detail = f"{work.work_s:.1f} s of work, and {queue_s:.1f} s of others' on the mean instance"
        return _reject(facts, Reason.PREFILL_LOAD, detail, retry_after_s)

    def _over_objectives(self, facts: RequestFacts, ttft_s: float, tbt_s: float) -> Rejection | None:
        ttft_slo_s = facts.ttft_slo_s
        if ttft_slo_s is None and not _is_batch(facts):  # which is there to wait
            ttft_slo_s = self._config.ttft_slo_s
        tbt_slo_s = self._tbt_slo_s(facts)
        if ttft_slo_s is not None:
            # under overload everybody is let in just in time: what is later than predicted is too late
            ttft_s += min(self._pricing.cost.late_s, ttft_slo_s * LATE_SHARE_MAX)
        if ttft_slo_s is not None and ttft_s > ttft_slo_s:
            # by then the queue has drained to where the same request would fit
            retry_after_s = retry_after(ttft_s - ttft_slo_s)
            detail = f"predicted {ttft_s:.3f} s, objective {ttft_slo_s:.3f} s"
            return _reject(facts, Reason.TTFT_SLO, detail, retry_after_s)
        if tbt_slo_s is not None and tbt_s > tbt_slo_s:
            detail = f"predicted {tbt_s:.4f} s, objective {tbt_slo_s:.4f} s"
            return _reject(facts, Reason.TBT_SLO, detail)
        return None

    def _tbt_slo_s(self, facts: RequestFacts) -> float | None:
        return self._config.tbt_slo_s if facts.tbt_slo_s is None else facts.tbt_slo_s

    # ------------------------------------------------------------ choices

    def _choose_prefill(
        self, now_s: float, facts: RequestFacts, workers: list[Worker], hits: Hits
    ) -> Prefill:
        policy = self._config.policy
        if policy in _PREDICTING:
            options = [self._pricing.prefill(now_s, facts, worker, hits) for worker in workers]
            last, bonus_s = self._sessions.last(facts.session).prefill, self._config.session_bonus_s

            def score(option: Prefill) -> tuple[float, int, str]:
                requests, own = _tie(option.worker)
                return option.ttft_s - (bonus_s if own == last else 0.0), requests, own

            return min(options, key=score)
        if policy is Policy.LEAST_LOAD:
            worker = min(workers, key=lambda w: (w.load.queue_s(now_s), w.load.prefill_requests, *_tie(w)))
        else:
            worker = self._blind(workers, "prefill")
        return self._pricing.prefill(now_s, facts, worker, hits)

    def _choose_decode(
        self,
        facts: RequestFacts,
        emitted_n: int,
        workers: list[Worker],
        hits: Hits,
        node: str | None = None,
    ) -> Decode:
        """Least predicted seconds to the last token; instances without KV room come last."""
        if self._config.policy in {Policy.ROUND_ROBIN, Policy.RANDOM}:
            return self._pricing.decode(facts, self._blind(workers, "decode"), emitted_n)
        left = self._pricing.left(facts, emitted_n)
        last, bonus_s = self._sessions.last(facts.session).decode, self._config.session_bonus_s

        def score(option: Decode) -> tuple[bool, float, str]:
            answer_s = self._pricing.handover_s(facts, option.worker, node, hits) + option.tbt_s * left
            own = option.worker.record.instance_id
            return option.is_full, answer_s - (bonus_s if own == last else 0.0), own

        options = [self._pricing.decode(facts, worker, emitted_n) for worker in workers]
        return min(options, key=score)

    def _blind(self, workers: list[Worker], leg: str) -> Worker:
        if self._config.policy is Policy.RANDOM:
            self._draws += 1
            return workers[_mix(self._config.seed, self._draws) % len(workers)]
        self._turns[leg] += 1
        return workers[(self._turns[leg] - 1) % len(workers)]


def _reject(
    facts: RequestFacts, reason: Reason, detail: str, retry_after_s: float = RETRY_AFTER_S
) -> Rejection:
    return Rejection(request_id=facts.request_id, reason=reason, retry_after_s=retry_after_s, detail=detail)


def _over_load(request_id: str, load: float, decode_s: float) -> Rejection | None:
    if load <= 1:
        return None
    # answers end evenly over t_d, so that is when the part above 1 has gone
    retry_after_s = retry_after(decode_s * (1 - 1 / load))
    detail = f"load of the decode instances {load:.3f}"
    return Rejection(
        request_id=request_id, reason=Reason.DECODE_LOAD, retry_after_s=retry_after_s, detail=detail
    )


def _is_batch(facts: RequestFacts) -> bool:
    return facts.slo_class in CLASSES and CLASSES[facts.slo_class].sheddable


def _tie(worker: Worker) -> tuple[int, str]:
    # idle instances that do both: by id alone, all streams would go to the first one
    return worker.load.decode_requests, worker.record.instance_id


def _by_role(workers: list[Worker], role: str) -> list[Worker]:
    return [w for w in workers if w.record.role in {role, "both"}]


def _no_common_context(facts: RequestFacts, left: list[Worker], right: list[Worker]) -> Rejection:
    seen = ", ".join(f"{w.id} ({w.record.role}) {w.record.context_root[:12]}" for w in [*left, *right])
    wanted = f"request has {facts.context_root[:12]}; " if facts.context_root else ""
    pairs = [differences(a.record.context, b.record.context) for a in left for b in right]
    closest = min(pairs, key=len) if pairs else []
    why = f"; the closest two differ in {', '.join(closest)}" if closest else ""
    return _reject(facts, Reason.NO_COMMON_CONTEXT, f"{wanted}alive context roots: {seen}{why}")


def _mix(seed: int, draw: int) -> int:
    """Splitmix64: a seeded draw that is the same on every machine (this module has no random)."""
    z = (seed + draw * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)
