"""`mooncake conductor` and `mooncake gateway`. Imports nothing heavy before a command runs."""

from typing import Annotated

import typer

from mooncake.cli_common import (
    Address,
    Admission,
    ApiKey,
    BlockSize,
    DecodeTime,
    Dtype,
    Gateways,
    Hold,
    Host,
    HotCopies,
    Inline,
    LogLevel,
    MaxModelLen,
    Metadata,
    Model,
    PlanRoles,
    Policy,
    RunDir,
    TbtSlo,
    Tenants,
    TtftSlo,
    VllmArgs,
    console,
    errors_told,
    refuse_conflicts,
    resolve,
    run_dir_of,
    run_role,
)


def register(app: typer.Typer) -> None:
    """Add our commands to `mooncake`."""
    app.command()(conductor)
    app.command()(gateway)


def conductor(
    model: Model = "",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    gateways: Gateways = None,
    metadata_endpoint: Annotated[
        str, typer.Option(help="Where it serves metadata, or etcd://HOST:PORT,... that has it.")
    ] = "tcp://127.0.0.1:7700",
    address: Address = "127.0.0.1",
    aggregated: Annotated[bool, typer.Option(help="Instances do both.")] = False,
    first_token: Annotated[bool, typer.Option(help="Stream prefill's own first token.")] = False,
    policy: Policy = "kvcache",
    ttft_slo_s: TtftSlo = 0.0,
    tbt_slo_s: TbtSlo = 0.0,
    hold_s: Hold = 0.0,
    admission: Admission = "objectives",
    decode_s: DecodeTime = 0.0,
    inline: Inline = False,
    plan_roles: PlanRoles = False,
    hot_copies: HotCopies = 8,
    tenants: Tenants = None,
    api_key: ApiKey = "",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = 0,
    block_size: BlockSize = 32,
    admin_port: Annotated[
        int, typer.Option(help="First loopback port of the core's and gateways' metrics; 0 = any free.")
    ] = 0,
    run_dir: RunDir = None,
    zygote: Annotated[bool, typer.Option(help="Import vLLM once and fork gateways.")] = True,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run the Conductor: HTTP gateway, scheduler, metadata.

    With --gateways N a decision core and N gateways that share the port run as processes of their own; 0 = a
    core alone. Several such Conductors on one etcd: one core leads, the others stand by, all gateways serve.
    """
    with errors_told():
        import msgspec

        from mooncake.core.config import GatewayOptions, check_host
        from mooncake.core.cpu import resolve_dtype
        from mooncake.model import ModelRef
        from mooncake.up import launch
        from mooncake.up.plan import gateway_names
        from mooncake.up.run import tenant_keys

        refuse_conflicts()
        check_host(host, api_key)
        gateway_names(gateways)
        tenant_keys(str(tenants) if tenants else "")  # told before a model is fetched
        ref = ModelRef(model or "any", model or "any", True) if gateways == 0 else resolve(model)
        options = GatewayOptions(
            model=ref.path_or_name, served_name=ref.served_name, host=host, port=port,
            metadata_endpoint=metadata_endpoint, address=address, aggregated=aggregated,
            first_token=first_token, policy=policy, ttft_slo_s=ttft_slo_s, tbt_slo_s=tbt_slo_s,
            hold_s=hold_s, admission=admission, decode_s=decode_s, inline=inline, plan_roles=plan_roles,
            hot_copies=hot_copies,
            tenants=str(tenants.resolve()) if tenants else "",
            api_key=api_key, dtype=resolve_dtype(dtype), max_model_len=max_model_len, block_size=block_size,
            run_dir=run_dir_of(run_dir), log_level=log_level, vllm_args=vllm_args or [],
        ).checked()  # fmt: skip
        if not gateways:
            role = "conductor" if gateways is None else "core"
            options = msgspec.structs.replace(options, admin_port=admin_port if role == "core" else 0)
            run_role(role, log_level, lambda: launch.ROLES[role][1](options))
        from mooncake.up.conductor import conductor as run_group

        raise typer.Exit(run_group(options, gateways, ref.is_local, console(), zygote, admin_port))


def gateway(
    metadata: Metadata,
    model: Model = "",
    name: Annotated[str, typer.Option(help="Name of the gateway, unique; empty = host and process.")] = "",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
    address: Address = "127.0.0.1",
    aggregated: Annotated[bool, typer.Option(help="Instances do both, while no core answers.")] = False,
    first_token: Annotated[bool, typer.Option(help="Stream prefill's own first token.")] = False,
    tenants: Tenants = None,
    api_key: ApiKey = "",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = 0,
    block_size: BlockSize = 32,
    admin_port: Annotated[int, typer.Option(help="Loopback port of its metrics; 0 = /metrics alone.")] = 0,
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run one stateless gateway: the core that leads decides, see `mooncake conductor --gateways`."""
    with errors_told():
        from mooncake.core.config import GatewayOptions, check_host
        from mooncake.core.cpu import resolve_dtype
        from mooncake.core.shared_port import check_port
        from mooncake.up.launch import run_gateway
        from mooncake.up.run import tenant_keys

        refuse_conflicts()
        check_host(host, api_key)
        tenant_keys(str(tenants) if tenants else "")
        check_port(host, port)
        ref = resolve(model)
        options = GatewayOptions(
            model=ref.path_or_name, served_name=ref.served_name, host=host, port=port, name=name,
            metadata_endpoint=metadata, address=address, aggregated=aggregated, first_token=first_token,
            tenants=str(tenants.resolve()) if tenants else "", admin_port=admin_port,
            api_key=api_key, dtype=resolve_dtype(dtype), max_model_len=max_model_len, block_size=block_size,
            run_dir=run_dir_of(run_dir), log_level=log_level, vllm_args=vllm_args or [],
        ).checked()  # fmt: skip
        run_role("gateway", log_level, lambda: run_gateway(options))
