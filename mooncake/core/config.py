"""Names, limits and texts of settings that need nothing else; the models are mooncake.core.options."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal, get_args

from mooncake.core.errors import ConfigError

API_KEY_ENV = "MOONCAKE_API_KEY"
API_KEY_FILE_ENV = "MOONCAKE_API_KEY_FILE"
API_KEY_HINT = f"set {API_KEY_ENV} or {API_KEY_FILE_ENV}"
ADMIN_TOKEN_ENV = "MOONCAKE_ADMIN_TOKEN"
ADMIN_TOKEN_FILE_ENV = "MOONCAKE_ADMIN_TOKEN_FILE"
ADMIN_TOKEN_HINT = f"set {ADMIN_TOKEN_ENV} or {ADMIN_TOKEN_FILE_ENV}"
DRAIN_S = 60.0
"""Answers of a thousand tokens at 50 ms between them, and some; longer ones are handed over."""
DRAIN_S_MAX = 86_400.0
Role = Literal["prefill", "decode", "both"]
ROLES: tuple[str, ...] = get_args(Role)
PolicyName = Literal["kvcache", "cache_aware", "least_load", "round_robin", "random"]
POLICIES: tuple[str, ...] = get_args(PolicyName)
"""How the Conductor chooses instances: conductor.scheduler.Policy, which says what they mean."""
AdmissionName = Literal["objectives", "late", "early", "predicted"]
ADMISSIONS: tuple[str, ...] = get_args(AdmissionName)
"""When requests are turned away: conductor.admission.AdmissionMode, which says what they mean."""
EvictionName = Literal["lru", "lfu", "length", "tail"]
EVICTIONS: tuple[str, ...] = get_args(EvictionName)
"""Which blocks a full store gives up first: kvstore.node.eviction.POLICIES, which says what they mean."""
HugepagesName = Literal["auto", "off", "require"]
HUGEPAGES: tuple[str, ...] = get_args(HugepagesName)
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
ANY_HOSTS = ("0.0.0.0", "::")
"""What a server that listens on all addresses is told."""
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


def seen_at(host: str, address: str = LOOPBACK) -> str:
    """Return where a server that listens on `host` is reached; `address`: if on all, one of this machine."""
    return address if host in ANY_HOSTS else host


def host_port(host: str, port: int | str) -> str:
    """Return `host` and `port` as addresses have them, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_host(host: str, api_key: str, key: str = "host", hint: str = API_KEY_HINT) -> None:
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
