"""The gateway process: vLLM's HTTP front end over the cluster, with the decision core or over rpc to it.

startup     metadata (served here if the core is), vLLM's configuration (in a thread: engines register
            meanwhile), AsyncLLM over ClusterCoreClient, HTTP
main loop   the event loop; nothing of ours blocks it
shutdown    SIGTERM or SIGINT: not ready; after drain_delay_s take no new connections, finish what is in
            flight (within drain_s), leave
"""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from conductor import vllm_seam
from conductor.agents import Agents
from conductor.announce import DrainAnnounced
from conductor.core import Core
from conductor.core_client import ClusterCoreClient
from conductor.cost import CostModel
from conductor.describe import described_stores
from conductor.dispatch import Dispatcher
from conductor.http import RejectionMiddleware, tenant_served
from conductor.keeper import Keeper, KeeperMetrics
from conductor.key_guard import KeyGuard
from conductor.live import cluster_parts, live_page
from conductor.metrics import process_metrics
from conductor.processes import (
    joined_metadata,
    open_cluster_metadata,
    process_name,
    traced,
)
from conductor.remote_core import RemoteCore
from conductor.spans import Traces
from mooncake.core.attend import attended
from mooncake.core.config import ROLES, check_host, host_port
from mooncake.core.errors import MooncakeError, PeerError, RequestError
from mooncake.core.health import Health, Phase
from mooncake.core.messages import CORES_PREFIX, DRAINING, GATEWAYS_PREFIX, FrontRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_registration import Registration
from mooncake.core.options import GatewayOptions
from mooncake.core.reload import reloading
from mooncake.live.ring import part_of

log = structlog.get_logger(__name__)

DRAIN_LOG_S = 10.0
"""Between two lines about what a gateway that leaves still waits for."""


class Cluster:
    """Everything between vLLM's front end and the relays, wired together."""

    def __init__(
        self, options: GatewayOptions, metadata: MetadataStore, core: Core | RemoteCore | None = None
    ) -> None:
        """Nothing runs before `start`. `core`: who decides; None: this process, and nobody else.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        metrics = self._metrics = process_metrics()
        metrics.set_objectives(options.ttft_slo_s or None, options.tbt_slo_s or None)
        metrics.set_model(options.served_name or options.model)
        self.core = Core(options, metadata, metrics) if core is None else core
        self.view = self.core.view
        self.members = self.core.members
        self.quotas = self.core.quotas
        self.dispatcher = Dispatcher(
            self.members, self.core.decider, metrics, first_token=options.first_token
        )
        self.client = ClusterCoreClient(self.dispatcher, self.members)
        cost = self.core.cost if isinstance(self.core, Core) else CostModel()  # compares contexts only
        self.agents = Agents(cost, self.view)
        self.keeper = Keeper(self.agents, self.view, KeeperMetrics(metrics.registry))

    def start(self, llm: Any) -> None:
        """Begin, under the AsyncLLM that was made over `client`."""
        self.client.bind(llm, vllm_seam.fail_requests)
        self.core.start(self.dispatcher)
        self.keeper.start()

    def prepare(self, options: GatewayOptions) -> Callable[[], None]:
        """Return what makes it go by other options, as far as that can change.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        change = self.core.prepare(options)

        def changed() -> None:
            change()
            self._metrics.set_objectives(options.ttft_slo_s or None, options.tbt_slo_s or None)

        return changed

    async def close(self) -> None:
        """End what `start` began."""
        await self.keeper.close()
        await self.core.close()

    async def drain(self) -> None:
        """Take nothing new and wait for what is in flight; whoever asks has a limit."""
        log.info("gateway.draining", in_flight=self.dispatcher.in_flight)
        self.dispatcher.refuse("the gateway is shutting down")
        while not await self.dispatcher.idle(DRAIN_LOG_S):
            log.warning("gateway.still_draining", in_flight=self.dispatcher.in_flight)

    @property
    def can_serve(self) -> bool:
        """Whether an engine is there that takes requests."""
        return any(record.role in ROLES for record, _ in self.view.alive())


def vllm_arguments(options: GatewayOptions) -> list[str]:
    """Return vLLM's front-end flags for `options`; later ones win, so the user's come last."""
    arguments = [
        f"--model={options.model}",
        f"--host={options.host}",
        f"--port={options.port}",
        f"--block-size={options.block_size}",
        f"--dtype={options.dtype}",
    ]
    if options.served_name:
        arguments.append(f"--served-model-name={options.served_name}")
    if options.max_model_len:
        arguments.append(f"--max-model-len={options.max_model_len}")
    return [*arguments, *options.vllm_args]


def configure(options: GatewayOptions) -> tuple[argparse.Namespace, Any]:
    """Return vLLM's arguments and configuration. Takes seconds; may run in a thread.

    Raises:
        ConfigError: vLLM rejects its flags, or they would serve a network without a key.
    """
    args = vllm_seam.parse_args(vllm_arguments(options))
    if options.api_key:
        args.api_key = [*(args.api_key or []), options.api_key]
    if not args.uds:  # flags of the user's may have changed what options.checked() saw
        check_host(args.host or "0.0.0.0", "".join(api_keys(args)))
    vllm_seam.load_plugins(args)
    return args, vllm_seam.build_config(args)


def api_keys(args: argparse.Namespace) -> list[str]:
    """Return the keys that open the HTTP port, as vLLM's own middleware takes them."""
    given = args.api_key or [os.environ.get("VLLM_API_KEY")]
    return [key for key in given if key]


class RoleWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /mooncake/roles."""

    instance_id: str
    role: str


async def fronts(metadata: MetadataStore, prefix: str) -> list[dict[str, Any]]:
    """Return the gateways or cores that have their own process, sorted by name; none while nobody knows."""
    try:
        entries = (await metadata.get(prefix)).entries
        found = [msgspec.json.decode(entry.value, type=FrontRecord) for entry in entries]
    except PeerError:  # the store is away, which its client tells once; people look here every second
        return []
    except (MooncakeError, msgspec.MsgspecError) as error:
        log.warning("gateway.fronts_unknown", prefix=prefix, error=str(error))
        return []
    return [msgspec.to_builtins(one) for one in sorted(found, key=lambda one: one.name)]


def add_routes(app: Any, cluster: Cluster, metadata: MetadataStore) -> None:
    """Add what only we know; KeyGuard stands before it.

    GET /mooncake/instances: who is there. GET /mooncake/decisions[?request_id=...]: why requests run where
    they run, newest first (see conductor.why). POST /mooncake/roles {"instance_id": ..., "role": ...}: let an
    instance take another role (see conductor.roles).
    """
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def instances(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse({
            "instances": await cluster.core.instances(),
            "stores": described_stores(cluster.view),
            "core": cluster.core.status(),
            "gateways": await fronts(metadata, GATEWAYS_PREFIX),
            "cores": await fronts(metadata, CORES_PREFIX),
            "in_flight": cluster.dispatcher.in_flight,
            "pid": os.getpid(),
        })  # fmt: skip

    async def decisions(request: Request) -> Response:
        found = await cluster.core.decisions(request.query_params.get("request_id", ""))
        return JSONResponse({"decisions": found})

    async def roles(request: Request) -> Response:
        try:
            wish = msgspec.json.decode(await request.body(), type=RoleWish)
            await cluster.core.change_role(wish.instance_id, wish.role)
        except (msgspec.MsgspecError, RequestError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except MooncakeError as error:  # no core leads: only one may change roles
            return JSONResponse({"error": str(error)}, status_code=503)
        return JSONResponse({"instance_id": wish.instance_id, "role": DRAINING, "next": wish.role}, 202)

    for path, answer, method in (
        ("instances", instances, "GET"),
        ("decisions", decisions, "GET"),
        ("roles", roles, "POST"),
    ):
        app.router.routes.insert(0, Route(f"/mooncake/{path}", answer, methods=[method]))


async def run(options: GatewayOptions, alone: bool = True) -> None:
    """Serve until SIGTERM or SIGINT; `alone`: with the decision core in this process.

    Raises:
        ConfigError: a setting cannot work.
    """
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(
            attended("conductor" if alone else "gateway", options, process_metrics().registry)
        )
        own.leaving.on_signals()
        opened = open_cluster_metadata if alone else joined_metadata
        metadata = await stack.enter_async_context(opened(options.metadata_endpoint))
        args, config = await asyncio.to_thread(configure, options)
        core = None if alone else RemoteCore(options, metadata, process_metrics())
        cluster = Cluster(options, metadata, core)
        llm = vllm_seam.build_llm(args, config, cluster.client, tenant_served)
        stack.callback(llm.shutdown)
        stack.push_async_callback(cluster.close)
        app = await vllm_seam.build_app(llm, args)
        add_routes(app, cluster, metadata)
        cluster.start(llm)
        own.leaving.in_flight = lambda: cluster.dispatcher.in_flight
        await stack.enter_async_context(
            reloading(options, process_metrics().registry, own.admin, cluster.prepare)
        )
        record = front_record(options, args, own.metrics_url)
        this = part_of("conductor" if alone else record.name, own.metrics_url)
        await stack.enter_async_context(
            live_page(
                own.admin, this, process_metrics().registry,
                cluster_parts(cluster.view, metadata), prometheus_url=options.prometheus_url, always=alone,
            )
        )  # fmt: skip
        value = msgspec.json.encode(record)
        registration = Registration(metadata, GATEWAYS_PREFIX + record.name, lambda: value)
        stack.push_async_callback(registration.close)
        key = next(iter(api_keys(args)), "")
        tracing = traced(stack, "gateway", record.name)
        guard = KeyGuard(app, api_keys(args))
        front = RejectionMiddleware(
            guard, cluster.quotas, key, hopeless=cluster.dispatcher.hopeless, agents=cluster.agents,
            traces=None if tracing is None else Traces(tracing, served_name(args)),
            answered=process_metrics().answered, lets_in=guard.lets_in,
        )  # fmt: skip

        def serves() -> None:
            if not alone:
                registration.start()
            own.health.started()
            own.look = lambda: tell_ready(own.health, cluster)

        announced = DrainAnnounced(front, own.health)
        serving = vllm_seam.Serving(
            own.leaving, cluster.drain, serves, options.share_port, options.drain_delay_s
        )
        await vllm_seam.serve(app, announced, args, serving)


def tell_ready(health: Health, cluster: Cluster) -> None:
    """Say whether requests had better come here.

    A gateway that has seen no engine yet would answer 503 where others can serve. Once it has, it stays
    ready: if the engines go, an answer with Retry-After tells clients more than a closed door.
    """
    if health.phase is Phase.READY:
        return
    if cluster.can_serve:
        health.ready()
    else:
        health.unready("no engine that takes requests has been seen yet")


def served_name(args: argparse.Namespace) -> str:
    """Return what clients call the model."""
    names = args.served_model_name or [args.model]
    return str(names[0])


def front_record(options: GatewayOptions, args: argparse.Namespace, metrics_url: str) -> FrontRecord:
    """Return what this gateway says of itself."""
    host = args.host or "0.0.0.0"
    scheme = "https" if args.ssl_certfile else "http"
    url = f"{scheme}://{host_port(host, args.port)}"
    return FrontRecord(process_name(options, "gateway"), os.getpid(), url, metrics_url)


def main(options: GatewayOptions, alone: bool = True) -> int:
    """Run the gateway on uvloop; return the exit status.

    Raises:
        ConfigError: a setting cannot work, or the installed vLLM is not the one we know.
    """
    import uvloop

    vllm_seam.check_environment()
    uvloop.run(run(options.checked(), alone))
    return 0
