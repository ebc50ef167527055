"""Settings of every process, checked before anything is started with them.

The command line fills these structs; `checked()` returns the struct or raises ConfigError that
names the key, the value and what to do. They travel to child processes as msgpack. Secrets are no
settings: they come from the environment (`MOONCAKE_API_KEY`), never on a command line of a child.
"""

import ipaddress
import os
import re
from pathlib import Path
from typing import Self

import msgspec

from mooncake.core.errors import ConfigError
from mooncake.core.rpc import check_endpoint

API_KEY_ENV = "MOONCAKE_API_KEY"
ADMIN_TOKEN_ENV = "MOONCAKE_ADMIN_TOKEN"
ADMIN_TOKEN_FILE_ENV = "MOONCAKE_ADMIN_TOKEN_FILE"
ADMIN_TOKEN_HINT = f"set {ADMIN_TOKEN_ENV} or {ADMIN_TOKEN_FILE_ENV}"
DRAIN_S = 60.0
"""Answers of a thousand tokens at 50 ms between them, and some; longer ones are handed over."""
DRAIN_S_MAX = 86_400.0
ROLES = ("prefill", "decode", "both")
LOAD_MODES = ("async", "layerwise")
DTYPES = ("auto", "bfloat16", "float16", "float32")
POLICIES = ("kvcache", "cache_aware", "least_load", "round_robin", "random")
"""How the Conductor chooses instances: conductor.scheduler.Policy, which says what they mean."""
ADMISSIONS = ("objectives", "late", "early", "predicted")
"""When requests are turned away: conductor.admission.AdmissionMode, which says what they mean."""
EVICTIONS = ("lru", "lfu", "length", "tail")
"""Which blocks a full store gives up first: kvstore.node.eviction.POLICIES, which says what they mean."""
HUGEPAGES = ("auto", "off", "require")
"""What a store's memory is made of: transfer.hugepages says what they mean."""
HOT_COPIES, HOT_COPIES_MAX = 8, 16
"""Hosts that get a prefix which many ask for (conductor.heat): one rack of them; no directory makes more."""
SLO_S_MAX = 3600.0
BLOCK_TOKENS_STEP = 32
"""vLLM's CPU kernels want multiples of 32; on GPUs 32 and its multiples are fine as well."""
STEP_TOKENS = 512
"""Prompt tokens of one engine step, the grain of aborts and saves: 2 s of SmolLM2 on one core."""
MODEL_LEN_MAX = 1 << 22
POOL_BYTES_MIN = 1 << 20
SSD_BYTES = 8 << 30
SSD_BYTES_MIN = 1 << 30
"""A handful of segments of the tier's log."""
KV_BYTES_MIN = 16 << 20
API_KEY_CHARS_MIN = 16
"""Below this a key can be guessed; `python -c 'import secrets; print(secrets.token_urlsafe())'`."""

LOOPBACK = "127.0.0.1"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", re.IGNORECASE | re.ASCII)


def fail(key: str, value: object, advice: str) -> ConfigError:
    """Return the error of a bad setting: key, value, what to do."""
    return ConfigError(f"{key} = {value!r}: {advice}")


def parse_size_bytes(text: str, key: str = "size") -> int:
    """Return the bytes that a text like 512MiB, 2GiB, 1.5GB or 4096 means.

    Raises:
        ConfigError: it is not such a text, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() == "i":
        raise fail(key, text, "write a size like 512MiB, 2GiB or a number of bytes")
    size_bytes = float(match[1]) * _UNITS[match[2].lower()]
    if size_bytes != int(size_bytes) or size_bytes <= 0:
        raise fail(key, text, "must be a whole number of bytes above 0")
    return int(size_bytes)


def format_size(size_bytes: int) -> str:
    """Return bytes as a short text for people, 536870912 -> 512 MiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def parse_cores(text: str) -> list[int]:
    """Return the cores of a text like 0, 0,2 or 0-3; an empty text = not bound.

    Raises:
        ConfigError: it is not such a text.
    """
    cores: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip(), re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise fail("cores", text, "write cores like 0, 0,2 or 0-3")
        cores += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(cores))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all options share."""

    def checked(self) -> Self:
        """Return self.

        Raises:
            ConfigError: a value is out of its range.
        """
        self._check()
        return self

    def _check(self) -> None:
        raise NotImplementedError


class WorkerOptions(_Options, frozen=True, kw_only=True):
    """One engine instance with its relay (`mooncake prefill`, `mooncake decode`)."""

    role: str  # prefill | decode | both
    model: str  # folder or hub name, see mooncake.model.resolve_model
    metadata: str  # endpoint of the metadata store
    run_dir: str  # sockets, facts and logs; exists, ours alone
    instance_id: str
    address: str = LOOPBACK  # of this host, as StoreOptions.address
    node: str = "localhost"  # the store node whose segment this engine shares
    served_name: str = ""  # "" = model
    cores: list[int] = []  # [] = not bound
    kv_memory_bytes: int = 512 << 20
    max_model_len: int = 0  # 0 = the model's own
    dtype: str = "bfloat16"
    load_mode: str = "async"
    save_decoded: bool = True
    block_size: int = 32
    max_num_seqs: int = 16
    max_num_batched_tokens: int = STEP_TOKENS
    use_pool: bool = True  # False: no KV blocks are shared (a plain engine, for comparison)
    admin_host: str = LOOPBACK  # of metrics, health and drain; others than loopback need MOONCAKE_ADMIN_TOKEN
    admin_port: int = 0  # 0 = none
    drain_s: float = DRAIN_S  # SIGTERM: in-flight work gets so long
    log_level: str = "info"
    vllm_args: list[str] = []

    def _check(self) -> None:
        _choice("role", self.role, ROLES)
        _choice("load_mode", self.load_mode, LOAD_MODES)
        _choice("dtype", self.dtype, DTYPES)
        _name("instance_id", self.instance_id)
        _metadata(self.metadata)
        _address(self.address)
        _engine_sizes(self.block_size, self.max_model_len, self.kv_memory_bytes)
        _admin(self.admin_host, self.admin_port, self.drain_s)
        _between("max_num_seqs", self.max_num_seqs, 1, 4096)
        _between("max_num_batched_tokens", self.max_num_batched_tokens, self.block_size, MODEL_LEN_MAX)
        if not self.model:
            raise fail("model", self.model, "name a folder or a hub model, or run `mooncake model`")


class GatewayOptions(_Options, frozen=True, kw_only=True):
    """The Conductor (`mooncake conductor`): gateway and decision core in one process, or one of the two.

    A gateway by itself takes decisions from the core that leads: what is said here of policy serves it only
    while no core answers.
    """

    model: str
    run_dir: str
    host: str = "127.0.0.1"
    port: int = 8000
    address: str = LOOPBACK  # where engines send their tokens, as StoreOptions.address
    metadata_endpoint: str = "tcp://127.0.0.1:*"  # the core binds it, a gateway connects; or etcd://...
    name: str = ""  # among the gateways, or the cores; "" = of host and process
    share_port: bool = False  # with other gateways of this host; whoever starts them holds it
    admin_host: str = LOOPBACK  # of metrics, health and drain; others than loopback need MOONCAKE_ADMIN_TOKEN
    admin_port: int = 0  # 0 = none
    drain_s: float = DRAIN_S  # SIGTERM: in-flight work gets so long
    drain_delay_s: float = 0.0  # SIGTERM: it is not ready for so long before it stops listening
    served_name: str = ""  # "" = model
    aggregated: bool = False
    first_token: bool = False
    policy: str = POLICIES[0]
    ttft_slo_s: float = 0.0  # 0 = not enforced, as tbt_slo_s
    tbt_slo_s: float = 0.0
    hold_s: float = 0.0  # requests wait in the gateway while every engine has so much work; 0 = never
    admission: str = ADMISSIONS[0]
    decode_s: float = 0.0  # how long `predicted` takes an answer for; 0 = learned
    inline: bool = False  # short prompts may run on decode instances
    plan_roles: bool = False  # instances change between prefill and decode as the load asks for
    hot_copies: int = HOT_COPIES  # of a prefix that many ask for, made ahead; 0 = none
    tenants: str = ""  # file of their shares and quotas (conductor.tenants); "" = none
    api_key: str = ""  # from the environment in child processes
    block_size: int = 32
    max_model_len: int = 0
    dtype: str = "bfloat16"
    log_level: str = "info"
    vllm_args: list[str] = []

    def __repr__(self) -> str:
        """The key stays out of logs and tracebacks."""
        return f"GatewayOptions({self.host}:{self.port}, model={self.model!r})"

    def _check(self) -> None:
        _between("port", self.port, 1, 65535)
        _admin(self.admin_host, self.admin_port, self.drain_s)
        if self.name:
            _name("name", self.name)
        _choice("dtype", self.dtype, DTYPES)
        _choice("policy", self.policy, POLICIES)
        _choice("admission", self.admission, ADMISSIONS)
        for key in ("ttft_slo_s", "tbt_slo_s", "hold_s", "decode_s", "drain_delay_s"):
            if not 0.0 <= getattr(self, key) <= SLO_S_MAX:  # also refuses NaN
                raise fail(key, getattr(self, key), f"seconds up to {SLO_S_MAX:g}; 0 = none")
        _between("hot_copies", self.hot_copies, 0, HOT_COPIES_MAX)
        _engine_sizes(self.block_size, self.max_model_len, KV_BYTES_MIN)
        _metadata(self.metadata_endpoint)
        _address(self.address)
        check_host(self.host, self.api_key)
        if not self.model:
            raise fail("model", self.model, "name the model that the instances serve")


class StoreOptions(_Options, frozen=True, kw_only=True):
    """One store node (`mooncake store`)."""

    node: str
    capacity_bytes: int
    run_dir: str
    metadata: str
    address: str = LOOPBACK  # of this host, for all of the cluster; others than loopback need a secret
    transfer: str = ""  # HOST:PORT of its transfer engine, port 0 = any; "" = none, off loopback ADDRESS:0
    eviction: str = EVICTIONS[0]
    hugepages: str = HUGEPAGES[0]
    ssd_path: str = ""  # folder of the SSD tier; "" = none
    ssd_bytes: int = SSD_BYTES
    admin_host: str = LOOPBACK  # of metrics, health and drain; others than loopback need MOONCAKE_ADMIN_TOKEN
    admin_port: int = 0  # 0 = none
    drain_s: float = DRAIN_S  # SIGTERM: in-flight work gets so long
    log_level: str = "info"

    def _check(self) -> None:
        _name("node", self.node)
        _admin(self.admin_host, self.admin_port, self.drain_s)
        _metadata(self.metadata)
        _address(self.address)
        _choice("eviction", self.eviction, EVICTIONS)
        _choice("hugepages", self.hugepages, HUGEPAGES)
        if self.capacity_bytes < POOL_BYTES_MIN:
            raise fail("capacity", format_size(self.capacity_bytes), "must be at least 1MiB")
        if self.ssd_path and self.ssd_bytes < SSD_BYTES_MIN:
            least = format_size(SSD_BYTES_MIN)
            raise fail("ssd_size", format_size(self.ssd_bytes), f"must be at least {least}")


def check_host(
    host: str, api_key: str, key: str = "host", hint: str = f"set --api-key or {API_KEY_ENV}"
) -> None:
    """Refuse to serve a network without authentication.

    Raises:
        ConfigError: `host` is reachable from elsewhere and `api_key` is missing or too short.
    """
    if is_loopback(host):
        return
    if not api_key:
        raise fail(key, host, f"others can reach it: {hint}, or bind {LOOPBACK}")
    if len(api_key) < API_KEY_CHARS_MIN:
        raise fail(key, host, f"others can reach it: {hint} to at least {API_KEY_CHARS_MIN} characters")


def admin_token() -> str:
    """Return what callers of an admin server show, from the environment; "" = nobody needs to.

    Raises:
        ConfigError: the file of the token cannot be read or is empty.
    """
    if not (path := os.environ.get(ADMIN_TOKEN_FILE_ENV, "")):
        return os.environ.get(ADMIN_TOKEN_ENV, "").strip()
    try:
        token = Path(path).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise fail(ADMIN_TOKEN_FILE_ENV, path, f"cannot be read: {error}") from error
    if not token:
        raise fail(ADMIN_TOKEN_FILE_ENV, path, "is empty; write the token there")
    return token


def _admin(host: str, port: int, drain_s: float) -> None:
    _between("admin_port", port, 0, 65535)
    if port:
        check_host(host, admin_token(), "admin_host", ADMIN_TOKEN_HINT)
    if not 0.0 <= drain_s <= DRAIN_S_MAX:  # also refuses NaN
        raise fail("drain_s", drain_s, f"seconds up to {DRAIN_S_MAX:g}")


def _metadata(text: str) -> None:
    from mooncake.core.metadata_open import check_metadata  # its clients need no options

    check_metadata(text)


def _address(address: str) -> None:
    try:
        check_endpoint(f"tcp://{address}:*")
    except ConfigError as error:
        raise fail("address", address, str(error)) from error


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise fail(key, value, f"must be one of {', '.join(allowed)}")


def _between(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise fail(key, value, f"must be {low}..{high}")


def _name(key: str, value: str) -> None:
    # names become file names and metadata keys
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value, re.ASCII):
        raise fail(key, value, "use up to 64 letters, digits, dots, dashes and underscores")


def _engine_sizes(block_size: int, max_model_len: int, kv_memory_bytes: int) -> None:
    if block_size < BLOCK_TOKENS_STEP or block_size % BLOCK_TOKENS_STEP or block_size > 1024:
        raise fail("block_size", block_size, f"must be a multiple of {BLOCK_TOKENS_STEP}, at most 1024")
    _between("max_model_len", max_model_len, 0, MODEL_LEN_MAX)
    if kv_memory_bytes < KV_BYTES_MIN:
        raise fail("kv_memory", format_size(kv_memory_bytes), f"must be at least {format_size(KV_BYTES_MIN)}")
