"""Upstream's environment variables that mean something here, checked; other MC_* names are ignored."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from mooncake.core.config import fail
from mooncake.core.secret import read_secret

LOG_LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error"}
"""Upstream's names (the first two are one level here)."""
RPC_PORTS = (15_000, 17_000)
"""Upstream's range, which firewalls of existing clusters let through."""
TRANSFER_S = 30.0
CONNECT_S = 5.0
TRUE = ("1", "true", "on", "yes")
FALSE = ("0", "false", "off", "no", "")

Number = TypeVar("Number", int, float)


class EngineEnv(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says; None or "" = not set."""

    secret: bytes = b""
    force_tcp: bool = False
    transfer_s: float = TRANSFER_S
    connect_s: float = CONNECT_S
    port: int | None = None
    port_min: int = RPC_PORTS[0]
    port_max: int = RPC_PORTS[1]
    bind_host: str = ""
    nics: tuple[str, ...] = ()
    nic_port: int | None = None
    gid_index: int | None = None
    topology: str = ""
    slice_bytes: int | None = None
    endpoints_max: int | None = None


def read_env(env: Mapping[str, str]) -> EngineEnv:
    """Return the settings in `env`.

    Raises:
        ConfigError: a value is out of range: names it and what to do.
    """
    seconds = _number(env, float, 0.001, 86_400)
    whole = _number(env, int, 0, 1 << 31)
    port = _number(env, int, 1, 65_535)
    port_min = port("MC_MIN_RPC_PORT") or RPC_PORTS[0]
    port_max = port("MC_MAX_RPC_PORT") or max(RPC_PORTS[1], port_min)
    if port_min > port_max:
        raise fail("MC_MAX_RPC_PORT", port_max, f"must not be below MC_MIN_RPC_PORT = {port_min}")
    topology = env.get("MC_CUSTOM_TOPO_JSON", "")
    if topology and not Path(topology).is_file():
        raise fail("MC_CUSTOM_TOPO_JSON", topology, "no such file")
    return EngineEnv(
        secret=read_secret(env),
        force_tcp=_flag(env, "MC_FORCE_TCP"),
        transfer_s=seconds("MC_TRANSFER_TIMEOUT") or TRANSFER_S,
        connect_s=seconds("MC_HANDSHAKE_CONNECT_TIMEOUT") or CONNECT_S,
        port=port("MC_HANDSHAKE_PORT"),
        port_min=port_min,
        port_max=port_max,
        bind_host=env.get("MC_TCP_BIND_ADDRESS", "").strip(),
        nics=tuple(filter(None, (name.strip() for name in env.get("MC_TE_FILTERS", "").split(",")))),
        nic_port=_number(env, int, 1, 255)("MC_IB_PORT"),
        gid_index=_number(env, int, 0, 255)("MC_GID_INDEX"),
        topology=topology,
        slice_bytes=_number(env, int, 4096, 1 << 30)("MC_SLICE_SIZE"),
        endpoints_max=whole("MC_MAX_EP_PER_CTX") or None,
    )


def read_log_level(env: Mapping[str, str]) -> str:
    """Return our name of the level in MC_LOG_LEVEL.

    Raises:
        ConfigError: it is none of LOG_LEVELS.
    """
    text = env.get("MC_LOG_LEVEL", "INFO").upper()
    if text not in LOG_LEVELS:
        raise fail("MC_LOG_LEVEL", text, f"one of {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[text]


def _flag(env: Mapping[str, str], key: str) -> bool:
    text = env.get(key, "").strip().lower()
    if text not in TRUE + FALSE:
        raise fail(key, text, "write 1 or 0")
    return text in TRUE


def _number(
    env: Mapping[str, str], kind: type[Number], low: float, high: float
) -> Callable[[str], Number | None]:
    """Return a reader of numbers from `low` to `high`: key -> value, None if it is not set."""

    def read(key: str) -> Number | None:
        text = env.get(key, "").strip()
        if not text:
            return None
        try:
            value = kind(text)
        except ValueError as error:
            raise fail(key, text, f"write a number from {low:g} to {high:g}") from error
        if not low <= value <= high:  # false for nan as well
            raise fail(key, text, f"write a number from {low:g} to {high:g}")
        return value

    return read
