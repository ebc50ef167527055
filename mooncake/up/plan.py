"""Pure: which processes make the cluster that was asked for, where they run and with what.

Order of the list is the order of start; shutdown goes by `stop_rank`. Nothing here starts or looks
at anything but its arguments.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from mooncake.core.config import (
    ADMISSIONS,
    API_KEY_ENV,
    EVICTIONS,
    HUGEPAGES,
    POLICIES,
    SSD_BYTES,
    GatewayOptions,
    StoreOptions,
    WorkerOptions,
    check_host,
    fail,
)
from mooncake.core.cpu import compiler_env
from mooncake.core.errors import ConfigError
from mooncake.core.process import pick_cores

CORE = "core"
GATEWAYS_MAX = 64
INSTANCES_MAX = 64
"""On one machine; beyond this the plan is a mistake, not a wish."""
SOCKET_PATH_CHARS_MAX = 107
"""sun_path of a unix socket; the longest name we put below the run directory is about 45."""
RUN_DIR_CHARS_MAX = SOCKET_PATH_CHARS_MAX - 45
CONDUCTOR_STOP_S, CORE_STOP_S, WORKER_STOP_S, STORE_STOP_S = 30.0, 5.0, 15.0, 15.0
"""Graces: a gateway drains for 25 s, a core resigns within 1 s, an engine stops within 10 s, a store copies
to its SSD for 5 s."""


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `mooncake up` was asked for; `model` is resolved already."""

    model: str
    served_name: str
    run_dir: str
    model_is_local: bool = True
    prefill: int = 1
    decode: int = 1
    aggregated: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    pool_bytes: int = 1 << 30
    eviction: str = EVICTIONS[0]
    hugepages: str = HUGEPAGES[0]
    ssd_path: str = ""  # "" = no SSD tier
    ssd_bytes: int = SSD_BYTES
    kv_memory_bytes: int = 512 << 20
    dtype: str = "bfloat16"
    max_model_len: int = 0
    block_size: int = 32
    load_mode: str = "async"
    first_token: bool = False
    policy: str = POLICIES[0]
    ttft_slo_s: float = 0.0  # 0 = not enforced, as tbt_slo_s
    tbt_slo_s: float = 0.0
    hold_s: float = 0.0
    admission: str = ADMISSIONS[0]
    decode_s: float = 0.0
    inline: bool = False
    plan_roles: bool = False
    tenants: str = ""  # file of shares and quotas; "" = none
    gateways: int | None = None  # so many, and a core beside them; None = one process is both
    admin_ports: dict[str, int] = {}  # by process name; missing = no metrics
    log_level: str = "info"
    vllm_args: list[str] = []


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the cluster."""

    name: str
    role: str  # a key of launch.ROLES
    options: StoreOptions | WorkerOptions | GatewayOptions
    env: dict[str, str] = {}
    cores: list[int] = []
    heavy: bool = True  # imports vLLM: worth forking from the zygote
    stop_rank: int = 0  # lower stops first; equal ones together
    stop_s: float = 5.0


def metadata_endpoint(run_dir: str) -> str:
    """Return the address of the cluster's metadata store: a socket file that only we can open."""
    return f"ipc://{run_dir}/metadata.sock"


def make_plan(
    options: UpOptions, cores: Sequence[int], api_key: str = "", tenant_keys: Mapping[str, str] | None = None
) -> list[Process]:
    """Return the processes of the cluster.

    Args:
        options: what was asked for.
        cores: what this process may run on.
        api_key: put into the Conductor's environment, never into options.
        tenant_keys: environment variables that only the Conductor gets, as the file of tenants names them.

    Raises:
        ConfigError: the wish makes no cluster, or a setting is out of range.
    """
    roles = engine_roles(options)
    if options.gateways == 0:
        raise fail("gateways", 0, "`up` serves requests: at least 1, or leave it out for one process")
    check_host(options.host, api_key)
    if len(options.run_dir) > RUN_DIR_CHARS_MAX:
        raise fail("run_dir", options.run_dir, f"at most {RUN_DIR_CHARS_MAX} characters (unix sockets)")
    metadata = metadata_endpoint(options.run_dir)
    store = StoreOptions(
        node="local",
        capacity_bytes=options.pool_bytes,
        eviction=options.eviction,
        hugepages=options.hugepages,
        ssd_path=options.ssd_path,
        ssd_bytes=options.ssd_bytes,
        run_dir=f"{options.run_dir}/store",
        metadata=metadata,
        admin_port=options.admin_ports.get("store", 0),
        log_level=options.log_level,
    )
    gateway = GatewayOptions(
        model=options.model,
        served_name=options.served_name,
        run_dir=options.run_dir,
        host=options.host,
        port=options.port,
        metadata_endpoint=metadata,
        aggregated=options.aggregated > 0,
        first_token=options.first_token,
        policy=options.policy,
        ttft_slo_s=options.ttft_slo_s,
        tbt_slo_s=options.tbt_slo_s,
        hold_s=options.hold_s,
        admission=options.admission,
        decode_s=options.decode_s,
        inline=options.inline,
        plan_roles=options.plan_roles,
        hot_copies=0,  # there is one host
        tenants=options.tenants,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        log_level=options.log_level,
        vllm_args=options.vllm_args,
        api_key=api_key,
    ).checked()
    plan = [
        Process(
            name="store", role="store", options=store.checked(), heavy=False, stop_rank=2, stop_s=STORE_STOP_S
        ),
        *plan_conductor(gateway, options.gateways, options.admin_ports, tenant_keys),
    ]
    return plan + [
        _engine(options, name, role, pick_cores(index, len(roles), cores))
        for index, (name, role) in enumerate(roles)
    ]


def plan_conductor(
    options: GatewayOptions,
    gateways: int | None,
    admin_ports: Mapping[str, int],
    tenant_keys: Mapping[str, str] | None = None,
) -> list[Process]:
    """Return the processes of a Conductor: one for all of it, or a core and `gateways` gateways.

    The core serves embedded metadata and is not needed by what is in flight: gateways go first at the end.

    Raises:
        ConfigError: `gateways` is out of range.
    """
    keys = dict(tenant_keys or {})
    env = {**keys, **({API_KEY_ENV: options.api_key} if options.api_key else {})}
    options = msgspec.structs.replace(options, api_key="")
    if gateways is None:
        return [
            Process(name="conductor", role="conductor", options=options, env=env, stop_s=CONDUCTOR_STOP_S)
        ]
    named = {
        name: msgspec.structs.replace(
            options,
            name=f"{options.name}-{name}" if options.name else name,
            admin_port=admin_ports.get(name, 0),
            share_port=name != CORE,
        ).checked()
        for name in gateway_names(gateways)
    }
    core = named.pop(CORE)
    return [
        Process(name=CORE, role=CORE, options=core, env=keys, heavy=False, stop_rank=1, stop_s=CORE_STOP_S),
        *(
            Process(name=name, role="gateway", options=one, env=env, stop_s=CONDUCTOR_STOP_S)
            for name, one in named.items()
        ),
    ]


def gateway_names(gateways: int | None) -> list[str]:
    """Return the processes of a Conductor that is divided, in the order of start; none if it is not.

    Raises:
        ConfigError: too many, or less than none.
    """
    if gateways is None:
        return []
    if not 0 <= gateways <= GATEWAYS_MAX:
        raise fail("gateways", gateways, f"must be 0..{GATEWAYS_MAX}; leave it out for one process")
    return [CORE, *(f"gateway-{i}" for i in range(gateways))]


def metrics_names(options: UpOptions) -> list[str]:
    """Return the processes that need a port for their metrics, in the order of start."""
    return ["store", *gateway_names(options.gateways), *(name for name, _ in engine_roles(options))]


def engine_roles(options: UpOptions) -> list[tuple[str, str]]:
    """Return (name, role) of every engine, prefill and decode in turns so that both get cores.

    Raises:
        ConfigError: not a set of instances that can serve a request.
    """
    for key in ("prefill", "decode", "aggregated"):
        count = getattr(options, key)
        if not 0 <= count <= INSTANCES_MAX:
            raise fail(key, count, f"must be 0..{INSTANCES_MAX}")
    if options.aggregated:
        return [(f"both-{i}", "both") for i in range(options.aggregated)]
    if not options.prefill or not options.decode:
        raise ConfigError(
            f"prefill = {options.prefill}, decode = {options.decode}: "
            "at least one of each, or --aggregated N for instances that do both"
        )
    turns = []
    for i in range(max(options.prefill, options.decode)):
        turns += [(f"prefill-{i}", "prefill")] if i < options.prefill else []
        turns += [(f"decode-{i}", "decode")] if i < options.decode else []
    return turns


def _engine(options: UpOptions, name: str, role: str, cores: list[int]) -> Process:
    worker = WorkerOptions(
        role=role,
        model=options.model,
        served_name=options.served_name,
        metadata=metadata_endpoint(options.run_dir),
        run_dir=options.run_dir,
        instance_id=name,
        node="local",
        cores=cores,
        kv_memory_bytes=options.kv_memory_bytes,
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        load_mode=options.load_mode,
        admin_port=options.admin_ports.get(name, 0),
        block_size=options.block_size,
        log_level=options.log_level,
        vllm_args=options.vllm_args,
    ).checked()
    env = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    launch_role = "decode" if role == "decode" else "prefill"
    return Process(
        name=name, role=launch_role, options=worker, env=env, cores=cores, stop_rank=1, stop_s=WORKER_STOP_S
    )


def base_env(environ: Mapping[str, str], model_is_local: bool, secrets: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment of every child and of the zygote, before anything is imported.

    What the user set wins, but for the key and other `secrets`: only the Conductor gets them.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",  # spinning threads on a shared core cost 45x (measured)
        "OPENBLAS_NUM_THREADS": "1",  # else numpy starts threads at import, and forking is unsafe
        "TOKENIZERS_PARALLELISM": "false",  # warns and dead-locks after a fork
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",  # nothing leaves the machine unasked
        "PYTHONUNBUFFERED": "1",
        **compiler_env(),
    }
    if model_is_local:
        defaults["HF_HUB_OFFLINE"] = "1"  # a local folder needs no look-up, and no wait for one
    env = {**defaults, **environ}
    for name in (API_KEY_ENV, *secrets):
        env.pop(name, None)
    return env
