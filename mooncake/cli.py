"""The `mooncake` command. Imports nothing heavy before a command runs: --help must be instant."""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mooncake import bench_cli, conductor_cli, indexer_cli, pool_cli, simulate_cli
from mooncake.cli_common import (
    Address,
    Admission,
    ApiKey,
    BlockSize,
    DecodeTime,
    Dtype,
    Eviction,
    Gateways,
    Hold,
    Host,
    Hugepages,
    Inline,
    KvMemory,
    LoadMode,
    LogLevel,
    MaxModelLen,
    Metadata,
    Model,
    PlanRoles,
    Policy,
    RunDir,
    Ssd,
    SsdSize,
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

app = typer.Typer(
    name="mooncake",
    help="KVCache-centric, disaggregated LLM serving on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # coloured help costs 0.3 s of imports
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def up(
    model: Model = "",
    prefill: Annotated[int, typer.Option(help="Prefill instances.")] = 1,
    decode: Annotated[int, typer.Option(help="Decode instances.")] = 1,
    aggregated: Annotated[int, typer.Option(help="Instead: so many instances that do both.")] = 0,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port of the gateway.")] = 8000,
    pool_size: Annotated[str, typer.Option(help="Memory of the shared KV pool.")] = "1GiB",
    eviction: Eviction = "lru",
    hugepages: Hugepages = "auto",
    ssd: Ssd = None,
    ssd_size: SsdSize = "8GiB",
    kv_memory: KvMemory = "512MiB",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = 0,
    block_size: BlockSize = 32,
    load_mode: LoadMode = "async",
    first_token: Annotated[bool, typer.Option(help="Stream prefill's own first token.")] = False,
    policy: Policy = "kvcache",
    ttft_slo_s: TtftSlo = 0.0,
    tbt_slo_s: TbtSlo = 0.0,
    hold_s: Hold = 0.0,
    admission: Admission = "objectives",
    decode_s: DecodeTime = 0.0,
    inline: Inline = False,
    plan_roles: PlanRoles = False,
    tenants: Tenants = None,
    gateways: Gateways = None,
    admin_port: Annotated[
        int, typer.Option(help="First loopback port of the store's and engines' metrics; 0 = any free.")
    ] = 0,
    cores: Annotated[str, typer.Option(help="auto, or the cores to use, e.g. 0-3.")] = "auto",
    api_key: ApiKey = "",
    run_dir: RunDir = None,
    zygote: Annotated[bool, typer.Option(help="Import vLLM once and fork engines.")] = True,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Start a whole cluster on this machine; Ctrl-C stops it."""
    with errors_told():
        from mooncake.core.config import parse_cores, parse_size_bytes
        from mooncake.core.cpu import resolve_dtype
        from mooncake.core.shared_port import check_port
        from mooncake.up.metrics import with_admin_ports
        from mooncake.up.plan import UpOptions, make_plan
        from mooncake.up.run import default_run_dir, tenant_keys
        from mooncake.up.run import up as run_up

        refuse_conflicts()
        wish: dict[str, Any] = {
            "prefill": prefill, "decode": decode, "aggregated": aggregated, "host": host, "port": port,
            "pool_bytes": parse_size_bytes(pool_size, "pool_size"),
            "eviction": eviction, "hugepages": hugepages,
            "ssd_path": str(ssd.resolve()) if ssd else "",
            "ssd_bytes": parse_size_bytes(ssd_size, "ssd_size"),
            "kv_memory_bytes": parse_size_bytes(kv_memory, "kv_memory"),
            "dtype": resolve_dtype(dtype), "max_model_len": max_model_len, "block_size": block_size,
            "load_mode": load_mode, "first_token": first_token, "log_level": log_level,
            "policy": policy, "ttft_slo_s": ttft_slo_s, "tbt_slo_s": tbt_slo_s,
            "hold_s": hold_s, "admission": admission, "decode_s": decode_s, "inline": inline,
            "plan_roles": plan_roles, "gateways": gateways,
            "tenants": str(tenants.resolve()) if tenants else "",
            "vllm_args": vllm_args or [],
        }  # fmt: skip
        if cores != "auto":
            _use_cores(parse_cores(cores))
        # everything that can be wrong is told before a model is fetched
        draft = UpOptions(model="checked later", served_name="m", run_dir="/r", **wish)
        make_plan(draft, [0], api_key, tenant_keys(draft.tenants))
        check_port(host, port)
        with_admin_ports(draft, admin_port)
        ref = resolve(model)
        folder = str(run_dir.resolve()) if run_dir else str(default_run_dir())
        options = UpOptions(
            model=ref.path_or_name,
            served_name=ref.served_name,
            model_is_local=ref.is_local,
            run_dir=folder,
            **wish,
        )
        raise typer.Exit(run_up(options, api_key, console(), zygote, admin_port))


def _use_cores(cores: list[int]) -> None:
    from mooncake.core.config import fail

    try:
        os.sched_setaffinity(0, cores)  # children inherit it
    except (OSError, ValueError):
        raise fail("cores", cores, f"this machine has {os.cpu_count()} cores") from None


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="Folder or hub name; nothing = the default.")] = "",
) -> None:
    """Fetch and convert the default model, or check another one; prints its path."""
    with errors_told():
        typer.echo(resolve(name).path_or_name)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
    port: Annotated[int, typer.Option(help="The gateway's port to look at.")] = 8000,
) -> None:
    """Look whether this machine can run Mooncake; exit code 1 if not."""
    import msgspec
    from rich.markup import escape
    from rich.table import Table

    from mooncake.doctor import FAIL, examine

    rows = examine(port)
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    else:
        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table("check", "state", "found", "what to do", box=None)
        for row in rows:
            state = f"[{styles[row.state]}]{row.state}[/]"
            table.add_row(row.name, state, escape(row.found), escape(row.advice))
        console().print(table)
    raise typer.Exit(any(row.state == FAIL for row in rows))


def _worker(
    role: str,
    name: str,
    model: str,
    dtype: str,
    kv_memory: str,
    cores: str,
    run_dir: Path | None,
    **rest: Any,
) -> None:
    with errors_told():
        from mooncake.core.config import WorkerOptions, parse_cores, parse_size_bytes
        from mooncake.core.cpu import resolve_dtype
        from mooncake.up.launch import run_decode, run_prefill

        refuse_conflicts()
        ref = resolve(model)
        options = WorkerOptions(
            role=role,
            model=ref.path_or_name,
            served_name=ref.served_name,
            instance_id=name or f"{role}-{socket.gethostname().split('.')[0]}-{os.getpid()}",
            dtype=resolve_dtype(dtype),
            cores=parse_cores(cores),
            kv_memory_bytes=parse_size_bytes(kv_memory, "kv_memory"),
            run_dir=run_dir_of(run_dir),
            **rest,
        ).checked()
        run = run_decode if role == "decode" else run_prefill
        run_role(options.instance_id, options.log_level, lambda: run(options))


Name = Annotated[str, typer.Option(help="Name of the instance; must be unique.")]
Node = Annotated[str, typer.Option(help="Node name of the store on this host.")]
Cores = Annotated[str, typer.Option(help="Cores to bind, e.g. 0 or 0-3; empty = none.")]
Pool = Annotated[bool, typer.Option(help="Share KV blocks through the pool.")]
AdminPort = Annotated[int, typer.Option(help="Loopback port of Prometheus metrics; 0 = none.")]


@app.command()
def prefill(
    metadata: Metadata,
    model: Model = "",
    name: Name = "",
    node: Node = "local",
    address: Address = "127.0.0.1",
    cores: Cores = "",
    kv_memory: KvMemory = "512MiB",
    max_model_len: MaxModelLen = 0,
    dtype: Dtype = "auto",
    load_mode: LoadMode = "async",
    block_size: BlockSize = 32,
    both: Annotated[bool, typer.Option("--both", help="An aggregated instance: decodes too.")] = False,
    pool: Pool = True,
    admin_port: AdminPort = 0,
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run one prefill instance."""
    _worker(
        "both" if both else "prefill", name, model, dtype, kv_memory, cores, run_dir,
        metadata=metadata, node=node, address=address, max_model_len=max_model_len, load_mode=load_mode,
        block_size=block_size, use_pool=pool, admin_port=admin_port, log_level=log_level,
        vllm_args=vllm_args or [],
    )  # fmt: skip


@app.command()
def decode(
    metadata: Metadata,
    model: Model = "",
    name: Name = "",
    node: Node = "local",
    address: Address = "127.0.0.1",
    cores: Cores = "",
    kv_memory: KvMemory = "512MiB",
    max_model_len: MaxModelLen = 0,
    dtype: Dtype = "auto",
    load_mode: LoadMode = "async",
    block_size: BlockSize = 32,
    pool: Pool = True,
    admin_port: AdminPort = 0,
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run one decode instance."""
    _worker(
        "decode", name, model, dtype, kv_memory, cores, run_dir,
        metadata=metadata, node=node, address=address, max_model_len=max_model_len, load_mode=load_mode,
        block_size=block_size, use_pool=pool, admin_port=admin_port, log_level=log_level,
        vllm_args=vllm_args or [],
    )  # fmt: skip


@app.command()
def store(
    metadata: Metadata,
    capacity: Annotated[str, typer.Option(help="Memory for KV blocks, e.g. 2GiB.")] = "1GiB",
    node: Node = "local",
    eviction: Eviction = "lru",
    hugepages: Hugepages = "auto",
    ssd: Ssd = None,
    ssd_size: SsdSize = "8GiB",
    address: Address = "127.0.0.1",
    transfer: Annotated[
        str, typer.Option(help="HOST:PORT where other stores copy KV blocks; empty = ADDRESS, any port.")
    ] = "",
    run_dir: RunDir = None,
    admin_port: AdminPort = 0,
    log_level: LogLevel = "info",
) -> None:
    """Run the KV pool's node of this host."""
    with errors_told():
        from mooncake.core.config import StoreOptions, parse_size_bytes
        from mooncake.up.launch import run_store

        options = StoreOptions(
            node=node, capacity_bytes=parse_size_bytes(capacity, "capacity"), run_dir=run_dir_of(run_dir),
            metadata=metadata, admin_port=admin_port, log_level=log_level, address=address,
            transfer=transfer, ssd_path=str(ssd.resolve()) if ssd else "",
            ssd_bytes=parse_size_bytes(ssd_size, "ssd_size"), eviction=eviction,
            hugepages=hugepages,
        ).checked()  # fmt: skip
        run_role("store", log_level, lambda: run_store(options))


@app.command()
def top(
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="One table, then exit.")] = False,
) -> None:
    """Show what a running cluster does: load, latencies, the pool. Ctrl-C ends it."""
    with errors_told():
        from mooncake.top import top as run_top

        raise typer.Exit(run_top(url, console(), once))


@app.command()
def version() -> None:
    """Print the version."""
    from mooncake import __version__

    typer.echo(__version__)


conductor_cli.register(app)
pool_cli.register(app)
simulate_cli.register(app)
indexer_cli.register(app)
bench_cli.register(app)


def main() -> None:
    """Entry of the `mooncake` command."""
    sys.exit(app())
