"""The decision core: what is known of the cluster and who decides by it, wired together.

In the gateway's process when there is one gateway; in a process of its own (conductor.core_service) when
several share it.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from conductor.admission import AdmissionMode
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.describe import described
from conductor.gate import Gate, GateConfig
from conductor.heat import Heat
from conductor.hot_copies import HotCopies, HotMetrics
from conductor.index import PrefixIndex
from conductor.links import Link
from conductor.local_decider import LocalDecider
from conductor.members import Members, Sink
from conductor.metrics import DecisionMetrics
from conductor.observe import Observer, Planned
from conductor.plan import Plan, RequestFacts
from conductor.planner import Planner, PlannerConfig
from conductor.role_keeper import RoleKeeper, RoleMetrics
from conductor.scheduler import Mode, Policy, Scheduler, SchedulerConfig
from conductor.tenants import Quotas
from conductor.tenants_file import read_tenants
from mooncake.core.messages import Pulse
from mooncake.core.metadata import MetadataStore
from mooncake.core.options import GatewayOptions

if TYPE_CHECKING:
    from conductor.vllm_seam import EngineCoreOutputs
    from mooncake.core.tracing_sdk import Tracing

SESSION_BONUS_S = 0.05
"""What an engine's own cache may save of a session's next turn where the index does not know it: blocks that
have no name, and those of the last tenths of a second."""


class Core:
    """View, index, cost model, scheduler, gate, quotas, roles and hot copies of one cluster."""

    def __init__(self, options: GatewayOptions, metadata: MetadataStore, metrics: DecisionMetrics) -> None:
        """Nothing runs before `start`.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        self.options = options
        self.metrics = metrics
        self.tracing: Tracing | None = None  # of its process, where decisions get spans of their own
        self.view = ClusterView()
        self.index, self.cost = PrefixIndex(), CostModel()
        name = f"gateway-{secrets.token_hex(4)}"  # a restarted one is another one
        self.members = Members(metadata, self.view, self.index, name, metrics, address=options.address)
        self.quotas = Quotas(read_tenants(options.tenants))
        self.decider = build_decider(
            scheduler_config(options), options.hold_s, self.view, self.index, self.cost, self.quotas,
            self.members.stores_in_step, metrics,
        )  # fmt: skip
        planner = Planner(PlannerConfig(tbt_slo_s=options.tbt_slo_s or None), self.cost)
        self.decider.observer.listen(telling(planner, self.cost), planner.answered)
        self.roles = RoleKeeper(
            self.view, self.members.order_role, RoleMetrics(metrics.registry), planner,
            acts=options.plan_roles,
        )  # fmt: skip
        self._planner = planner
        self._heat = Heat(self.cost, options.hot_copies)
        self.hot = HotCopies(self._heat, self.view, self.index, metadata, HotMetrics(metrics.registry))

    def start(self, sink: Sink | None = None) -> None:
        """Follow the cluster, on the running loop.

        `sink`: the dispatcher of this process, for which alone it decides; None: of others, see `act`.
        """
        self.members.start(_OwnSink(self.decider) if sink is None else sink)
        if sink is not None:
            self.act()
            self.decider.observer.listen(self.hot.planned)  # whole keys, which a core does not get
            self.hot.start()

    def act(self) -> None:
        """Begin to tell engines which roles to take: who decides, and nobody else."""
        self.metrics.leads.set(1)
        self.roles.start()

    async def rest(self) -> None:
        """End what `act` began (idempotent)."""
        self.metrics.leads.set(0)
        await self.roles.close()

    async def close(self) -> None:
        """End everything."""
        await self.hot.close()
        await self.rest()
        await self.members.close()

    def prepare(self, options: GatewayOptions) -> Callable[[], None]:
        """Return what makes it decide by other options, as far as that can change; what is in flight stays.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        tenants, config = read_tenants(options.tenants), scheduler_config(options)

        def change() -> None:
            self.options = options
            self.quotas.change(time.monotonic(), tenants)
            change_decider(self.decider, config, options.hold_s)
            self._planner.change(PlannerConfig(tbt_slo_s=config.tbt_slo_s))
            self.roles.acts = options.plan_roles
            self._heat.change(options.hot_copies)

        return change

    def status(self) -> dict[str, Any]:
        """Return who decides, JSON-ready."""
        return {"mode": "local"}

    async def instances(self) -> list[dict[str, Any]]:
        """Return the instances as JSON-ready dictionaries."""
        return described(self.view, self.members)

    async def decisions(self, request_id: str) -> list[dict[str, Any]]:
        """Return the last decisions, newest first; only those of `request_id`, if given."""
        found: list[dict[str, Any]] = msgspec.to_builtins(self.decider.decisions.last(request_id))
        return found

    async def change_role(self, instance_id: str, role: str) -> None:
        """Begin a change of roles.

        Raises:
            RequestError: it cannot be followed.
        """
        self.roles.change(instance_id, role)


def telling(planner: Planner, cost: CostModel) -> Planned:
    """Return what tells a planner of roles of every plan."""

    def planned(facts: RequestFacts, plan: Plan) -> None:
        answer_tokens = cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class)
        planner.planned(plan, facts.prompt_len, answer_tokens, facts.max_tokens)

    return planned


def build_decider(
    config: SchedulerConfig,
    hold_s: float,
    view: ClusterView,
    index: PrefixIndex,
    cost: CostModel,
    quotas: Quotas,
    stores: Callable[[], Mapping[str, bool]],
    metrics: DecisionMetrics,
    *,
    away: bool = False,
) -> LocalDecider:
    """Return who decides by `view` and `index`; see LocalDecider and Observer for the rest."""
    scheduler = Scheduler(config, index, cost, view)
    gate = Gate(GateConfig(hold_s=hold_s), view, lambda name: quotas.tenants.weight(name), cost)
    observer = Observer(cost, metrics, away)
    return LocalDecider(view, scheduler, cost, gate, quotas, observer, stores, metrics)


def change_decider(decider: LocalDecider, config: SchedulerConfig, hold_s: float) -> None:
    """Let a decider go by other values; who waits is looked at with the next tick."""
    decider.scheduler.change(config)
    decider.gate.change(GateConfig(hold_s=hold_s))


class _OwnSink:
    """Of a core without a dispatcher: it has no requests at engines."""

    reads_outputs = False

    def __init__(self, decider: LocalDecider) -> None:
        self._decider = decider

    def on_outputs(self, link: Link, outputs: "EngineCoreOutputs") -> None:
        """See Sink."""

    def on_lost(self, instance_id: str, reason: str) -> None:  # noqa: ARG002
        """See Sink."""
        self._decider.on_lost(instance_id)

    def on_draining(self, instance_id: str) -> None:
        """See Sink."""

    def on_pulse(self, link: Link, pulse: Pulse) -> None:
        """See Sink."""
        self._decider.on_pulse(link.instance_id, pulse)

    def on_tick(self, now_s: float) -> None:
        """See Sink."""
        self._decider.on_tick(now_s)


def scheduler_config(options: GatewayOptions) -> SchedulerConfig:
    """Return what the options mean to the scheduler; an objective of 0 is none."""
    return SchedulerConfig(
        mode=Mode.AGGREGATED if options.aggregated else Mode.DISAGGREGATED,
        policy=Policy(options.policy),
        ttft_slo_s=options.ttft_slo_s or None,
        tbt_slo_s=options.tbt_slo_s or None,
        admission=AdmissionMode(options.admission),
        decode_s=options.decode_s or None,
        inline=options.inline,
        append=options.inline or options.tbt_slo_s > 0,  # its batch has an objective that it keeps
        session_bonus_s=SESSION_BONUS_S,
    )
