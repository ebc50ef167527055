"""Settings of every process: one model each, the only list of names, types, defaults, ranges and meanings.

The command line, the environment and the settings file fill them (mooncake.core.settings); they travel to
child processes as JSON. Secrets do not: those come from the environment (`MOONCAKE_API_KEY`) or from files.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator

from mooncake.core.config import (
    ADMIN_TOKEN_HINT,
    API_KEY_HINT,
    BLOCK_TOKENS_STEP,
    DRAIN_S,
    DRAIN_S_MAX,
    HOT_COPIES,
    HOT_COPIES_MAX,
    KV_BYTES_MIN,
    LOOPBACK,
    MODEL_LEN_MAX,
    POOL_BYTES_MIN,
    SLO_S_MAX,
    SSD_BYTES,
    SSD_BYTES_MIN,
    STEP_TOKENS,
    AdmissionName,
    EvictionName,
    HugepagesName,
    PolicyName,
    Role,
    admin_token,
    check_host,
    is_loopback,
)
from mooncake.core.errors import ConfigError
from mooncake.core.options_base import (
    Cores,
    Name,
    OptionalName,
    Options,
    Place,
    Problem,
    Size,
    Words,
    fact,
    refusals,
    setting,
)
from mooncake.core.tracing import check_url

METADATA: Final = "tcp://127.0.0.1:7700"
"""Where a Conductor serves metadata, unless it is told otherwise."""
THREADS_MAX: Final = 1024
"""More than any machine has cores."""
GATEWAYS_MAX: Final = 64
INSTANCES_MAX: Final = 64
"""On one machine; beyond this the plan is a mistake, not a wish."""
NODES_MAX: Final = 64
"""Of one engine: tensors in eight on each, and a pipeline of as many nodes as anybody has built."""
NODES_PORT: Final = 7710
JOIN_S: Final = 600.0
"""As long as a node that is new takes to pull an image."""
NODE_FLAGS: Final = ("--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless")
UNPROVED: Final = (
    "others can reach it, and between nodes vLLM proves nothing and encrypts nothing: on a network that is "
    "private say --accept-unauthenticated-nodes (docs/deploy.md)"
)
BLOCK_TOKENS_MAX: Final = 1024
INDEXED_BLOCKS_MAX: Final = 64_000_000
"""6 GB of names."""
SEED_MAX: Final = (1 << 64) - 1
SECRET_BYTES_MAX: Final = 1 << 16
"""Of a file with a key."""

LoadMode = Literal["async", "layerwise"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def _block(tokens: int) -> int:
    if tokens % BLOCK_TOKENS_STEP or not BLOCK_TOKENS_STEP <= tokens <= BLOCK_TOKENS_MAX:
        raise ValueError(f"must be a multiple of {BLOCK_TOKENS_STEP}, at most {BLOCK_TOKENS_MAX}")
    return tokens


BlockTokens = Annotated[int, AfterValidator(_block)]

# ---------------------------------------------------------------- what several processes have


class Drains(Options):
    """A process that finishes what it has."""

    drain_s: float = setting(
        DRAIN_S, "Seconds that work in flight gets after SIGTERM.", low=0, high=DRAIN_S_MAX
    )


class Administered(Drains):
    """A process with an admin server."""

    admin_host: str = setting(
        LOOPBACK, f"Address of metrics, health and drain; beyond loopback {ADMIN_TOKEN_HINT}."
    )
    admin_port: int = setting(0, "Port of metrics, health and drain; 0 = none.", low=0, high=65535)

    @property
    def has_admin(self) -> bool:
        """Whether it serves at all, itself or in processes of its own."""
        return self.admin_port > 0

    def unmet(self) -> list[Problem]:
        """See Options."""
        found = super().unmet()
        if not self.has_admin:
            return found
        return found + refusals(
            "admin_host",
            self.admin_host,
            lambda: check_host(self.admin_host, admin_token(), "admin_host", ADMIN_TOKEN_HINT),
        )


class Member(Options):
    """A process of a cluster, which others on other hosts may reach."""

    address: str = setting(
        LOOPBACK, "Address of this host for the cluster; all but loopback need MOONCAKE_SECRET_FILE."
    )

    def unmet(self) -> list[Problem]:
        """See Options."""
        from mooncake.core.metadata_open import check_metadata  # sockets: heavier than settings
        from mooncake.core.rpc import check_endpoint

        found = super().unmet()
        for name in ("metadata", "metadata_endpoint"):
            if text := getattr(self, name, ""):
                found += refusals("metadata", text, lambda text=text: check_metadata(text))  # type: ignore[misc]
        return found + refusals("address", self.address, lambda: check_endpoint(f"tcp://{self.address}:*"))


class Joined(Member):
    """One that has to be told where the cluster's metadata are."""

    metadata: str = setting(
        ..., "Address of the cluster's metadata, tcp://127.0.0.1:7700 or etcd://HOST:PORT,..."
    )


class Placed(Options):
    """A process with files of its own."""

    run_dir: Place = setting("", "Folder for sockets and logs, yours alone; empty = a fresh one.")


class Traced(Options):
    """A process with a part in a request's trace."""

    otlp_endpoint: str = setting(
        "", "Where spans go, http://HOST:4318; empty = as OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere."
    )

    def conflicts(self) -> list[Problem]:
        """See Options."""
        found = super().conflicts()
        if not self.otlp_endpoint:
            return found
        return found + refusals(
            "otlp_endpoint", self.otlp_endpoint, lambda: check_url(self.otlp_endpoint, "otlp_endpoint")
        )


class Modelled(Options):
    """A process that knows the model."""

    model: str = setting("", "Folder, hub name, or nothing for SmolLM2-135M-Instruct.")
    dtype: Dtype = setting("auto", "Of weights and KV; auto: not bfloat16 where it is emulated.")
    max_model_len: int = setting(
        0, "Longest context in tokens; 0 = the model's own.", low=0, high=MODEL_LEN_MAX
    )
    block_size: BlockTokens = setting(
        32, "Tokens of a KV block, a multiple of 32; the same in all of a cluster."
    )
    vllm_args: Words = setting([], "More arguments for vLLM; on the command line after --.")


class Engined(Options):
    """A process with engines."""

    kv_memory_bytes: Size = setting(
        512 << 20, "Memory of each engine's own KV cache.", key="kv_memory", low=KV_BYTES_MIN
    )
    load_mode: LoadMode = setting("async", "How KV is loaded: whole requests (async) or layer by layer.")


class Spanning(Member):
    """A process of an engine that may span several nodes."""

    join_s: float = setting(
        JOIN_S, "Seconds that the nodes of an engine wait for each other.", low=1, high=SLO_S_MAX
    )
    accept_unauthenticated_nodes: bool = setting(
        False,
        "vLLM's ranks talk between hosts, neither proved nor encrypted: this network is private.",
    )

    def _unproved(self, key: str, host: str) -> list[Problem]:
        """Return the problem of letting vLLM's ranks talk over `host`."""
        if is_loopback(host) or self.accept_unauthenticated_nodes:
            return []
        return [Problem(key, host, UNPROVED)]


class Pooled(Options):
    """A process with a store."""

    eviction: EvictionName = setting("lru", "Which blocks a full pool gives up first.")
    hugepages: HugepagesName = setting(
        "auto", "Pages of the pool's memory; auto: where the machine has them."
    )
    ssd_path: Place = setting("", "Folder of the pool's SSD tier; KV there outlives restarts.", key="ssd")
    ssd_bytes: Size = setting(SSD_BYTES, "Size of the SSD tier's file.", key="ssd_size", low=SSD_BYTES_MIN)


class Policies(Options):
    """How requests are placed, refused and shared out. Most of it can change while they run."""

    policy: PolicyName = setting("kvcache", "Which instances get a request.", reloads=True)
    ttft_slo_s: float = setting(
        0.0, "Refuse requests predicted to start later; 0 = none.", low=0, high=SLO_S_MAX, reloads=True
    )
    tbt_slo_s: float = setting(
        0.0, "Refuse requests predicted to stream slower; 0 = none.", low=0, high=SLO_S_MAX, reloads=True
    )
    hold_s: float = setting(
        0.0, "Requests wait, by class and tenant, while engines have work for so long; 0 = never.",
        low=0, high=SLO_S_MAX, reloads=True,
    )  # fmt: skip
    admission: AdmissionName = setting(
        "objectives", "When decode load counts (docs/scheduling.md).", reloads=True
    )
    decode_s: float = setting(
        0.0, "How long admission `predicted` takes an answer for; 0 = learned.",
        low=0, high=SLO_S_MAX, reloads=True,
    )  # fmt: skip
    inline: bool = setting(
        False, "Short prompts may run on decode instances, beside their batch.", reloads=True
    )
    plan_roles: bool = setting(
        False, "Instances change between prefill and decode as the load asks for.", reloads=True
    )
    tenants: Place = setting(
        "",
        "TOML file of tenants: shares, quotas, keys (docs/scheduling.md); its text reloads too.",
        reloads=True,
    )
    first_token: bool = setting(False, "Stream prefill's own first token.")
    prometheus_url: str = setting(
        "", "Prometheus that /dashboard draws from; empty = the last minutes, its own."
    )


class Served(Options):
    """A process with a public HTTP port."""

    host: str = setting(
        LOOPBACK, f"Address to serve on; others than loopback need an API key: {API_KEY_HINT}."
    )
    port: int = setting(8000, "HTTP port.", low=1, high=65535)
    api_key: str = setting("", "Key that clients show.", secret=True)
    api_key_file: Place = setting("", "File with the key that clients show.")

    def with_key(self) -> "Served":
        """Return it with the key of its file.

        Raises:
            ConfigError: the file cannot be read, or there is another key too.
        """
        if not self.api_key_file:
            return self
        if self.api_key:
            raise ConfigError("api_key: is said twice: unset MOONCAKE_API_KEY, or leave api_key_file out")
        return self.replace(api_key=read_secret("api_key_file", self.api_key_file))

    def unmet(self) -> list[Problem]:
        """See Options."""
        return super().unmet() + refusals("host", self.host, lambda: check_host(self.host, self.api_key))


def read_secret(key: str, path: str) -> str:
    """Return what a file with a secret says.

    Raises:
        ConfigError: it cannot be read, or says nothing.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(SECRET_BYTES_MAX).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {path!r}: cannot be read: {error}") from None
    if not text:
        raise ConfigError(f"{key} = {path!r}: is empty; write the key there")
    return text


# ---------------------------------------------------------------- processes


class WorkerOptions(Joined, Spanning, Modelled, Engined, Administered, Traced, Placed):
    """One engine instance with its relay (`mooncake prefill`, `mooncake decode`)."""

    section: ClassVar[str] = "decode"

    instance_id: OptionalName = setting(
        "", "Name of the instance, unique; empty = of host and process.", key="name"
    )
    node: Name = setting("local", "Node name of the store on this host.")
    cores: Cores = setting([], "Cores to bind, e.g. 0 or 0-3; empty = none.")
    threads: int = setting(
        0,
        "Threads of a CPU engine, all its ranks; 0 = one for each core it is bound to, else one.",
        low=0,
        high=THREADS_MAX,
    )
    use_pool: bool = setting(True, "Share KV blocks through the pool.", key="pool")
    save_decoded: bool = setting(True, "Blocks of answers go into the pool, too: the next turn hits them.")
    max_num_seqs: int = setting(16, "Requests that an engine computes at once.", low=1, high=4096)
    max_num_batched_tokens: int = setting(
        STEP_TOKENS, "Tokens of one engine step, at least those of a block.", low=1, high=MODEL_LEN_MAX
    )
    nodes: int = setting(
        1, "Nodes of the engine; each but this one runs a `mooncake follower`.", low=1, high=NODES_MAX
    )
    nodes_port: int = setting(NODES_PORT, "Port where followers meet this one.", low=1, high=65535)
    role: Role = fact("decode")
    served_name: str = fact("")

    def unmet(self) -> list[Problem]:
        """See Options."""
        return super().unmet() + (self._unproved("address", self.address) if self.nodes > 1 else [])

    def conflicts(self) -> list[Problem]:
        """See Options."""
        found = super().conflicts()
        if self.nodes > 1 and self.use_pool:
            advice = (
                f"an engine of {self.nodes} nodes cannot share KV blocks yet: say --no-pool (docs/deploy.md)"
            )
            found.append(Problem("pool", "true", advice))
        for word in self.vllm_args:
            if word.partition("=")[0] in NODE_FLAGS:
                found.append(
                    Problem("vllm_args", word, "say --nodes, and start `mooncake follower` elsewhere")
                )
        if self.max_num_batched_tokens < self.block_size:
            advice = f"must be at least block_size, {self.block_size}"
            found.append(Problem("max_num_batched_tokens", str(self.max_num_batched_tokens), advice))
        return found


class FollowerOptions(Spanning, Administered, Placed):
    """One node, above the first, of an engine that spans several (`mooncake follower`)."""

    section: ClassVar[str] = "follower"

    leader: str = setting(..., "HOST:PORT of the engine's first node: its address and nodes_port.")
    node_rank: int = setting(
        1, "Which node of the engine this is; the first, that leads, is 0.", low=1, high=NODES_MAX - 1
    )
    model: str = setting("", "Folder or hub name, where it is not called here as on the first node.")
    cores: Cores = setting([], "Cores to bind, e.g. 0 or 0-3; empty = none.")
    threads: int = setting(
        0, "Threads of each rank of a CPU engine; 0 = one for each core it is bound to, else one.",
        low=0, high=THREADS_MAX,
    )  # fmt: skip

    def unmet(self) -> list[Problem]:
        """See Options."""
        from mooncake.core.rpc import check_endpoint  # sockets: heavier than settings

        found = super().unmet()
        found += refusals("leader", self.leader, lambda: check_endpoint(f"tcp://{self.leader}"))
        host = self.leader.rpartition(":")[0]
        return found + (self._unproved("leader", host) or self._unproved("address", self.address))


class PrefillOptions(WorkerOptions):
    """`mooncake prefill`."""

    section: ClassVar[str] = "prefill"

    both: bool = setting(False, "An aggregated instance: decodes too.")


class GatewayOptions(Served, Policies, Modelled, Member, Administered, Traced, Placed):
    """The Conductor (`mooncake conductor`): gateway and decision core in one process, or one of the two.

    A gateway by itself takes decisions from the core that leads: what is said here of policy serves it only
    while no core answers.
    """

    section: ClassVar[str] = "gateway"

    metadata_endpoint: str = setting(
        "tcp://127.0.0.1:*",
        "Where the core serves metadata, or etcd://HOST:PORT,... that has it.",
        key="metadata",
    )
    name: OptionalName = setting("", "Name of the process, unique; empty = of host and process.")
    aggregated: bool = setting(False, "Instances do both.")
    hot_copies: int = setting(
        HOT_COPIES, "Hosts that get a prefix ahead which many ask for, at most; 0 = none.",
        low=0, high=HOT_COPIES_MAX, reloads=True,
    )  # fmt: skip
    drain_delay_s: float = setting(
        0.0, "Seconds after SIGTERM in which it is not ready but still listens.", low=0, high=SLO_S_MAX
    )
    served_name: str = fact("")
    share_port: bool = fact(False)  # with other gateways of this host; whoever starts them holds it


class ConductorOptions(GatewayOptions):
    """`mooncake conductor`: what its processes get, and how many they are."""

    section: ClassVar[str] = "conductor"

    metadata_endpoint: str = setting(
        METADATA, "Where it serves metadata, or etcd://HOST:PORT,... that has it.",
        key="metadata", flags=("--metadata-endpoint",),
    )  # fmt: skip
    admin_port: int = setting(
        0, "Port of metrics, health and drain; with gateways the first of their ports, 0 = any free.",
        low=0, high=65535,
    )  # fmt: skip
    gateways: int | None = setting(
        None, "So many gateways share the port, a core beside them; unset = one process, 0 = a core only.",
        low=0, high=GATEWAYS_MAX,
    )  # fmt: skip
    zygote: bool = setting(True, "Import vLLM once and fork gateways.")

    @property
    def has_admin(self) -> bool:
        """See Administered: several processes have ports in any case."""
        return self.gateways is not None or super().has_admin


class LoneGatewayOptions(GatewayOptions):
    """`mooncake gateway`: one that joins a core."""

    metadata_endpoint: str = setting(
        ..., "Address of the cluster's metadata, tcp://127.0.0.1:7700 or etcd://HOST:PORT,...", key="metadata"
    )


class StoreOptions(Joined, Pooled, Administered, Placed):
    """One store node (`mooncake store`)."""

    section: ClassVar[str] = "store"

    node: Name = setting("local", "Name of the node, which engines of this host say.")
    capacity_bytes: Size = setting(1 << 30, "Memory for KV blocks.", key="capacity", low=POOL_BYTES_MIN)
    transfer: str = setting("", "HOST:PORT where other stores copy KV blocks; empty = ADDRESS, any port.")


class UpOptions(Served, Policies, Modelled, Engined, Pooled, Administered, Traced, Placed):
    """What `mooncake up` is asked for."""

    section: ClassVar[str] = "up"

    prefill: int = setting(1, "Prefill instances.", low=0, high=INSTANCES_MAX)
    decode: int = setting(1, "Decode instances.", low=0, high=INSTANCES_MAX)
    aggregated: int = setting(0, "Instead: so many instances that do both.", low=0, high=INSTANCES_MAX)
    gateways: int | None = setting(
        None, "So many gateway processes share the port, the core beside them; unset = one process.",
        low=1, high=GATEWAYS_MAX,
    )  # fmt: skip
    pool_bytes: Size = setting(1 << 30, "Memory of the shared KV pool.", key="pool_size", low=POOL_BYTES_MIN)
    cores: Cores = setting([], "auto, or the cores to use, e.g. 0-3.", shown="auto")
    admin_port: int = setting(
        0, "First port of the processes' metrics, health and drain; 0 = any free.", low=0, high=65535
    )
    zygote: bool = setting(True, "Import vLLM once and fork engines.")
    served_name: str = fact("")
    model_is_local: bool = fact(True)
    admin_ports: dict[str, int] = fact({})  # by process name; missing = none

    @property
    def has_admin(self) -> bool:
        """See Administered: every process has a port."""
        return True

    def conflicts(self) -> list[Problem]:
        """See Options."""
        found = super().conflicts()
        if not self.aggregated and not (self.prefill and self.decode):
            advice = "at least one of each, or --aggregated N for instances that do both"
            found.append(Problem(f"prefill = {self.prefill}, decode", str(self.decode), advice))
        fronts = 1 if self.gateways is None else 1 + self.gateways
        engines = self.aggregated or self.prefill + self.decode
        count = 1 + fronts + engines
        if self.admin_port and self.admin_port <= self.port < self.admin_port + count:
            advice = f"{count} ports from here on, and port is one of them, {self.port}: choose another"
            found.append(Problem("admin_port", str(self.admin_port), advice))
        return found


class DirectoryOptions(Joined):
    """`mooncake directory`."""

    section: ClassVar[str] = "directory"

    name: OptionalName = setting("", "Name of this directory, unique; empty = of host and process.")
    port: int = setting(0, "Port for look-ups; 0 = any.", low=0, high=65535)
    admin_host: str = setting(LOOPBACK, f"Where the admin HTTP listens; beyond loopback {ADMIN_TOKEN_HINT}.")
    admin_port: int = setting(0, "Port of the admin HTTP and metrics; 0 = any.", low=0, high=65535)
    admin_token_file: Place = setting("", "File with the admin token.")


class IndexerOptions(Served):
    """`mooncake indexer`."""

    section: ClassVar[str] = "indexer"

    port: int = setting(13333, "HTTP port; 0 = any.", low=0, high=65535)
    metadata: str = setting("", "Metadata of a cluster of ours whose stores and engines are indexed too.")
    publishers: str = setting("", "Networks that publishers may be in, by commas; empty = loopback, private.")
    blocks_max: int = setting(
        0,
        "Blocks of a context, beyond which the oldest are dropped; 0 = 4,000,000.",
        low=0,
        high=INDEXED_BLOCKS_MAX,
    )
    xxh3_seed: int = setting(
        1337, "Seed of the standard's names; 1337 as Dynamo and SMG.", low=0, high=SEED_MAX
    )


SECTIONS: Final[dict[str, type[Options]]] = {
    kind.section: kind
    for kind in (
        UpOptions, ConductorOptions, LoneGatewayOptions, PrefillOptions, WorkerOptions, FollowerOptions,
        StoreOptions, DirectoryOptions, IndexerOptions,
    )
}  # fmt: skip
"""Processes by their section of the settings file."""
