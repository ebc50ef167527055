"""Flags of `mooncake_master` that act, under upstream's names, and its config file."""

import importlib
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from mooncake.core.config import fail
from mooncake.dropin.store.settings import SEGMENT_TTL_S, MasterSettings

LOOPBACK = "127.0.0.1"
DAY_MS = 86_400_000
READS_NEVER = 1 << 30
"""No object is read as often before something else needs its place."""
DOCUMENT_BYTES_MAX = 16 << 20
"""Of a config file or one of quotas."""
_DURATION = re.compile(r"([0-9]+)(ms|s|m|h|)")
_UNIT_MS = {"ms": 1, "": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


class MasterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """See mooncake.dropin.master.flags for what each does."""

    rpc_port: int = 50_051
    rpc_address: str = LOOPBACK
    rpc_interface: str = ""
    metrics_port: int = 9_003
    metrics_host: str = ""
    enable_http_metadata_server: bool = False
    http_metadata_server_host: str = LOOPBACK
    http_metadata_server_port: int = 8_080
    default_kv_lease_ttl: str = "10000"
    default_kv_soft_pin_ttl: str = "1800000"
    allow_evict_soft_pinned_objects: bool = True
    client_ttl: float = SEGMENT_TTL_S
    eviction_high_watermark_ratio: float = 1.0
    eviction_ratio: float = 0.05
    enable_offload: bool = False
    offload_on_evict: bool = False
    promotion_on_hit: bool = True
    promotion_admission_threshold: int = 1
    enable_multi_tenants: bool = False
    tenant_quota_connector_type: str = "file"
    tenant_quota_connector_uri: str = ""
    config_path: str = ""

    def __post_init__(self) -> None:
        """Refuse flags that cannot work.

        Raises:
            ConfigError: names the flag and its value.
        """
        for name in ("rpc_port", "metrics_port", "http_metadata_server_port"):
            if not 0 <= getattr(self, name) < 1 << 16:
                raise fail(name, getattr(self, name), "must be 0..65535")
        for name in ("eviction_high_watermark_ratio", "eviction_ratio"):
            if not 0 <= getattr(self, name) <= 1:  # also refuses NaN
                raise fail(name, getattr(self, name), "must be 0 to 1")
        if not 1 <= self.client_ttl <= DAY_MS / 1000:
            raise fail("client_ttl", self.client_ttl, "seconds, at least 1")
        if not 1 <= self.promotion_admission_threshold <= READS_NEVER:
            raise fail("promotion_admission_threshold", self.promotion_admission_threshold, "at least 1")
        if self.tenant_quota_connector_type != "file":
            raise fail("tenant_quota_connector_type", self.tenant_quota_connector_type, "file")
        if self.enable_multi_tenants and not self.tenant_quota_connector_uri:
            raise fail("tenant_quota_connector_uri", "", "--enable_multi_tenants needs a file of quotas")
        self.settings, self.address  # noqa: B018 - raise

    @property
    def address(self) -> str:
        """Where to listen: --rpc_address, or the IPv4 address of --rpc_interface.

        Raises:
            ConfigError: there is no such interface, or it has no such address.
        """
        if not self.rpc_interface:
            return self.rpc_address
        for one in psutil.net_if_addrs().get(self.rpc_interface, []):
            if one.family is socket.AF_INET:
                return str(one.address)
        raise fail("rpc_interface", self.rpc_interface, "no interface of this host with an IPv4 address")

    @property
    def settings(self) -> MasterSettings:
        """What clients have to know."""
        return MasterSettings(
            kv_lease_ttl_s=_seconds("default_kv_lease_ttl", self.default_kv_lease_ttl),
            soft_pin_ttl_s=_seconds("default_kv_soft_pin_ttl", self.default_kv_soft_pin_ttl),
            client_ttl_s=self.client_ttl,
            evict_above_ratio=self.eviction_high_watermark_ratio,
            evict_ratio=self.eviction_ratio,
            evict_soft_pins=self.allow_evict_soft_pinned_objects,
            offload=self.enable_offload,
            offload_on_evict=self.offload_on_evict,
            ssd_reads=self.promotion_admission_threshold if self.promotion_on_hit else READS_NEVER,
            multi_tenants=self.enable_multi_tenants,
        )


def _seconds(name: str, text: object) -> float:
    """Return the seconds of "10000" (milliseconds), "500ms", "10s", "5m" or "1h"."""
    match = _DURATION.fullmatch(str(text).strip())
    total_ms = int(match[1]) * _UNIT_MS[match[2]] if match else -1
    if not 0 <= total_ms <= DAY_MS:
        raise fail(name, text, "milliseconds, or like 500ms, 10s, 5m, 1h; at most a day")
    return total_ms / 1000


def read_document(name: str, path: str) -> Any:
    """Return what a JSON or YAML file says.

    Raises:
        ConfigError: it cannot be read, or is neither; names the flag and the path.
    """
    try:
        if Path(path).stat().st_size > DOCUMENT_BYTES_MAX:
            raise fail(name, path, f"a file of at most {DOCUMENT_BYTES_MAX} bytes")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise fail(name, path, f"cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise fail(name, path, "is no JSON; to read YAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise fail(name, path, f"is neither JSON nor YAML: {error}") from error


def config_words(path: str) -> list[str]:
    """Return the flags in a config file as words of a command line.

    Raises:
        ConfigError: as read_document, or it is no map of names to values.
    """
    document = read_document("config_path", path)
    if not isinstance(document, Mapping) or any(isinstance(one, Mapping | list) for one in document.values()):
        raise fail("config_path", path, "must be one map of flags to their values")
    return [f"--{name}={_text(value)}" for name, value in document.items() if name != "config_path"]


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
