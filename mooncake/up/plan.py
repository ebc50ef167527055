"""Pure: which processes make the cluster that was asked for, where they run and with what.

Order of the list is the order of start; shutdown goes by `stop_rank`. Nothing here starts or looks
at anything but its arguments.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from mooncake.core.config import API_KEY_ENV, API_KEY_FILE_ENV, fail
from mooncake.core.cpu import compiler_env
from mooncake.core.options import GatewayOptions, StoreOptions, UpOptions, WorkerOptions
from mooncake.core.options_base import told
from mooncake.core.process import pick_cores

CONDUCTOR, CORE = "conductor", "core"
SOCKET_PATH_CHARS_MAX = 107
"""sun_path of a unix socket; the longest name we put below the run directory is about 45."""
RUN_DIR_CHARS_MAX = SOCKET_PATH_CHARS_MAX - 45
CONDUCTOR_STOP_S, CORE_STOP_S, WORKER_STOP_S, STORE_STOP_S = 5.0, 5.0, 15.0, 10.0
"""Graces beyond the time to drain: idle connections get 1 s, a core resigns within 1 s, an engine stops
within 10 s, a store closes its SSD within 5 s."""


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
    options: UpOptions, cores: Sequence[int], tenant_keys: Mapping[str, str] | None = None
) -> list[Process]:
    """Return the processes of the cluster.

    Args:
        options: what was asked for; its key goes into the gateways' environment, never into their options.
        cores: what this process may run on.
        tenant_keys: environment variables that only the Conductor gets, as the file of tenants names them.

    Raises:
        ConfigError: the wish makes no cluster.
    """
    if conflicts := options.conflicts():
        raise told(conflicts)
    if len(options.run_dir) > RUN_DIR_CHARS_MAX:
        raise fail("run_dir", options.run_dir, f"at most {RUN_DIR_CHARS_MAX} characters (unix sockets)")
    roles = engine_roles(options)
    metadata = metadata_endpoint(options.run_dir)
    store = {
        **options.shared(StoreOptions),
        "source": options.section,
        "node": "local",
        "capacity_bytes": options.pool_bytes,
        "run_dir": f"{options.run_dir}/store",
        "metadata": metadata,
        "admin_port": options.admin_ports.get("store", 0),
    }
    gateway = {
        **options.shared(GatewayOptions),
        "source": options.section,
        "metadata_endpoint": metadata,
        "aggregated": options.aggregated > 0,
        "hot_copies": 0,  # there is one host
        "admin_port": 0,
    }
    return [
        Process(
            name="store", role="store", options=StoreOptions(**store).checked(), heavy=False, stop_rank=2,
            stop_s=options.drain_s + STORE_STOP_S,
        ),
        *plan_conductor(
            GatewayOptions(**gateway).checked(), options.gateways, options.admin_ports, tenant_keys
        ),
        *(
            _engine(options, name, role, pick_cores(index, len(roles), cores))
            for index, (name, role) in enumerate(roles)
        ),
    ]  # fmt: skip


def plan_conductor(
    options: GatewayOptions,
    gateways: int | None,
    admin_ports: Mapping[str, int],
    tenant_keys: Mapping[str, str] | None = None,
) -> list[Process]:
    """Return the processes of a Conductor: one for all of it, or a core and `gateways` gateways.

    The core serves embedded metadata and is not needed by what is in flight: gateways go first at the end.
    """
    keys = dict(tenant_keys or {})
    env = {**keys, **({API_KEY_ENV: options.api_key} if options.api_key else {})}
    own = {**options.shared(GatewayOptions), "source": options.source or options.section}
    options = GatewayOptions(**{**own, "api_key": "", "api_key_file": ""})
    stop_s = options.drain_delay_s + options.drain_s + CONDUCTOR_STOP_S
    if gateways is None:
        options = options.replace(admin_port=admin_ports.get(CONDUCTOR, 0))
        return [Process(name=CONDUCTOR, role="conductor", options=options, env=env, stop_s=stop_s)]
    named = {
        name: options.replace(
            name=f"{options.name}-{name}" if options.name else name,
            admin_port=admin_ports.get(name, 0),
            share_port=name != CORE,
        )
        for name in gateway_names(gateways)
    }
    core = named.pop(CORE)
    return [
        Process(name=CORE, role=CORE, options=core, env=keys, heavy=False, stop_rank=1, stop_s=CORE_STOP_S),
        *(
            Process(name=name, role="gateway", options=one, env=env, stop_s=stop_s)
            for name, one in named.items()
        ),
    ]


def gateway_names(gateways: int | None) -> list[str]:
    """Return the processes of a Conductor, in the order of start; `gateways` None = it is not divided."""
    return [CONDUCTOR] if gateways is None else [CORE, *(f"gateway-{i}" for i in range(gateways))]


def admin_names(options: UpOptions) -> list[str]:
    """Return the processes, each of which has an admin server, in the order of start."""
    return ["store", *gateway_names(options.gateways), *(name for name, _ in engine_roles(options))]


def engine_roles(options: UpOptions) -> list[tuple[str, str]]:
    """Return (name, role) of every engine, prefill and decode in turns so that both get cores."""
    if options.aggregated:
        return [(f"both-{i}", "both") for i in range(options.aggregated)]
    turns = []
    for i in range(max(options.prefill, options.decode)):
        turns += [(f"prefill-{i}", "prefill")] if i < options.prefill else []
        turns += [(f"decode-{i}", "decode")] if i < options.decode else []
    return turns


def _engine(options: UpOptions, name: str, role: str, cores: list[int]) -> Process:
    worker = {
        **options.shared(WorkerOptions),
        "source": options.section,
        "role": role,
        "metadata": metadata_endpoint(options.run_dir),
        "instance_id": name,
        "cores": cores,
        "admin_port": options.admin_ports.get(name, 0),
    }
    env = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
    }
    launch_role = "decode" if role == "decode" else "prefill"
    return Process(
        name=name, role=launch_role, options=WorkerOptions(**worker).checked(), env=env, cores=cores,
        stop_rank=1, stop_s=options.drain_s + WORKER_STOP_S,
    )  # fmt: skip


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
    for name in (API_KEY_ENV, API_KEY_FILE_ENV, *secrets):
        env.pop(name, None)
    return env
