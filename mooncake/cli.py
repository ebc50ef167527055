"""The `mooncake` command. Imports nothing heavy before a command runs: --help must be instant."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mooncake import bench_cli, pool_cli, simulate_cli

if TYPE_CHECKING:
    from rich.console import Console

    from mooncake.core.errors import MooncakeError
    from mooncake.model import ModelRef

app = typer.Typer(
    name="mooncake",
    help="KVCache-centric, disaggregated LLM serving on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # coloured help costs 0.3 s of imports
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="Folder, hub name, or nothing for SmolLM2-135M-Instruct.")]
Metadata = Annotated[
    str, typer.Option(help="Address of the cluster's metadata, tcp://127.0.0.1:7700 or etcd://HOST:PORT,...")
]
Address = Annotated[
    str,
    typer.Option(help="Address of this host for the cluster; all but loopback need MOONCAKE_SECRET_FILE."),
]
Eviction = Annotated[
    str, typer.Option(help="lru, lfu, length or tail: which blocks a full pool gives up first.")
]
Hugepages = Annotated[
    str, typer.Option(help="auto (where the machine has them), off, or require: pages of the pool's memory.")
]
Ssd = Annotated[Path | None, typer.Option(help="Folder of the pool's SSD tier; KV there outlives restarts.")]
SsdSize = Annotated[str, typer.Option(help="Size of the SSD tier's file.")]
RunDir = Annotated[Path | None, typer.Option(help="Folder for sockets and logs, yours alone.")]
Dtype = Annotated[
    str, typer.Option(help="auto (not bfloat16 where it is emulated), bfloat16, float16, float32.")
]
BlockSize = Annotated[int, typer.Option(help="Tokens of a KV block.")]
MaxModelLen = Annotated[int, typer.Option(help="Longest context in tokens; 0 = the model's own.")]
KvMemory = Annotated[str, typer.Option(help="KV cache of each engine, e.g. 512MiB.")]
LoadMode = Annotated[str, typer.Option(help="async (whole requests) or layerwise.")]
ApiKey = Annotated[
    str, typer.Option(envvar="MOONCAKE_API_KEY", show_envvar=True, help="Better in the environment.")
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
VllmArgs = Annotated[list[str] | None, typer.Argument(help="After --: more arguments for vLLM.")]
Policy = Annotated[
    str, typer.Option(help="kvcache, cache_aware, least_load, round_robin or random: who gets a request.")
]
TtftSlo = Annotated[float, typer.Option(help="Refuse requests predicted to start later; 0 = none.")]
TbtSlo = Annotated[float, typer.Option(help="Refuse requests predicted to stream slower; 0 = none.")]
Hold = Annotated[
    float,
    typer.Option(help="Requests wait, by class and tenant, while engines have work for so long."),
]
Admission = Annotated[str, typer.Option(help="When decode load counts: objectives, late, early, predicted.")]
DecodeTime = Annotated[float, typer.Option(help="How long `predicted` takes an answer for; 0 = learned.")]
Inline = Annotated[bool, typer.Option(help="Short prompts may run on decode instances, beside their batch.")]
Tenants = Annotated[
    Path | None, typer.Option(help="TOML file of tenants: shares, quotas, keys (docs/scheduling.md).")
]
PlanRoles = Annotated[
    bool, typer.Option(help="Instances change between prefill and decode as the load asks for.")
]
HotCopies = Annotated[
    int, typer.Option(help="Hosts that get a prefix ahead which many ask for, at most; 0 = none.")
]
Host = Annotated[str, typer.Option(help="Address to serve on; others than loopback need an API key.")]


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _die(error: "MooncakeError") -> NoReturn:
    from mooncake.up.launch import exit_code

    _console(stderr=True).print(f"mooncake: {error}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(exit_code(error))


@contextmanager
def _errors_told() -> Iterator[None]:
    """Our errors are one line and an exit code; anything else is a bug and shows its traceback."""
    from mooncake.core.errors import MooncakeError

    try:
        yield
    except MooncakeError as error:
        _die(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _refuse_conflicts() -> None:
    from mooncake.core.errors import ConfigError
    from mooncake.doctor import refuse_conflicts

    for row in refuse_conflicts():
        raise ConfigError(f"{row.name}: {row.found}: {row.advice}")


def _run_dir(path: Path | None) -> str:
    from mooncake.up.run import default_run_dir

    if path is None:
        return str(default_run_dir())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(path.resolve())


def _resolve(name: str) -> "ModelRef":
    """Return the model, with progress bars while it is fetched and converted."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    from mooncake.model import resolve_model

    texts = {"download": "fetching", "wait": "waiting for another process", "read": "reading GGUF"}
    texts |= {"weights": "converting weights", "tokenizer": "building tokenizer"}
    console = _console(stderr=True)
    tasks: dict[str, tuple[Progress, TaskID]] = {}
    shared = [TextColumn("{task.description:<28}"), BarColumn()]
    download = Progress(*shared, DownloadColumn(), console=console)
    convert = Progress(*shared, MofNCompleteColumn(), console=console)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            if not console.is_terminal:
                console.print(texts[stage], markup=False)
            bars = download if stage == "download" else convert
            if bars is convert and "download" in tasks:
                download.stop()  # two live displays at once are not possible
            bars.start()
            tasks[stage] = (bars, bars.add_task(texts[stage], total=total))
        bars, task = tasks[stage]
        bars.update(task, completed=done)

    try:
        return resolve_model(name or None, report)
    finally:
        for bars in {id(bars): bars for bars, _ in tasks.values()}.values():
            bars.stop()


def _run_role(service: str, log_level: str, main: Callable[[], int]) -> NoReturn:
    from mooncake.up.launch import guarded

    raise typer.Exit(guarded(service, log_level, main))


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
    metrics_port: Annotated[
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
    with _errors_told():
        from mooncake.core.config import parse_cores, parse_size_bytes
        from mooncake.core.cpu import resolve_dtype
        from mooncake.up.cluster import check_port
        from mooncake.up.metrics import with_metrics_ports
        from mooncake.up.plan import UpOptions, make_plan
        from mooncake.up.run import default_run_dir, tenant_keys
        from mooncake.up.run import up as run_up

        _refuse_conflicts()
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
            "plan_roles": plan_roles,
            "tenants": str(tenants.resolve()) if tenants else "",
            "vllm_args": vllm_args or [],
        }  # fmt: skip
        if cores != "auto":
            _use_cores(parse_cores(cores))
        # everything that can be wrong is told before a model is fetched
        draft = UpOptions(model="checked later", served_name="m", run_dir="/r", **wish)
        make_plan(draft, [0], api_key, tenant_keys(draft.tenants))
        check_port(host, port)
        with_metrics_ports(draft, metrics_port)
        ref = _resolve(model)
        folder = str(run_dir.resolve()) if run_dir else str(default_run_dir())
        options = UpOptions(
            model=ref.path_or_name,
            served_name=ref.served_name,
            model_is_local=ref.is_local,
            run_dir=folder,
            **wish,
        )
        raise typer.Exit(run_up(options, api_key, _console(), zygote, metrics_port))


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
    with _errors_told():
        typer.echo(_resolve(name).path_or_name)


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
        _console().print(table)
    raise typer.Exit(any(row.state == FAIL for row in rows))


@app.command()
def conductor(
    model: Model = "",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8000,
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
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run the Conductor: HTTP gateway, scheduler, metadata."""
    with _errors_told():
        from mooncake.core.config import GatewayOptions, check_host
        from mooncake.core.cpu import resolve_dtype
        from mooncake.up.launch import run_conductor
        from mooncake.up.run import tenant_keys

        _refuse_conflicts()
        check_host(host, api_key)
        tenant_keys(str(tenants) if tenants else "")  # told before a model is fetched
        ref = _resolve(model)
        options = GatewayOptions(
            model=ref.path_or_name, served_name=ref.served_name, host=host, port=port,
            metadata_endpoint=metadata_endpoint, address=address, aggregated=aggregated,
            first_token=first_token, policy=policy, ttft_slo_s=ttft_slo_s, tbt_slo_s=tbt_slo_s,
            hold_s=hold_s, admission=admission, decode_s=decode_s, inline=inline, plan_roles=plan_roles,
            hot_copies=hot_copies,
            tenants=str(tenants.resolve()) if tenants else "",
            api_key=api_key, dtype=resolve_dtype(dtype), max_model_len=max_model_len, block_size=block_size,
            run_dir=_run_dir(run_dir), log_level=log_level, vllm_args=vllm_args or [],
        ).checked()  # fmt: skip
        _run_role("conductor", log_level, lambda: run_conductor(options))


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
    with _errors_told():
        from mooncake.core.config import WorkerOptions, parse_cores, parse_size_bytes
        from mooncake.core.cpu import resolve_dtype
        from mooncake.up.launch import run_decode, run_prefill

        _refuse_conflicts()
        ref = _resolve(model)
        options = WorkerOptions(
            role=role,
            model=ref.path_or_name,
            served_name=ref.served_name,
            instance_id=name or f"{role}-{socket.gethostname().split('.')[0]}-{os.getpid()}",
            dtype=resolve_dtype(dtype),
            cores=parse_cores(cores),
            kv_memory_bytes=parse_size_bytes(kv_memory, "kv_memory"),
            run_dir=_run_dir(run_dir),
            **rest,
        ).checked()
        run = run_decode if role == "decode" else run_prefill
        _run_role(options.instance_id, options.log_level, lambda: run(options))


Name = Annotated[str, typer.Option(help="Name of the instance; must be unique.")]
Node = Annotated[str, typer.Option(help="Node name of the store on this host.")]
Cores = Annotated[str, typer.Option(help="Cores to bind, e.g. 0 or 0-3; empty = none.")]
Pool = Annotated[bool, typer.Option(help="Share KV blocks through the pool.")]
MetricsPort = Annotated[int, typer.Option(help="Loopback port of Prometheus metrics; 0 = none.")]


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
    metrics_port: MetricsPort = 0,
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run one prefill instance."""
    _worker(
        "both" if both else "prefill", name, model, dtype, kv_memory, cores, run_dir,
        metadata=metadata, node=node, address=address, max_model_len=max_model_len, load_mode=load_mode,
        block_size=block_size, use_pool=pool, metrics_port=metrics_port, log_level=log_level,
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
    metrics_port: MetricsPort = 0,
    run_dir: RunDir = None,
    log_level: LogLevel = "info",
    vllm_args: VllmArgs = None,
) -> None:
    """Run one decode instance."""
    _worker(
        "decode", name, model, dtype, kv_memory, cores, run_dir,
        metadata=metadata, node=node, address=address, max_model_len=max_model_len, load_mode=load_mode,
        block_size=block_size, use_pool=pool, metrics_port=metrics_port, log_level=log_level,
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
    metrics_port: MetricsPort = 0,
    log_level: LogLevel = "info",
) -> None:
    """Run the KV pool's node of this host."""
    with _errors_told():
        from mooncake.core.config import StoreOptions, parse_size_bytes
        from mooncake.up.launch import run_store

        options = StoreOptions(
            node=node, capacity_bytes=parse_size_bytes(capacity, "capacity"), run_dir=_run_dir(run_dir),
            metadata=metadata, metrics_port=metrics_port, log_level=log_level, address=address,
            transfer=transfer, ssd_path=str(ssd.resolve()) if ssd else "",
            ssd_bytes=parse_size_bytes(ssd_size, "ssd_size"), eviction=eviction,
            hugepages=hugepages,
        ).checked()  # fmt: skip
        _run_role("store", log_level, lambda: run_store(options))


@app.command()
def top(
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="One table, then exit.")] = False,
) -> None:
    """Show what a running cluster does: load, latencies, the pool. Ctrl-C ends it."""
    with _errors_told():
        from mooncake.top import top as run_top

        raise typer.Exit(run_top(url, _console(), once))


@app.command()
def version() -> None:
    """Print the version."""
    from mooncake import __version__

    typer.echo(__version__)


pool_cli.register(app)
simulate_cli.register(app)
bench_cli.register(app)


def main() -> None:
    """Entry of the `mooncake` command."""
    sys.exit(app())
