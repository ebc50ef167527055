"""The processes: `mooncake up`, `conductor`, `gateway`, `prefill`, `decode`, `follower`, `store`.

Imports nothing heavy before one of them runs.
"""

import os
import socket
from typing import TYPE_CHECKING, TypeVar

import typer

from mooncake.cli_common import console, refuse_conflicts, resolve, run_dir_of, run_role
from mooncake.cli_settings import settings_command

if TYPE_CHECKING:
    from mooncake.core.options import (
        ConductorOptions,
        FollowerOptions,
        GatewayOptions,
        LoneGatewayOptions,
        PrefillOptions,
        StoreOptions,
        UpOptions,
        WorkerOptions,
    )

Front = TypeVar("Front", bound="GatewayOptions")


def register(app: typer.Typer) -> None:
    """Add our commands to `mooncake`."""
    for section, main in (
        ("up", up), ("conductor", conductor), ("gateway", gateway), ("prefill", prefill), ("decode", decode),
        ("follower", follower), ("store", store),
    ):  # fmt: skip
        settings_command(app, section, main)


def up(options: "UpOptions") -> None:
    """Start a whole cluster on this machine; Ctrl-C stops it."""
    from mooncake.core.cpu import resolve_dtype
    from mooncake.core.shared_port import check_port
    from mooncake.up.metrics import with_admin_ports
    from mooncake.up.plan import make_plan
    from mooncake.up.run import tenant_keys
    from mooncake.up.run import up as run_up

    refuse_conflicts()
    options = options.replace(dtype=resolve_dtype(options.dtype))
    _use_cores(options.cores)
    # everything that can be wrong is told before a model is fetched
    draft = options.replace(model="checked later", served_name="m", run_dir="/r")
    make_plan(draft, [0], tenant_keys(options.tenants))
    check_port(options.host, options.port)
    with_admin_ports(draft)
    ref = resolve(options.model)
    options = options.replace(
        model=ref.path_or_name,
        served_name=ref.served_name,
        model_is_local=ref.is_local,
        run_dir=run_dir_of(options.run_dir),
    )
    raise typer.Exit(run_up(options, console()))


def _use_cores(cores: list[int]) -> None:
    from mooncake.core.config import fail

    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)  # children inherit it
    except (OSError, ValueError):
        raise fail("cores", cores, f"this machine has {os.cpu_count()} cores") from None


def conductor(options: "ConductorOptions") -> None:
    """Run the Conductor: HTTP gateway, scheduler, metadata.

    With --gateways N a decision core and N gateways that share the port run as processes of their own; 0 = a
    core alone. Several such Conductors on one etcd: one core leads, the others stand by, all gateways serve.
    """
    from mooncake.model import ModelRef
    from mooncake.up import launch
    from mooncake.up.conductor import conductor as run_group

    is_core = options.gateways == 0
    _check_front(options)
    model = options.model or "any"
    ref = ModelRef(model, model, True) if is_core else resolve(options.model)
    options = _resolved(options, ref.path_or_name, ref.served_name)
    if options.gateways:
        raise typer.Exit(run_group(options, ref.is_local, console()))
    if is_core:
        run_role("core", options, lambda: launch.run_core(options))
    run_role("conductor", options, lambda: launch.run_conductor(options))


def gateway(options: "LoneGatewayOptions") -> None:
    """Run one stateless gateway: the core that leads decides, see `mooncake conductor --gateways`."""
    from mooncake.core.shared_port import check_port
    from mooncake.up.launch import run_gateway

    _check_front(options)
    check_port(options.host, options.port)
    ref = resolve(options.model)
    made = _resolved(options, ref.path_or_name, ref.served_name)
    run_role("gateway", made, lambda: run_gateway(made))


def _check_front(options: "GatewayOptions") -> None:
    """Tell what is wrong before a model is fetched."""
    from mooncake.up.run import tenant_keys

    refuse_conflicts()
    options.checked()
    tenant_keys(options.tenants)


def _resolved(options: Front, model: str, served_name: str) -> Front:
    from mooncake.core.cpu import resolve_dtype

    dtype, run_dir = resolve_dtype(options.dtype), run_dir_of(options.run_dir)
    return options.replace(model=model, served_name=served_name, dtype=dtype, run_dir=run_dir)


def prefill(options: "PrefillOptions") -> None:
    """Run one prefill instance."""
    _worker(options, "both" if options.both else "prefill")


def decode(options: "WorkerOptions") -> None:
    """Run one decode instance."""
    _worker(options, "decode")


def _worker(options: "WorkerOptions", role: str) -> None:
    from mooncake.core.cpu import resolve_dtype
    from mooncake.up.launch import run_decode, run_prefill

    refuse_conflicts()
    options.checked()
    ref = resolve(options.model)
    made = options.replace(
        role=role,
        model=ref.path_or_name,
        served_name=ref.served_name,
        instance_id=options.instance_id or f"{role}-{socket.gethostname().split('.')[0]}-{os.getpid()}"[:64],
        dtype=resolve_dtype(options.dtype),
        run_dir=run_dir_of(options.run_dir),
    )
    run = run_decode if role == "decode" else run_prefill
    run_role(made.instance_id, made, lambda: run(made))


def follower(options: "FollowerOptions") -> None:
    """Run one more node of an engine that spans several, see `mooncake decode --nodes`."""
    from mooncake.up.launch import run_follower

    refuse_conflicts()
    options.checked()
    model = resolve(options.model).path_or_name if options.model else ""
    made = options.replace(model=model, run_dir=run_dir_of(options.run_dir))
    run_role(f"follower-{made.node_rank}", made, lambda: run_follower(made))


def store(options: "StoreOptions") -> None:
    """Run the KV pool's node of this host."""
    from mooncake.up.launch import run_store

    made = options.checked().replace(run_dir=run_dir_of(options.run_dir))
    run_role("store", made, lambda: run_store(made))
