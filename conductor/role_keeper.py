"""Carries out changes of roles on the real cluster: asks the planner, tells the engines' relays, counts.

Changes by itself only if asked to (`--plan-roles`); else it says on /metrics what it would have
(mooncake_planner_*, for autoscalers and people). POST /mooncake/roles works always. One gateway plans: two
planners would turn each other's decisions round.
"""

import asyncio
import time
from collections.abc import Callable

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from conductor.cluster import ClusterView
from conductor.planner import Forecast, Member, Planner, member_of
from conductor.roles import Changes, Order, check_change

log = structlog.get_logger(__name__)

POLL_S = 0.25
"""Between two looks at those that drain."""

Send = Callable[[Order], bool]
"""Deliver an order to the relay of an instance; whether there is a link to it."""


class RoleMetrics:
    """Of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """A second one in the same registry raises."""
        self.switches = Counter(
            "mooncake_role_switches", "Changes of roles begun, by the new role.", ["role"], registry=registry
        )
        for role in ("prefill", "decode"):
            self.switches.labels(role)  # shown as 0
        self.pressure = Gauge(
            "mooncake_planner_pressure_ratio",
            "What the planner expects a pool to feel; above 1 it is too small.",
            ["role"],
            registry=registry,
        )
        self.wanted = Gauge(
            "mooncake_planner_desired_instances",
            "Instances that the expected load needs, by role: what to scale on.",
            ["role"],
            registry=registry,
        )
        self.requests_s = Gauge(
            "mooncake_planner_forecast_requests_per_second",
            "Arrivals that the planner expects.",
            registry=registry,
        )

    def forecast(self, forecast: Forecast) -> None:
        """Show what the planner believes."""
        self.pressure.labels("prefill").set(forecast.prefill_pressure)
        self.pressure.labels("decode").set(forecast.decode_pressure)
        self.wanted.labels("prefill").set(forecast.prefill_wanted)
        self.wanted.labels("decode").set(forecast.decode_wanted)
        self.requests_s.set(forecast.requests_s)

    def clear(self) -> None:
        """Somebody else plans from now on: of two that say how many there should be, one is wrong."""
        self.pressure.clear()
        self.wanted.clear()
        self.requests_s.set(0)


class RoleKeeper:
    """Lives on the gateway's loop."""

    def __init__(
        self,
        view: ClusterView,
        send: Send,
        metrics: RoleMetrics,
        planner: Planner | None,
        changes: Changes | None = None,
        *,
        acts: bool = True,
    ) -> None:
        """Nothing happens before `start`.

        `planner` None = nobody says how many instances there should be. `acts` False: it says so, and only
        people change roles.
        """
        self.planner = planner
        self.acts = acts
        self._view = view
        self._send = send
        self._metrics = metrics
        self._changes = Changes() if changes is None else changes
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="roles")

    async def close(self) -> None:
        """End; instances that drain take their old role again when their lease ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._metrics.clear()

    def change(self, instance_id: str, role: str) -> None:
        """Begin a change that somebody asks for.

        Raises:
            RequestError: it cannot be followed.
        """
        check_change({one.instance_id: one for one in self._members()}, instance_id, role)
        self._begin(instance_id, role, "asked for")

    async def _run(self) -> None:
        planned_s = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                now_s = time.monotonic()
                for order in self._changes.step(now_s, self._is_busy):
                    self._tell(order)
                if self.planner is not None and now_s - planned_s >= self.planner.interval_s:
                    planned_s = now_s
                    self._plan(self.planner)
            except Exception:  # one bad step must not end all of them
                log.exception("roles.step_failed")

    def _plan(self, planner: Planner) -> None:
        for switch in planner.step(self._members()):
            if self.acts and switch.instance_id not in self._changes:
                self._begin(switch.instance_id, switch.role, "planned")
        self._metrics.forecast(planner.forecast)

    def _begin(self, instance_id: str, role: str, why: str) -> None:
        log.info("roles.change", instance=instance_id, role=role, why=why)
        self._metrics.switches.labels(role).inc()
        self._tell(self._changes.begin(time.monotonic(), instance_id, role))

    def _tell(self, order: Order) -> None:
        if not self._send(order):
            # a lost link is a lost instance: it comes back with the role that its relay has
            log.warning("roles.order_lost", instance=order.instance_id, role=order.role)

    def _is_busy(self, instance_id: str) -> bool | None:
        known = self._view.record(instance_id) is not None
        return self._view.load(instance_id).is_busy if known else None

    def _members(self) -> list[Member]:
        now_s = time.monotonic()
        return [member_of(now_s, record, load) for record, load in self._view.alive()]
